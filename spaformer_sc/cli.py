"""Command line: ``spaformer-sc check``, ``impute`` and ``demo``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import __version__
from ._config import DECODERS, ENCODERS, GRAPHS, MASKINGS, OUTPUTS, POSITIONAL, PRESETS, QUALITIES, ZEROS
from ._read import read_zarr
from ._threads import wait_patiently
from ._write import SUFFIXES, check_path

if TYPE_CHECKING:
    from anndata import AnnData

DESCRIPTION = """\
Fill in missing gene expression in cell-resolution spatial transcriptomics (CosMx, Xenium, MERFISH, seqFISH, STARmap).

  spaformer-sc demo                                        try it on a simulated tissue
  spaformer-sc check in.h5ad --library-key fov             look at your own data: what will be done, what it takes
  spaformer-sc impute in.h5ad out.h5ad --library-key fov   impute them
"""

IMPUTE = """\
Read an AnnData with raw counts and coordinates, impute it, and write it with the results added. Of a SpatialData
(.zarr) the table is read, and written as an AnnData. The input file is not changed; the output appears whole or not at
all. Counts are read, and results written, field of view by field of view (with --layer, all at once). What an
unfinished run has done stays in OUT.partial, from where --resume goes on.

Added: layers["spaformer"] (imputed expression), obsm["X_spaformer"] (latent space), var["spaformer_*"] and
obs["spaformer_*"] (held-out scores of genes and cells), uns["spaformer"] (parameters, training history, other scores).
"""

CHECK = """\
Read an AnnData with raw counts and coordinates, and print what is in it, what impute with the same options will do, and
what memory and time that takes. Nothing is written.

Exit code: 0 if impute takes the data, 1 if not (or if IN cannot be read), 2 for options that do not exist.
"""


def _names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _setting(text: str) -> tuple[str, Any]:
    """``name=value``, the value as in JSON; also none, true and false as Python spells them; else a string."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    words = {"none": None, "null": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        return name, value
    return name, int(found) if isinstance(found, float) and found.is_integer() else found


def _add_where(command: argparse.ArgumentParser) -> None:
    """Options that say where the data are."""
    where = command.add_argument_group("where the data are")
    where.add_argument("--table-key", metavar="NAME", help="table of a SpatialData, where there are several")
    where.add_argument(
        "--library-key",
        action="append",
        metavar="COLUMN",
        help="obs column that names the field of view of each cell; give it twice for slide and fov. Without it the "
        "slide is one image, tiled where large",
    )
    where.add_argument("--spatial-key", default="spatial", metavar="KEY", help="coordinates in obsm (default: spatial)")
    where.add_argument("--connectivity-key", metavar="KEY", help="use this graph in obsp in place of building one")
    where.add_argument("--layer", metavar="NAME", help="layer of raw counts (default: X)")
    where.add_argument("--missing", metavar="NAME", help="layer that is True where a gene was not measured in a cell")


