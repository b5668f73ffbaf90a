"""Threads: how many, and how they wait."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
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


_lock = threading.Lock()
_shared, _users = 1, 0


class Workers:
    """Threads that each take whole pieces of work, in place of threads that share every operation of torch.

    The operations of a training step are so short that two threads which share them wait longer for each other than
    they save. In the context torch computes each operation in one thread, so that results do not depend on the number
    of threads; it has as many workers as torch had threads. On a GPU there is one, and torch's threads stay.

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

        self._device = device
        with _lock:
            self.n = 1 if device.type != "cpu" else _shared if _users else torch.get_num_threads()

    def __enter__(self) -> Workers:
        global _shared, _users
        import torch

        if self._device.type == "cpu":
            with _lock:
                if not _users:
                    _shared = torch.get_num_threads()
                _users += 1
                torch.set_num_threads(1)
        start = None
        if self._device.type == "cuda":
            number = self._device.index
            start = partial(torch.cuda.set_device, torch.cuda.current_device() if number is None else number)
        self._pool = ThreadPoolExecutor(self.n, thread_name_prefix="spaformer_sc", initializer=start)
        return self

    def __exit__(self, *_: object) -> None:
        global _users
        import torch

        self._pool.shutdown(cancel_futures=True)
        if self._device.type == "cpu":
            with _lock:
                _users -= 1
                if not _users:
                    torch.set_num_threads(_shared)

    def spare(self, n: int) -> bool:
        """Whether there are threads beside ``n`` that compute; on a GPU those of the processor are."""
        return n < self.n or self._device.type == "cuda"

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
            try:
                running = {id(task): pool.submit(function, task, go_on) for task in ordered}
                left: set[Future[R]] = set(running.values())
                while left:  # with a pause, in which an interrupt is noticed on every system
                    done, left = wait(left, timeout=0.5, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
            return [running[id(task)].result() for task in tasks]

    def ahead(self, items: Iterator[T]) -> Generator[T]:
        """Items of an iterator, each made while the one before is in use; none is being made once this is closed."""
        end = object()
        coming: Future[T | object] = self._pool.submit(next, items, end)
        try:
            while (item := coming.result()) is not end:
                coming = self._pool.submit(next, items, end)
                yield item  # type: ignore[misc]
        finally:
            if not coming.cancel():
                wait([coming])


def _go_on() -> None:
    """Nothing stops a task that runs alone but an exception of its own."""
