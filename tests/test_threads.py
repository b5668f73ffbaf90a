"""Work in several threads."""

from __future__ import annotations

import _thread
import signal
import threading
import time
from concurrent.futures import CancelledError

import anndata as ad
import numpy as np
import pytest
import torch

import spaformer_sc as sf
from spaformer_sc._threads import Workers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    """Take back what was set to a number of threads that a test made up."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 3])
def n_threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    return request.param


def test_results_come_in_order_and_few_items_are_taken_ahead(n_threads):
    taken = []

    def items():
        for i in range(12):
            taken.append(i)
            yield i

    def slowly(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    with Workers(CPU) as workers:
        for number, result in enumerate(workers.map(slowly, items())):
            assert result == number**2
            assert len(taken) <= number + n_threads
        assert list(workers.ahead(iter("abc"))) == list("abc")
        assert list(workers.ahead(iter(()))) == []


def test_items_are_made_ahead_of_their_use():
    made = threading.Event()

    def items():
        yield 1
        made.set()
        yield 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        workers = Workers(CPU)
    with workers:
        coming = workers.ahead(items())
        assert next(coming) == 1
        assert made.wait(10)
        assert list(coming) == [2]


def test_an_error_reaches_the_caller(n_threads):
    def fail(i):
        raise ZeroDivisionError(i)

    def items():
        yield 1
        raise OSError

    with Workers(CPU) as workers:
        with pytest.raises(ZeroDivisionError):
            list(workers.map(fail, [1, 2]))
        with pytest.raises(OSError):
            list(workers.ahead(items()))


def test_tasks_run_abreast_and_end_when_one_fails():
    together = threading.Barrier(2, timeout=10)

    def meet(task, go_on):
        together.wait()
        return -task

    def fail(task, go_on):
        together.wait()
        if task == 1:
            raise ZeroDivisionError
        while True:
            go_on()

    with Workers(CPU) as workers:
        assert workers.abreast(meet, [1, 2], 2, cost=float) == [-1, -2]
        with pytest.raises(ZeroDivisionError):
            workers.abreast(fail, [1, 2], 2, cost=float)


def test_an_interrupt_ends_all_tasks():
    ended = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background may ignore it

    def interrupted(task, go_on):
        if task == 1:
            time.sleep(0.2)
            _thread.interrupt_main()
        until = time.monotonic() + 20
        try:
            while time.monotonic() < until:
                go_on()
                time.sleep(0.001)
        except CancelledError:
            ended.append(task)
            raise

    try:
        with Workers(CPU) as workers, pytest.raises(KeyboardInterrupt):
            workers.abreast(interrupted, [1, 2], 2, cost=float)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == [1, 2]


def test_nothing_is_made_once_the_items_are_closed():
    made = []

    def items():
        for i in range(100):
            time.sleep(0.01)
            made.append(i)
            yield i

    with Workers(CPU) as workers:
        coming = workers.ahead(items())
        assert next(coming) == 0
        coming.close()
        n_made = len(made)
        time.sleep(0.05)
        assert len(made) == n_made <= 2


def test_two_fits_at_the_same_time_leave_the_threads_as_they_were(monkeypatch):
    torch.set_num_threads(2)
    first, second = Workers(CPU), None
    with first:
        second = Workers(CPU)
        assert second.n == 2
        second.__enter__()
    assert torch.get_num_threads() == 1
    second.__exit__()
    assert torch.get_num_threads() == 2


def test_torch_has_its_threads_again():
    before = torch.get_num_threads()

    def fail():
        with Workers(CPU):
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("quality", ["fast", "default"])
def test_results_do_not_depend_on_the_number_of_threads(quality):
    found = []
    for n in (1, 4):
        tissue = sf.datasets.simulated_tissue(n_fovs=3, n_cells=90, n_genes=30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda n=n: n)
            sf.tl.impute(tissue, library_key="fov", quality=quality, max_epochs=3, progress=False)
        found.append(tissue)
    one, four = found
    np.testing.assert_array_equal(one.layers["spaformer"], four.layers["spaformer"])
    np.testing.assert_array_equal(one.obsm["X_spaformer"], four.obsm["X_spaformer"])
    assert one.uns["spaformer"]["scores"] == four.uns["spaformer"]["scores"]


def test_the_random_state_stays_as_it_was_with_several_threads():
    tissue: ad.AnnData = sf.datasets.simulated_tissue(n_fovs=1, n_cells=60, n_genes=20)
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        sf.tl.impute(tissue, max_epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
