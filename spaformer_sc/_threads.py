"""Threads: how many, and how they wait."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


def wait_patiently() -> None:
    """Let idle OpenMP threads sleep instead of spin, unless the user has set how they wait.

    By default threads that wait for each other keep a core busy. On a shared computer this makes two threads beside
    another busy process several times slower than one. OpenMP reads the setting when torch loads it, so this has to
    come before torch is first imported; later it does nothing.
    """
    if "torch" not in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class Workers:
    """Threads that each take whole pieces of work, in place of threads that share every operation of torch.

    The operations of a training step are so short that two threads which share them wait longer for each other than
    they save. In the context torch computes each operation in one thread, so that results do not depend on the number
    of threads; it has as many workers as torch had threads, and on a GPU one.

    Parameters
    ----------
    device
        Where torch computes.

    Attributes
    ----------
    n
        Number of threads.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self._shared = torch.get_num_threads()
        self.n = self._shared if device.type == "cpu" else 1

    def __enter__(self) -> Workers:
        import torch

        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.n, thread_name_prefix="spaformer_sc")
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._shared)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results of a function, in the order of the items; as many at a time as there are threads."""
        if self.n == 1:
            yield from map(function, items)
            return
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) == self.n:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def abreast(
        self, function: Callable[[T, Callable[[], None]], R], tasks: Sequence[T], n: int, cost: Callable[[T], float]
    ) -> list[R]:
        """Results of long tasks, in their order, with ``n`` at a time, the costly ones first.

        Parameters
        ----------
        function
            Does a task. It calls its second argument now and then, which raises an error once another task has failed
            or the run is interrupted.
        tasks
            The tasks.
        n
            How many run at a time.
        cost
            About how long a task takes, in any unit.
        """
        if n == 1:
            return [function(task, _go_on) for task in tasks]
        stopped = threading.Event()

        def go_on() -> None:
            if stopped.is_set():
                raise CancelledError

        with ThreadPoolExecutor(n, thread_name_prefix="spaformer_sc") as pool:
            ordered = sorted(tasks, key=cost, reverse=True)
            running = {id(task): pool.submit(function, task, go_on) for task in ordered}
            try:
                done, _ = wait(running.values(), return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
            return [running[id(task)].result() for task in tasks]

    def ahead(self, items: Iterator[T]) -> Iterator[T]:
        """Items of an iterator, each made while the one before is in use."""
        if self.n == 1:
            yield from items
            return
        end = object()
        coming: Future[T | object] = self._pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = self._pool.submit(next, items, end)
            yield item  # type: ignore[misc]


def _go_on() -> None:
    """Nothing stops a task that runs alone but an exception of its own."""
