"""Graphs and encodings of fields of view are computed once in a process, and found again by what they are made of."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

P = ParamSpec("P")
R = TypeVar("R")

CAPACITY = 256 * 2**20
"""Bytes that `remembered` keeps."""

_OVERHEAD = 4096
"""Bytes that a result takes beside its arrays, at most."""


class Cache:
    """Results of functions, the least recently used of which are forgotten where they become too many.

    A result is found by the function itself, the object, and by a checksum (SHA-256) of the content of all arguments:
    what differs in anything is another. Results are copied on the way in and out, so that whoever changes one changes
    nothing else. Several threads may use it.

    Parameters
    ----------
    capacity
        Bytes of all results together. A result that is larger is not kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.n_bytes = 0
        self._kept: OrderedDict[tuple[Callable[..., Any], bytes], tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Result of a function, computed where it is not known.

        Parameters
        ----------
        function
            A function of its arguments alone: nothing random, no effect beside the result. It takes and gives arrays,
            tensors, CSR matrices, numbers, strings and None, or tuples of them.
        *args, **kwargs
            Its arguments.

        Raises
        ------
        TypeError
            If an argument or the result is of another type.
        """
        key = function, _checksum((args, tuple(sorted(kwargs.items()))))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                known: R = self._kept[key][0]
                return copy.deepcopy(known)
        result = function(*args, **kwargs)
        size = _OVERHEAD + sum(part.nbytes for part in _parts(result) if isinstance(part, np.ndarray))
        if size <= self.capacity:
            entry = copy.deepcopy(result), size
            with self._lock:
                self.n_bytes += size - self._kept.pop(key, (None, 0))[1]
                self._kept[key] = entry
                self._forget()
        return result

    def resize(self, capacity: int) -> None:
        """Set the capacity; what no longer fits is forgotten."""
        with self._lock:
            self.capacity = capacity
            self._forget()

    def _forget(self) -> None:
        while self.n_bytes > self.capacity:
            self.n_bytes -= self._kept.popitem(last=False)[1][1]


remembered = Cache(CAPACITY)
"""The cache of this process."""


def _checksum(value: Any) -> bytes:
    """Checksum that differs wherever types, shapes or values do."""
    found = hashlib.sha256()
    for part in _parts(value):
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str} {part.shape}\n".encode())
            found.update(np.ascontiguousarray(part).data)
        else:
            found.update(f"{part}\n".encode())
    return found.digest()


def _parts(value: Any) -> Iterator[NDArray[Any] | str]:
    """Arrays that a value consists of, and in words what else it is."""
    import torch

    if value is None or isinstance(value, (bool, int, float, str, np.generic)):
        yield repr(value)
    elif isinstance(value, tuple):
        yield f"tuple of {len(value)}"
        for part in value:
            yield from _parts(part)
    elif isinstance(value, sp.csr_matrix):
        yield f"csr_matrix {value.shape}"
        yield from (value.indptr, value.indices, value.data)
    elif isinstance(value, torch.Tensor):
        yield f"tensor on {value.device}"
        yield value.detach().cpu().numpy()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield value
    else:
        raise TypeError(f"a result cannot be remembered with a {type(value).__name__} among its arguments or in it.")
