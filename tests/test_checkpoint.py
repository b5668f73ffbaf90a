"""One run at a time writes what an unfinished run keeps."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from spaformer_sc.training import checkpoint
from spaformer_sc.training.checkpoint import LOCK, Checkpoint

FOUND = {"version": "1", "data": "these"}
HOLDER = f"""
import sys, time
from pathlib import Path
from spaformer_sc.training.checkpoint import Checkpoint
with Checkpoint(Path(sys.argv[1]), resume=False, choices={{}}) as run:
    run.begin({FOUND})
    run.save("state", {{"step": 1.0}})
    print("holds", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "out.h5ad.partial"


def begun(folder, *, resume):
    run = Checkpoint(folder, resume=resume, choices={})
    run.begin(FOUND)
    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def other_process(folder):
    """A process that has begun a run; killed in the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_until_the_first_is_killed(folder, other_process):
    before = files(folder)
    for resume in (False, True):
        with pytest.raises(ValueError, match="another run is writing"):
            begun(folder, resume=resume)
        assert files(folder) == before
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with begun(folder, resume=True) as run:
        assert run.load("state") == {"step": 1.0}
    assert not folder.exists()


def test_a_killed_run_may_be_started_anew(folder, other_process):
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with begun(folder, resume=False) as run:
        assert run.load("state") is None
    assert not folder.exists()


def test_a_second_run_in_the_same_process_is_refused(folder):
    with begun(folder, resume=False):
        with (
            pytest.raises(ValueError, match="another run is writing"),
            Checkpoint(folder, resume=True, choices={}) as b,
        ):
            b.begin(FOUND)
        assert folder.is_dir()
    with begun(folder, resume=True):
        pass
    assert not folder.exists()


def test_an_interrupted_or_refused_run_lets_go(folder):
    run = begun(folder, resume=False)
    run.save("state", {"step": 1.0})
    run.__exit__(KeyboardInterrupt)
    with pytest.raises(ValueError, match="differs in data"), Checkpoint(folder, resume=True, choices={}) as other:
        other.begin({**FOUND, "data": "others"})
    with begun(folder, resume=True) as run:
        assert run.load("state") == {"step": 1.0}


@pytest.mark.parametrize("left", [LOCK, checkpoint.FRESH])
def test_a_kill_before_the_run_is_described_is_not_in_the_way(folder, left):
    folder.mkdir()
    (folder / left).touch()
    with begun(folder, resume=False):
        assert (folder / checkpoint.RUN).exists()
    assert not folder.exists()


def test_what_is_no_run_is_left_alone(folder):
    folder.mkdir()
    (folder / "mine").write_text("text")
    with pytest.raises(ValueError, match="in the way"):
        begun(folder, resume=True)
    assert files(folder) == {"mine": b"text"}


@pytest.mark.parametrize("when", ["before the file is locked", "before the file is opened"])
def test_a_run_that_ends_at_this_moment_takes_no_lock_with_it(folder, monkeypatch, when):
    ending = [begun(folder, resume=False)]
    original = checkpoint.lock

    def lock(file):
        if ending:
            ending.pop().__exit__(None)
        original(file)

    if when == "before the file is locked":
        monkeypatch.setattr(checkpoint, "lock", lock)
    else:
        made = folder.mkdir

        def mkdir(path, **arguments):
            if ending:
                ending.pop().__exit__(None)
            else:
                made(**arguments)

        monkeypatch.setattr(type(folder), "mkdir", mkdir)
    with begun(folder, resume=False):
        assert not ending
        with pytest.raises(ValueError, match="another run is writing"):
            begun(folder, resume=True)


def test_where_files_cannot_be_locked_the_run_goes_on_with_a_warning(folder, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with begun(folder, resume=False) as run:
        run.save("state", {"step": 1.0})
        assert run.load("state") == {"step": 1.0}
    assert not folder.exists()
    assert "cannot be locked" in caplog.text
