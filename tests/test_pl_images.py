"""Figures against reference images, in ``tests/images``.

Results are made up, so that only drawing is tested, without text and in a layout that does not depend on it: that
matplotlib 3.10 and 3.11 draw alike. ``tests/test_pl.py`` reads the text. After a wanted change, draw the references
anew and look at each: ``python -m tests.test_pl_images``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.legend import Legend
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text
from PIL import Image

import spaformer_sc as sf
from tests import made_up

pytestmark = pytest.mark.usefixtures("unseen")

REFERENCES = Path(__file__).parent / "images"
TOLERANCE = 4.0
"""Root mean square of differences of pixels, of 255."""


def blank(figsize: tuple[float, float]):
    return plt.figure(figsize=figsize, dpi=60)


def on_axes(plot, data, **choices):
    figure = blank((4, 3.2))
    plot(data, ax=figure.add_axes((0.15, 0.15, 0.8, 0.7)), **choices)
    return figure


def on_figure(plot, *data, figsize=(7, 3.6), **choices):
    figure = blank(figsize)
    plot(*data, fig=figure, **choices)
    return figure


def influence(**choices):
    adata = made_up.result()
    return on_figure(sf.pl.influence, adata, made_up.attribution(adata), **choices)


FIGURES = {
    "imputed": lambda **c: on_figure(sf.pl.imputed, made_up.result(), ["gene3", "gene20"], **c),
    "imputed_one_fov": lambda **c: on_figure(sf.pl.imputed, made_up.result(), "gene3", fov="right", **c),
    "reliability": lambda **c: on_axes(sf.pl.reliability, made_up.result(), **c),
    "calibration": lambda **c: on_axes(sf.pl.calibration, made_up.result(), **c),
    "history": lambda **c: on_axes(sf.pl.history, made_up.result(), **c),
    "encodings_signed": lambda **c: on_figure(sf.pl.encodings, made_up.with_encodings(), "laplacian", **c),
    "encodings_unsigned": lambda **c: on_figure(sf.pl.encodings, made_up.with_encodings(), "random_walk", **c),
    "influence": influence,
    "reach": lambda **c: on_axes(sf.pl.reach, made_up.reach(), **c),
}


def drawn(name: str, path: Path, **choices) -> Path:
    """Draw a figure in matplotlib's own style, without text and legends, which differ between versions."""
    with plt.style.context("default", after_reset=True):
        figure = FIGURES[name](**choices)
        for words in [*figure.findobj(Text), *figure.findobj(Legend)]:
            words.set_visible(False)
        figure.savefig(path, dpi=60, metadata={"Software": None})
        plt.close(figure)
    return path


@pytest.mark.parametrize("name", FIGURES)
def test_looks_like_its_reference(name: str, tmp_path: Path) -> None:
    difference = compare_images(REFERENCES / f"{name}.png", drawn(name, tmp_path / f"{name}.png"), TOLERANCE)
    assert difference is None, difference


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("imputed", {"cmap": "magma"}),
        ("imputed_one_fov", {"cmap": "cividis"}),
        ("encodings_signed", {"cmap": "RdBu"}),
        ("encodings_unsigned", {"cmap": "magma"}),
        ("influence", {"cmap": "PiYG"}),
    ],
)
def test_another_colour_map_is_found(name: str, choices: dict, tmp_path: Path) -> None:
    assert compare_images(REFERENCES / f"{name}.png", drawn(name, tmp_path / f"{name}.png", **choices), TOLERANCE)


@pytest.mark.parametrize("name", ["reliability", "calibration", "history", "reach"])
def test_missing_lines_and_points_are_found(name: str, tmp_path: Path, monkeypatch) -> None:
    def without(figure, *_):
        for artist in [*figure.axes[0].lines, *figure.axes[0].collections]:
            artist.remove()

    for module in (sf.pl._plots, sf.pl._influence):
        monkeypatch.setattr(module, "finish", without)
    assert compare_images(REFERENCES / f"{name}.png", drawn(name, tmp_path / f"{name}.png"), TOLERANCE)


if __name__ == "__main__":
    mpl.use("Agg")
    REFERENCES.mkdir(exist_ok=True)
    for name in FIGURES:
        path = drawn(name, REFERENCES / f"{name}.png")
        Image.open(path).convert("RGB").save(path, optimize=True)
        print(path)
