"""What networks say of whole fields of view, a block of cells at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from spaformer_sc._memory import BLOCK, give_back
from spaformer_sc._threads import Workers
from spaformer_sc.nn.network import Network, Output, Tokens

from .sequences import Whole

T = TypeVar("T")


class Said:
    """What networks say of a FOV.

    Cells exchange information within the whole FOV, once; what is computed of each cell for itself is computed block by
    block, each time that it is asked for.

    Parameters
    ----------
    networks
        The networks.
    whole
        The FOV.
    workers
        Threads to compute in.
    """

    def __init__(self, networks: Sequence[Network], whole: Whole, workers: Workers) -> None:
        self.networks, self.whole = networks, whole
        self._workers = workers

        @torch.inference_mode()
        def embedded(rows: Tensor) -> list[Tensor]:
            tokens = whole.block(rows, inputs=True)
            return [network.embed(tokens) for network in networks]

        @torch.inference_mode()
        def exchanged(task: tuple[Network, Tensor]) -> tuple[Tensor, Tensor]:
            network, embedded = task
            x, context = whole.exchange(network, embedded)
            return (x if network.config.wide else context), context  # nothing but a wide path reads `x` again

        blocks = workers.map(embedded, torch.split(torch.arange(whole.view.fov.n_cells), BLOCK))
        by_network = list(zip(*blocks, strict=True))[::-1]
        # Each is dropped once it is joined.
        tasks = ((network, torch.cat(by_network.pop())) for network in networks)
        self._exchanged = list(workers.map(exchanged, tasks))
        if len(networks) > 1:  # not in each of many validations
            give_back()

    def in_blocks(
        self, function: Callable[[slice, Tokens, Iterator[Output]], T], cells: Tensor | None = None
    ) -> Iterator[T]:
        """Apply a function to what networks say of the cells, block by block.

        Parameters
        ----------
        function
            Takes the places of a block's cells in ``cells``, their tokens (without input expression and places) and the
            output of each network, computed when it is asked for.
        cells
            Rows of the FOV that are asked for (n,); None for all.

        Returns
        -------
        What the function gives, in order.
        """
        asked = torch.arange(self.whole.view.fov.n_cells) if cells is None else cells

        @torch.inference_mode()
        def decoded(start: int) -> T:
            at = slice(start, min(start + BLOCK, len(asked)))
            rows = asked[at]
            tokens = self.whole.block(rows, inputs=False)
            here = rows.to(self.whole.device)
            outputs = (
                network.decode(x[here], context[here], tokens)
                for network, (x, context) in zip(self.networks, self._exchanged, strict=True)
            )
            return function(at, tokens, outputs)

        return self._workers.map(decoded, range(0, len(asked), BLOCK))
