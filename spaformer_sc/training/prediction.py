"""What networks say of whole fields of view, a block of cells at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spaformer_sc._memory import BLOCK
from spaformer_sc._threads import Workers
from spaformer_sc.nn.network import Network, Output, Tokens

from .sequences import Whole

T = TypeVar("T")


def in_blocks(
    networks: Sequence[Network],
    whole: Whole,
    function: Callable[[slice, Tokens, Iterator[Output]], T],
    workers: Workers,
    cells: Tensor | None = None,
) -> Iterator[T]:
    """Apply a function to what networks say of the cells of a FOV, block by block.

    Cells exchange information within the whole FOV; only what is computed of each cell for itself is done in blocks.

    Parameters
    ----------
    networks
        The networks.
    whole
        The FOV.
    function
        Takes the places of a block's cells in ``cells``, their tokens (without input expression and places) and the
        output of each network, computed when it is asked for.
    workers
        Threads to compute in.
    cells
        Rows of the FOV that are asked for (n,); None for all.

    Returns
    -------
    What the function gives, in order.
    """
    every = torch.arange(whole.view.fov.n_cells)
    asked = every if cells is None else cells

    @torch.inference_mode()
    def embedded(rows: Tensor) -> list[Tensor]:
        tokens = whole.block(rows, inputs=True)
        return [network.embed(tokens) for network in networks]

    @torch.inference_mode()
    def exchanged(number: int) -> tuple[Tensor, Tensor]:
        return whole.exchange(networks[number], torch.cat([part[number] for part in parts]))

    @torch.inference_mode()
    def decoded(start: int) -> T:
        at = slice(start, min(start + BLOCK, len(asked)))
        rows = asked[at]
        tokens = whole.block(rows, inputs=False)
        here = rows.to(whole.device)
        outputs = (
            network.decode(x[here], context[here], tokens)
            for network, (x, context) in zip(networks, contexts, strict=True)
        )
        return function(at, tokens, outputs)

    parts = list(workers.map(embedded, torch.split(every, BLOCK)))
    contexts = list(workers.map(exchanged, range(len(networks))))
    yield from workers.map(decoded, range(0, len(asked), BLOCK))