def _add_model(command: argparse.ArgumentParser) -> None:
    """Options that say what the model is."""
    model = command.add_argument_group("the model")
    model.add_argument(
        "--quality",
        choices=QUALITIES,
        default="default",
        help="networks that are averaged: fast 1, default 5, best 10",
    )
    model.add_argument("--preset", choices=PRESETS, default="default", help="paper: the configuration of the paper")
    model.add_argument(
        "--positional",
        type=_names,
        metavar="A,B",
        help=f"positional encodings, out of {', '.join(POSITIONAL)}; or none (default: auto)",
    )
    model.add_argument(
        "--encoder", choices=("auto", *ENCODERS), default="auto", help="exchange between cells (default: auto)"
    )
    model.add_argument("--decoder", choices=("auto", *DECODERS), default="auto", help="likelihood (default: auto)")
    model.add_argument("--variational", action="store_true", help="train as a variational autoencoder")
    model.add_argument(
        "--masking",
        type=_names,
        metavar="A,B",
        help=f"what is hidden in training, out of {', '.join(MASKINGS)} (default: auto)",
    )
    model.add_argument("--n-latent", type=int, metavar="N", help="dimensions of the latent space (default: 64)")
    model.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        dest="settings",
        metavar="NAME=VALUE",
        help="any further choice, such as --set hops=0; once for each; see docs/settings.md",
    )
    model.add_argument("--graph", choices=GRAPHS, default="knn", help="spatial graph (default: knn)")
    model.add_argument("--n-neighbors", type=int, default=6, metavar="N", help="neighbours of knn (default: 6)")
    model.add_argument("--radius", type=float, metavar="R", help="radius of radius, in the unit of the coordinates")
    model.add_argument("--max-epochs", type=int, metavar="N", help="most passes over all cells (default: automatic)")
    model.add_argument("--tile-size", type=int, default=4000, metavar="N", help="most cells of a tile (default: 4000)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spaformer-sc", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"spaformer-sc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    impute = commands.add_parser(
        "impute",
        help="impute an .h5ad or .zarr file",
        usage="%(prog)s IN OUT [--library-key COLUMN] [options]",
        description=IMPUTE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    impute.add_argument("input", metavar="IN", help="AnnData with raw counts, or SpatialData: .h5ad or .zarr")
    impute.add_argument("output", metavar="OUT", help="where the result goes: .h5ad or .zarr")
    _add_where(impute)
    what = impute.add_argument_group("what is written")
    what.add_argument(
        "--scale",
        "--output",
        dest="scale",
        choices=OUTPUTS,
        default="lognorm",
        help="scale of the result (default: lognorm)",
    )
    what.add_argument(
        "--target-sum", type=float, metavar="N", help="library size for lognorm and rate (default: median)"
    )
    what.add_argument("--genes", type=_names, metavar="A,B,C", help="write only these genes (default: all)")
    what.add_argument(
        "--zeros", choices=ZEROS, default="impute", help="keep: zeros that a second look would find again stay 0"
    )
    what.add_argument("--sd", action="store_true", help="also write a layer of standard deviations")
    what.add_argument(
        "--key-added", default="spaformer", metavar="KEY", help="name of the results (default: spaformer)"
    )
    _add_model(impute)
    run = impute.add_argument_group("the run")
    run.add_argument("--random-state", type=int, default=0, metavar="SEED", help="seed of everything random")
    run.add_argument(
        "--resume", action="store_true", help="go on with an unfinished run to the same OUT, if there is one"
    )
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: auto)")
    run.add_argument(
        "--devices", type=int, default=1, metavar="N", help="GPUs or processes that train together (default: 1)"
    )
    run.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    run.add_argument("--quiet", action="store_true", help="no progress bar and no messages but warnings")
    run.add_argument("--debug", action="store_true", help="show where an error comes from")

    check = commands.add_parser(
        "check",
        help="look at an .h5ad or .zarr file: can it be imputed, how, and what does it take?",
        usage="%(prog)s IN [--library-key COLUMN] [options]",
        description=CHECK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("input", metavar="IN", help="AnnData with raw counts, or SpatialData: .h5ad or .zarr")
    _add_where(check)
    _add_model(check)
    run = check.add_argument_group("the check")
    run.add_argument("--no-timing", action="store_true", help="do not train for a moment to estimate the time of a run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default: auto)")
    run.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    run.add_argument("--quiet", action="store_true", help="print nothing; the exit code tells")
    run.add_argument("--debug", action="store_true", help="show where an error comes from")

    demo = commands.add_parser(
        "demo",
        help="simulate a tissue, impute it, score it against the truth, save figure and data",
        description="Simulate a tissue, impute it, compare with the truth and with two plain baselines, and save the "
        "AnnData (demo.h5ad) and a figure (demo.png).",
    )
    demo.add_argument("--output", default="spaformer_demo", metavar="FOLDER", help="default: spaformer_demo")
    demo.add_argument("--fovs", type=int, default=4, metavar="N", help="fields of view (default: 4)")
    demo.add_argument("--cells", type=int, default=600, metavar="N", help="cells per field of view (default: 600)")
    demo.add_argument("--genes", type=int, default=300, metavar="N", help="genes (default: 300)")
    demo.add_argument("--max-epochs", type=int, metavar="N", help="most passes over all cells (default: automatic)")
    demo.add_argument("--random-state", type=int, default=0, metavar="SEED")
    demo.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    demo.add_argument("--debug", action="store_true", help="show where an error comes from")
    demo.add_argument("--quiet", action="store_true", help="no progress bar and no messages but warnings")
    return parser


def _read(path: str, table_key: str | None) -> AnnData:
    import anndata

    from ._checks import NO_TABLES

    source = Path(path)
    if source.suffix not in SUFFIXES:
        raise ValueError(f"`IN={path!r}` must end in .h5ad or .zarr.")
    if not source.exists():
        raise FileNotFoundError(f"`IN={path!r}` does not exist.")
    try:
        if source.suffix == ".h5ad":
            if table_key is not None:
                raise ValueError(NO_TABLES.format(table_key, "an AnnData"))
            return anndata.read_h5ad(source, backed="r")
        return read_zarr(source, table_key)
    except Exception as error:  # whatever a damaged file makes of h5py, zarr and anndata
        raise ValueError(f"`IN={path!r}` cannot be read as an AnnData: {_said(error)}") from error


def _said(error: BaseException) -> object:
    """Message of an error; that of a KeyError without the quotes that its `str` has."""
    return error.args[0] if isinstance(error, KeyError) and error.args else error


def _impute(arguments: argparse.Namespace) -> int:
    from . import tl

    check_path("OUT", arguments.output)
    if Path(arguments.output).resolve() == Path(arguments.input).resolve():
        raise ValueError(f"`OUT={arguments.output!r}` is the input file, which is not changed; choose another name.")
    adata = _read(arguments.input, arguments.table_key)
    tl.impute(
        adata,
        **_chosen(arguments),
        genes=arguments.genes,
        output=arguments.scale,
        target_sum=arguments.target_sum,
        zeros=arguments.zeros,
        sd=arguments.sd,
        key_added=arguments.key_added,
        random_state=arguments.random_state,
        devices=arguments.devices,
        progress=False if arguments.quiet else None,
        output_path=arguments.output,
        resume=arguments.resume,
    )
    return 0


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where the data are, and what the model is, as arguments of a function."""
    key, positional = arguments.library_key, arguments.positional
    names = (
        *("spatial_key", "connectivity_key", "layer", "missing", "quality", "preset", "variational", "n_latent"),
        *("tile_size", "encoder", "decoder", "graph", "n_neighbors", "radius", "max_epochs", "device"),
    )
    return {
        **{name: getattr(arguments, name) for name in names},
        "library_key": key[0] if key and len(key) == 1 else key,
        "positional": "auto" if positional is None else None if positional == ["none"] else positional,
        "masking": arguments.masking or "auto",
        "settings": dict(arguments.settings) or None,
    }


def _check(arguments: argparse.Namespace) -> int:
    from . import pp

    report = pp.check(_read(arguments.input, arguments.table_key), **_chosen(arguments), timing=not arguments.no_timing)
    if not arguments.quiet:
        print(report)
    return 0 if report.ok else 1


def _demo(arguments: argparse.Namespace) -> int:
    from ._demo import run_demo

    run_demo(
        Path(arguments.output),
        n_fovs=arguments.fovs,
        n_cells=arguments.cells,
        n_genes=arguments.genes,
        max_epochs=arguments.max_epochs,
        random_state=arguments.random_state,
        progress=not arguments.quiet,
    )
    return 0


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning without the line of code that it comes from."""
    print(f"spaformer-sc: warning: {message}", file=sys.stderr)


class _Terminated(BaseException):
    """SIGTERM has come."""


@contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Let SIGTERM end what is done here like Ctrl-C, so that nothing half written stays behind."""
    if threading.current_thread() is not threading.main_thread():  # where no signals arrive
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one is not to stop the clearing up
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    Exit code: 0 done, 1 it cannot be done (message on stderr), 2 wrong arguments, 130 interrupted, 143 terminated.
    """
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.WARNING if arguments.quiet else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in ("matplotlib", "fontTools", "numexpr", "numba", "PIL", "dask", "distributed", "xarray_schema"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    wait_patiently()
    try:
        if arguments.threads is not None:
            import torch

            if arguments.threads < 1:
                raise ValueError(f"--threads {arguments.threads} must be at least 1.")
            torch.set_num_threads(arguments.threads)
        with warnings.catch_warnings(), _terminated_in_order():
            warnings.showwarning = _show_warning
            return {"check": _check, "impute": _impute, "demo": _demo}[arguments.command](arguments)
    except (ImportError, KeyError, TypeError, ValueError, OSError, RuntimeError, MemoryError) as error:
        if arguments.debug:
            raise
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            said = str(error) if isinstance(error, MemoryError) else ""
            print(
                f"spaformer-sc: {said or 'out of memory; impute fewer genes, or a part of the cells.'}", file=sys.stderr
            )
            return 1
        message = _said(error)
        # What HDF5 tells of its insides has the cause in the middle.
        if cause := re.search(r"file write failed.*?errno = (\d+)", str(error), re.DOTALL):
            message = f"{os.strerror(int(cause[1]))}."
        print(f"spaformer-sc: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("spaformer-sc: interrupted.", file=sys.stderr)
        return 130
    except _Terminated:
        print("spaformer-sc: terminated.", file=sys.stderr)
        return 143


def program() -> None:
    """Run the command line as a process of its own, and end it.

    Where HDF5 could not write to a file, as on a full disk, it crashes at the end of the process, and takes the exit
    code with it.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    program()
