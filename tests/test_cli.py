"""The command line, and what an import loads."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

import spaformer_sc as sf
from spaformer_sc import cli
from spaformer_sc.pp._report import CheckReport
from tests.conftest import contents, plain, sha256

RESULTS = {"layers/spaformer", "obsm/X_spaformer", "uns/spaformer"}
QUICK = ["--library-key", "fov", "--max-epochs", "1", "--quiet"]


@pytest.fixture
def source(tissue, tmp_path):
    """A file to impute."""
    path = tmp_path / "in.h5ad"
    tissue.write_h5ad(path)
    return path


def run(*arguments):
    """Exit code of the command line."""
    return cli.main([str(argument) for argument in arguments])


def expected(path, **arguments):
    """What `tl.impute` makes of a file."""
    adata = ad.read_h5ad(path)
    sf.tl.impute(adata, **{"library_key": "fov", "max_epochs": 1, "progress": False, **arguments})
    return adata


def same(found, wanted):
    np.testing.assert_array_equal(found.layers["spaformer"], wanted.layers["spaformer"])
    np.testing.assert_equal(plain(found.uns["spaformer"]), plain(wanted.uns["spaformer"]))


# --- impute -----------------------------------------------------------------------------------------------------------


def test_zeros_and_standard_deviations(source, tmp_path):
    assert run("impute", source, tmp_path / "out.h5ad", "--zeros", "keep", "--sd", *QUICK) == 0
    found, wanted = ad.read_h5ad(tmp_path / "out.h5ad"), expected(source, zeros="keep", sd=True)
    same(found, wanted)
    np.testing.assert_array_equal(found.layers["spaformer_sd"], wanted.layers["spaformer_sd"])


def test_h5ad_to_h5ad(source, tmp_path, capsys):
    before = sha256(source)
    assert run("impute", source, tmp_path / "out.h5ad", *QUICK) == 0
    assert sha256(source) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]
    found, given = ad.read_h5ad(tmp_path / "out.h5ad"), contents(ad.read_h5ad(source))
    same(found, expected(source))
    assert contents(found).keys() - given.keys() >= RESULTS
    assert {place: contents(found)[place] for place in given} == given
    assert capsys.readouterr().out == ""


def test_zarr_to_zarr(tissue, tmp_path, source):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Writing zarr v2 data", UserWarning)
        tissue.write_zarr(tmp_path / "in.zarr")
    before = sha256(tmp_path / "in.zarr")
    assert run("impute", tmp_path / "in.zarr", tmp_path / "out.zarr", *QUICK) == 0
    assert sha256(tmp_path / "in.zarr") == before
    same(ad.read_zarr(tmp_path / "out.zarr"), expected(source))


OPTIONS = {  # option and value on the command line: argument and value of `tl.impute`
    ("--library-key", "slide"): ("library_key", "slide"),
    ("--spatial-key", "xy"): ("spatial_key", "xy"),
    ("--connectivity-key", "graph"): ("connectivity_key", "graph"),
    ("--layer", "counts"): ("layer", "counts"),
    ("--missing", "mask"): ("missing", "mask"),
    ("--scale", "rate"): ("output", "rate"),
    ("--zeros", "keep"): ("zeros", "keep"),
    ("--sd",): ("sd", True),
    ("--target-sum", "250"): ("target_sum", 250.0),
    ("--genes", "EPCAM, VIM"): ("genes", ["EPCAM", "VIM"]),
    ("--key-added", "mine"): ("key_added", "mine"),
    ("--quality", "best"): ("quality", "best"),
    ("--preset", "paper"): ("preset", "paper"),
    ("--positional", "laplacian,signnet"): ("positional", ["laplacian", "signnet"]),
    ("--encoder", "mlp"): ("encoder", "mlp"),
    ("--decoder", "nb"): ("decoder", "nb"),
    ("--variational",): ("variational", True),
    ("--masking", "bilevel,thinning"): ("masking", ["bilevel", "thinning"]),
    ("--n-latent", "9"): ("n_latent", 9),
    ("--set", "hops=0", "--set", "dispersion=entry", "--set", "thinning=[0.4, 0.6]"): (
        "settings",
        {"hops": 0, "dispersion": "entry", "thinning": [0.4, 0.6]},
    ),
    ("--graph", "radius"): ("graph", "radius"),
    ("--n-neighbors", "9"): ("n_neighbors", 9),
    ("--radius", "20"): ("radius", 20.0),
    ("--max-epochs", "7"): ("max_epochs", 7),
    ("--tile-size", "700"): ("tile_size", 700),
    ("--random-state", "3"): ("random_state", 3),
    ("--resume",): ("resume", True),
    ("--device", "cpu"): ("device", "cpu"),
    ("--devices", "2"): ("devices", 2),
    ("--quiet",): ("progress", False),
}
OF_THE_PROGRAM = {"--help", "--threads", "--debug", "--table-key"}  # the last is of the reading, not of tl.impute


def test_every_option_arrives(source, tmp_path, monkeypatch, capsys):
    received = {}

    def impute(adata, **arguments):
        received.clear()
        received.update(arguments)

    monkeypatch.setattr(sf.tl, "impute", impute)
    flat = [part for option in OPTIONS for part in option]
    assert run("impute", *flat, source, tmp_path / "out.h5ad") == 0
    assert received == dict(OPTIONS.values()) | {"output_path": str(tmp_path / "out.h5ad")}
    with pytest.raises(SystemExit):
        run("impute", "--help")
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert shown == {option[0] for option in OPTIONS} | OF_THE_PROGRAM | {"--output"}

    assert run("impute", source, tmp_path / "out.h5ad", "--output", "rate") == 0
    assert received["output"] == "rate"
    assert run("impute", source, tmp_path / "out.h5ad", "--library-key", "slide", "--library-key", "fov") == 0
    assert received["library_key"] == ["slide", "fov"]
    assert run("impute", source, tmp_path / "out.h5ad", "--positional", "none") == 0
    assert received["positional"] is None


def test_what_is_not_asked_for_is_left_to_the_defaults(source, tmp_path, monkeypatch):
    received = {}
    defaults = {name: parameter.default for name, parameter in inspect.signature(sf.tl.impute).parameters.items()}
    monkeypatch.setattr(sf.tl, "impute", lambda adata, **arguments: received.update(arguments))
    assert run("impute", source, tmp_path / "out.h5ad") == 0
    assert received.pop("output_path") == str(tmp_path / "out.h5ad")
    assert received == {name: defaults[name] for name in received}


def test_an_old_result_stays_until_the_new_one_is_complete(source, tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.h5ad"
    assert run("impute", source, path, *QUICK, "--genes", "EPCAM") == 0
    before = sha256(path)

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ad.AnnData, "write_h5ad", fail)
        assert run("impute", source, path, *QUICK) == 1
    assert "spaformer-sc: no space left on device" in capsys.readouterr().err
    assert sha256(path) == before
    assert run("impute", source, path, *QUICK) == 0
    assert sha256(path) != before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def damaged(path):
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.h5ad", "out.h5ad"], "`IN='nowhere.h5ad'` does not exist"),
        (["text.csv", "out.h5ad"], "`IN='text.csv'` must end in .h5ad or .zarr"),
        (["damaged.h5ad", "out.h5ad"], "`IN='damaged.h5ad'` cannot be read as an AnnData: "),
        (["empty.zarr", "out.h5ad"], "`IN='empty.zarr'` cannot be read as an AnnData: "),
        (["in.h5ad", "out.csv"], "`OUT='out.csv'` must end in .h5ad or .zarr"),
        (["in.h5ad", "no/such/out.h5ad"], "does not exist; create it first"),
        (["in.h5ad", "in.h5ad"], "`OUT='in.h5ad'` is the input file, which is not changed"),
        (["in.h5ad", "link.h5ad"], "is the input file"),
        (["in.h5ad", "out.h5ad", "--library-key", "FOV"], "`library_key='FOV'` is not in `adata.obs`"),
        (["in.h5ad", "out.h5ad", "--library-key", "fov", "--library-key", "slide"], "`library_key='slide'` is not in"),
        (["in.h5ad", "out.h5ad", *QUICK, "--genes", "epcam"], "Did you mean 'EPCAM'?"),
        (["in.h5ad", "out.h5ad", *QUICK, "--positional", "none,signnet"], "`positional='none'` is not allowed"),
        (["in.h5ad", "out.h5ad", *QUICK, "--max-epochs", "0"], "`max_epochs=0` must be at least 1"),
        (["in.h5ad", "out.h5ad", *QUICK, "--threads", "0"], "--threads 0 must be at least 1"),
        (["in.h5ad", "out.h5ad", *QUICK, "--device", "abacus"], "`device='abacus'` cannot be used"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    source, tmp_path, monkeypatch, capsys, no_training, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("text.csv").write_text("a,b")
    Path("damaged.h5ad").write_bytes(source.read_bytes()[:3000])
    Path("empty.zarr").mkdir()
    Path("link.h5ad").symlink_to("in.h5ad")
    before = {path.name: sha256(path) for path in tmp_path.iterdir()}
    assert run("impute", *arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.startswith("spaformer-sc: ")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["impute"],
        ["impute", "in.h5ad"],
        ["impute", "a", "b", "--scale", "log"],
        ["demo", "--cells", "few"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert "usage: spaformer-sc" in capsys.readouterr().err


def test_an_interrupt_exits_with_130_and_writes_nothing(source, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("spaformer_sc.training.abreast.train", interrupt)
    assert run("impute", source, tmp_path / "out.h5ad", *QUICK) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_a_warning_is_one_line_too(source, tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("impute", source, tmp_path / "out.h5ad", "--max-epochs", "1", "--quiet") == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("spaformer-sc: warning: ") and "Pass library_key='fov' if so" in line for line in lines)
    assert not any(".py:" in line for line in lines)


def test_help_reads_well(capsys):
    for arguments in ([], ["check"], ["impute"], ["demo"]):
        with pytest.raises(SystemExit) as stop:
            run(*arguments, "--help")
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "spaformer-sc impute in.h5ad out.h5ad --library-key fov" in shown
    assert 'layers["spaformer"]' in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_where_an_error_comes_from_is_shown_when_asked(tmp_path):
    with pytest.raises(FileNotFoundError):
        run("impute", tmp_path / "nowhere.h5ad", tmp_path / "out.h5ad", "--debug")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "out of memory; impute fewer genes"),
        (MemoryError("this takes 9 GiB"), "this takes 9 GiB"),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory; impute fewer genes"),
    ],
)
def test_too_little_memory_is_said_so(source, tmp_path, monkeypatch, capsys, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("spaformer_sc.training.abreast.train", fail)
    assert run("impute", source, tmp_path / "out.h5ad", *QUICK) == 1
    assert f"spaformer-sc: {message}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.h5ad"]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"spaformer-sc {sf.__version__}\n"


def test_the_console_script(source, tmp_path):
    script = shutil.which("spaformer-sc", path=str(Path(sys.executable).parent))
    assert script, "the package is not installed beside this Python"
    out = tmp_path / "out.h5ad"
    done = subprocess.run(
        [script, "impute", str(source), str(out), "--library-key", "fov", "--max-epochs", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "added 'spaformer'" in done.stderr
    assert f"wrote {out}" in done.stderr
    assert "Warning" not in done.stderr
    same(ad.read_h5ad(out), expected(source))


# --- check ------------------------------------------------------------------------------------------------------------

OF_CHECK = OF_THE_PROGRAM | {"--no-timing", "--quiet"}


def test_a_check_says_what_the_function_says(source, capsys, no_training):
    before = sha256(source)
    assert run("check", source, "--library-key", "fov", "--quality", "fast", "--no-timing") == 0
    printed = capsys.readouterr()
    adata = ad.read_h5ad(source, backed="r")
    wanted = repr(sf.pp.check(adata, library_key="fov", quality="fast", timing=False))
    # How much memory is free changes.
    assert [line for line in printed.out.splitlines() if "MiB" not in line] == [
        line for line in wanted.splitlines() if "MiB" not in line
    ]
    assert printed.err == ""
    assert sha256(source) == before
    assert [path.name for path in source.parent.iterdir()] == ["in.h5ad"]


@pytest.mark.parametrize(
    "arguments", [["--library-key", "FOV"], ["--layer", "raw"], ["--library-key", "fov", "--spatial-key", "xy"]]
)
def test_the_exit_code_of_a_check_is_that_of_impute(source, tmp_path, capsys, no_training, arguments):
    assert run("check", source, *arguments) == 1
    printed = capsys.readouterr()
    assert run("impute", source, tmp_path / "out.h5ad", *arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1].removeprefix("spaformer-sc: ")
    assert message in re.sub(r"\n +", " ", printed.out)
    assert run("check", source, *arguments, "--quiet") == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere.h5ad", "does not exist"), ("in.txt", "must end in .h5ad or .zarr")]
)
def test_what_cannot_be_read_cannot_be_checked(tmp_path, capsys, name, message):
    assert run("check", tmp_path / name) == 1
    assert message in capsys.readouterr().err


def test_options_of_a_check_are_those_of_impute(source, monkeypatch, capsys):
    received = {}

    def check(adata, **arguments):
        received.update(arguments)
        return CheckReport("", ())

    monkeypatch.setattr(sf.pp, "check", check)
    with pytest.raises(SystemExit):
        run("check", "--help")
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    options = {option: wanted for option, wanted in OPTIONS.items() if option[0] in shown - OF_CHECK}
    assert shown == {option[0] for option in options} | OF_CHECK
    assert set(inspect.signature(sf.tl.impute).parameters) >= {name for name, _ in options.values()}
    assert run("check", source, *[part for option in options for part in option], "--no-timing") == 0
    assert received == dict(options.values()) | {"timing": False}


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo(tmp_path, capsys):
    folder = tmp_path / "a folder" / "demo"
    sizes = ["--fovs", "2", "--cells", "40", "--genes", "20", "--max-epochs", "2", "--random-state", "1"]
    assert run("demo", "--output", folder, *sizes, "--quiet") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["demo.h5ad", "demo.png"]
    adata = ad.read_h5ad(folder / "demo.h5ad")
    assert adata.shape == (80, 20)
    assert contents(adata).keys() >= {*RESULTS, "layers/true_rate"}
    assert adata.uns["spaformer"]["params"]["random_state"] == 1
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:].split() for line in table.splitlines()[3:7]}
    assert rows.keys() == {"observed", "spatial neighbours", "similar cells", "spaformer_sc"}
    assert all(np.isfinite([float(value) for value in values]).all() and len(values) == 2 for values in rows.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--cells", "0"], "`n_cells=0`"), (["--max-epochs", "0"], "`max_epochs=0`"), (["--output", "file"], "file")],
)
def test_a_demo_that_cannot_be(tmp_path, monkeypatch, capsys, no_training, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert run("demo", "--fovs", "2", "--cells", "20", "--genes", "10", *arguments) == 1
    assert message in capsys.readouterr().err
    assert Path("file").read_text() == "mine"


# --- what an import loads ---------------------------------------------------------------------------------------------

HEAVY = ("torch", "torch_geometric", "scanpy", "squidpy", "spatialdata", "matplotlib", "sklearn")


@pytest.mark.parametrize(
    "code",
    ["import spaformer_sc", "import spaformer_sc; spaformer_sc.datasets; spaformer_sc.__version__; dir(spaformer_sc)"],
)
def test_an_import_is_light(code):
    tell = f"{code}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", tell], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_names_of_the_package():
    assert set(sf.__all__) <= set(dir(sf))
    for name in sf.__all__:
        assert getattr(sf, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sf.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("text", "expected"),
    [("tokens_per_step=none", ("tokens_per_step", None)), ("tokens_per_step=None", ("tokens_per_step", None)),
     ("windows=True", ("windows", True)), ("windows = false", ("windows", False)), ("n_steps=1e3", ("n_steps", 1000)),
     ("dropout=0.1", ("dropout", 0.1)), ("dispersion=entry", ("dispersion", "entry")),
     ("thinning=[0.4, 0.6]", ("thinning", [0.4, 0.6]))],
)  # fmt: skip
def test_values_of_settings_are_read_as_they_are_written_down(text, expected):
    found = cli._setting(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])
