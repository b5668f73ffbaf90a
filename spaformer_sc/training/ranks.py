"""Processes that train together, one for each device: who they are, how they start, what each takes of the data.

Lightning Fabric starts the communication (gloo on CPUs, NCCL on GPUs) and wraps the network in
``DistributedDataParallel`` (Li et al. 2020, VLDB 13), which averages gradients over the processes as they are computed.
"""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import pickle
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spaformer_sc._logging import logger

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .sequences import FieldCounts

ItemT = TypeVar("ItemT")
WORK, RESULT, ERROR = "work.pickle", "result.pickle", "error.txt"


class Ranks:
    """The processes that train together, as one of them sees them; by default this one alone.

    Parameters
    ----------
    fabric
        Connected to the others; None where there are none.

    Attributes
    ----------
    rank, size
        Number of this process, from 0, and number of all.
    device
        Device of this process (``torch.device``); None where there is no other.
    """

    def __init__(self, fabric: Any = None) -> None:
        self._fabric = fabric
        self.device: Any = None if fabric is None else fabric.device
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.size: int = 1 if fabric is None else fabric.world_size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum of each value over the ranks; the same on all to the last bit."""
        if self._fabric is None:
            return list(values)
        import torch

        given = torch.tensor(values, dtype=torch.float64, device=self._fabric.device)
        found: list[float] = self._fabric.all_reduce(given, reduce_op="sum").tolist()
        return found

    def add_up(self, array: NDArray[np.float32]) -> None:
        """Put the sum over the ranks into an array."""
        if self._fabric is not None:
            import torch

            total = self._fabric.all_reduce(torch.from_numpy(array).to(self._fabric.device), reduce_op="sum")
            array[:] = total.cpu().numpy()

    def all(self, value: ItemT) -> list[ItemT]:
        """Give what every rank has, in their order."""
        if self._fabric is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self._fabric is not None:
            self._fabric.barrier()

    def averaging(self, module: nn.Module) -> nn.Module:
        """Wrap a module so that the gradients of its parameters, all of them used, become means over the ranks."""
        wrapped: nn.Module = self._fabric.setup_module(module)
        return wrapped

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean of a number over the ranks; the same on all to the last bit."""
        if self._fabric is None:
            return value
        found: torch.Tensor = self._fabric.all_reduce(value.clone(), reduce_op="mean")
        return found

    def together(
        self, items: Iterator[ItemT], size: Callable[[ItemT], torch.Tensor]
    ) -> Iterator[tuple[ItemT, float | None]]:
        """Yield items as long as every rank has one, so that all take as many steps; what is left of some is dropped.

        Parameters
        ----------
        items
            Those of this rank.
        size
            Gives the size of an item.

        Yields
        ------
        An item, and the mean over the ranks of the sizes of what they have now; None for a process on its own.
        """
        if self._fabric is None:
            yield from ((item, None) for item in items)
            return
        while True:
            item = next(items, None)
            some, total = self.sum(float(item is not None), 0.0 if item is None else float(size(item)))
            if item is None or some < self.size:
                return
            yield item, total / self.size

    def deal(
        self, data: Sequence[FieldCounts], seed: Sequence[int], *, whole: bool, compact: bool
    ) -> list[FieldCounts]:
        """Give this rank's share of the cells, as FOVs of which it owns all cells or some.

        FOVs in random order are a line of cells that is cut into as many equal parts as there are ranks (McNaughton
        1959, Management Science 6, wrap-around rule): every rank has equally many cells, one more or less, whatever the
        sizes of the FOVs, and at most one FOV less than there are ranks is divided, whose inputs are then computed on
        both sides of a cut.

        Parameters
        ----------
        data
            All FOVs, the same on all ranks.
        seed
            Seed of what is random, the same on all ranks.
        whole
            Divide each FOV among all ranks, where a step is a FOV.
        compact
            Divide a FOV into parts that lie together, not at random.
        """
        rng = np.random.default_rng(seed)
        sizes = np.array([int(sequence.fov.own.sum()) for sequence in data])
        order = rng.permutation(len(data))
        seeds = rng.integers(2**63, size=len(data))
        ends = sizes[order].cumsum()
        low, high = (int(ends[-1]) * bound // self.size for bound in (self.rank, self.rank + 1))
        dealt = []
        for place, number in enumerate(order):
            sequence, n = data[number], int(sizes[number])
            if whole:
                turn = (self.rank + place) % self.size
                first, last = n * turn // self.size, n * (turn + 1) // self.size
            else:
                start = int(ends[place]) - n
                first, last = max(0, low - start), min(n, high - start)
            if first >= last:
                continue
            if last - first < n:
                sequence = _part(sequence, first, last, np.random.default_rng(seeds[number]), compact)
            dealt.append(sequence)
        return dealt


ALONE = Ranks()
"""A process on its own."""


def _part(sequence: FieldCounts, first: int, last: int, rng: np.random.Generator, compact: bool) -> FieldCounts:
    """Cells ``first`` to ``last`` of a FOV's own, in random order or in that along a random direction."""
    own = np.flatnonzero(sequence.fov.own)
    if compact:
        angle = rng.uniform(0, np.pi)
        own = own[np.argsort(sequence.fov.positions[own, :2] @ [np.cos(angle), np.sin(angle)], kind="stable")]
    else:
        own = rng.permutation(own)
    mask = np.zeros_like(sequence.fov.own)
    mask[own[first:last]] = True
    return replace(sequence, fov=replace(sequence.fov, own=mask))


def largest_first(sizes: Sequence[int], n_ranks: int) -> NDArray[np.int64]:
    """Give each item to the rank that has least, the largest item first (Graham 1969, SIAM J. Appl. Math. 17).

    Returns
    -------
    Rank of each item (items,).
    """
    load = np.zeros(n_ranks, dtype=np.int64)
    ranks = np.zeros(len(sizes), dtype=np.int64)
    for number in np.argsort(-np.asarray(sizes), kind="stable"):
        ranks[number] = load.argmin()
        load[ranks[number]] += sizes[number]
    return ranks


# --- starting ---------------------------------------------------------------------------------------------------------


def launched() -> tuple[int, int] | None:
    """Numbers of all processes and of those on this machine that torchrun or SLURM has started; None if it did not.

    A single process, as in an interactive SLURM session, counts as none.
    """
    of = os.environ.get
    if of("TORCHELASTIC_RUN_ID") is not None:
        size, here = int(of("WORLD_SIZE", "1")), int(of("LOCAL_WORLD_SIZE", "1"))
    elif of("SLURM_STEP_NUM_TASKS") is not None and of("SLURM_JOB_NAME") not in ("bash", "interactive"):
        size = int(of("SLURM_NTASKS", "1"))
        here = size // int(of("SLURM_NNODES", "1"))
    else:
        return None
    return (size, here) if size > 1 else None


def join(device: torch.device) -> Ranks:
    """Meet the other processes that torchrun or SLURM has started; only the first goes on to report."""
    size, here = launched() or (1, 1)
    ranks = _connected(device, here, size // here)
    if not ranks.first:
        logger.setLevel(logging.ERROR)
    return ranks


def _connected(device: torch.device, here: int, n_machines: int, environment: Any = None) -> Ranks:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    fabric = Fabric(
        accelerator=device.type,
        devices=here,
        num_nodes=n_machines,
        strategy=DDPStrategy(),
        plugins=environment,
    )
    fabric.launch()
    return Ranks(fabric)


def launch(function: Callable[..., ItemT], *arguments: Any, devices: int, device: torch.device, threads: int) -> ItemT:
    """Run a function in new processes, one for each device, and wait for them.

    When one fails, the others are ended too; likewise when this process is interrupted. What is logged by the first
    comes out of this process's logger.

    Parameters
    ----------
    function
        Called with :class:`Ranks` and the arguments; importable by name.
    arguments
        What can be pickled; handed over, as is the result, in a temporary folder.
    devices
        Number of processes.
    device
        Kind of device.
    threads
        Processor threads, which are divided among them.

    Returns
    -------
    What the function returns in the first process.

    Raises
    ------
    RuntimeError
        If a process fails; with its error.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    records = multiprocessing.get_context("spawn").Queue()
    listener = logging.handlers.QueueListener(records, _Passed())
    with tempfile.TemporaryDirectory(prefix="spaformer_sc_") as folder:
        with open(Path(folder, WORK), "wb") as file:
            pickle.dump((function, arguments), file)
        each = max(1, threads // devices)
        level = logger.getEffectiveLevel()
        port = LightningEnvironment().main_port
        listener.start()
        started = start_processes(  # type: ignore[no-untyped-call]
            _work,
            args=(folder, devices, device, port, each, records, level),
            nprocs=devices,
            join=False,
            start_method="spawn",
        )
        try:
            while not started.join():
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            cause = Path(folder, ERROR)
            said = cause.read_text(encoding="utf-8") if cause.exists() else str(error)
            raise RuntimeError(f"one of {devices} training processes failed, and all were ended: {said}") from None
        finally:
            for process in started.processes:
                process.kill()
                process.join()
            # A process that was ended while it wrote a message may have left the queue locked.
            stopping = threading.Thread(target=listener.stop, daemon=True)
            stopping.start()
            stopping.join(5)
        with open(Path(folder, RESULT), "rb") as file:
            found: ItemT = pickle.load(file)
    return found


class _Passed(logging.Handler):
    """Hands the records of another process to the logger that they come from."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


def _work(
    rank: int, folder: str, devices: int, device: torch.device, port: int, threads: int, records: Any, level: int
) -> None:
    """What a new process does."""
    import torch
    from lightning.fabric.plugins.environments import LightningEnvironment

    torch.set_num_threads(threads)
    for name in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger.propagate = False
    logger.setLevel(level)
    logger.addHandler(logging.handlers.QueueHandler(records) if rank == 0 else logging.NullHandler())
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ranks = _connected(device, devices, 1, LightningEnvironment())
    with open(Path(folder, WORK), "rb") as file:
        function, arguments = pickle.load(file)
    try:
        found = function(ranks, *arguments)
    except Exception:
        # Others fail because this one is gone; what the first to fail says is kept.
        with suppress(FileExistsError), open(Path(folder, ERROR), "x", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        raise
    if ranks.first:
        with open(Path(folder, RESULT), "wb") as file:
            pickle.dump(found, file)


def being_started() -> bool:
    """Whether another process is starting this one, which is still reading the user's script."""
    return bool(getattr(multiprocessing.current_process(), "_inheriting", False))
