"""What is used of torch-geometric, imported without a warning that it causes and users can do nothing about."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # It scripts a class on import, which torch has deprecated.
    warnings.filterwarnings("ignore", ".torch.jit.script. is (deprecated|not supported)")
    from torch_geometric.data import Data
    from torch_geometric.nn import GATv2Conv, GINConv
    from torch_geometric.utils import subgraph

__all__ = ["Data", "GATv2Conv", "GINConv", "subgraph"]
