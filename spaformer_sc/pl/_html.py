"""Pieces of a page in HTML that needs nothing but itself: tables, images in it, numbers."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THEMES = {"light": ("#1f2326", "#ffffff"), "dark": ("#e4e6e7", "#16191c")}
"""Colours of ink and ground, as in ``report.css``."""
INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
GROUND = ("figure.facecolor", "axes.facecolor", "legend.facecolor", "savefig.facecolor")
DPI = 144


def page(title: str, body: str) -> str:
    """A whole page."""
    style = files("spaformer_sc.pl").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], name: str, kind: str = "", numbers: Collection[int] = ()
) -> str:
    """A table that scrolls within its box.

    Parameters
    ----------
    head
        Names of the columns.
    rows
        Cells as HTML; the first of each row is its heading.
    name
        What the table is, for those who do not see it.
    kind
        Further classes of ``report.css``: ``tall``, ``long`` (printed in part), ``stack`` (of prose).
    numbers
        Columns that hold numbers.
    """
    kinds = [' class="n"' if column in numbers else "" for column in range(len(head))]
    top = "".join(f'<th scope="col"{of}>{escape(text)}</th>' for text, of in zip(head, kinds, strict=True))
    body = []
    for first, *others in rows:
        cells = "".join(f"<td{of}>{cell}</td>" for cell, of in zip(others, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>\n')
    return (
        f'<div class="box {kind}" role="region" aria-label="{escape(name)}" tabindex="0">\n'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def chart(draw: Callable[[Axes], Any], alt: str, caption: str) -> str:
    """A drawing in the colours of both themes, with a caption."""
    light, dark = (png(draw, (5.8, 4), theme) for theme in THEMES)
    source = f'<source srcset="{dark}" media="screen and (prefers-color-scheme: dark)">'
    return f"<figure><picture>{source}{_img(light, (5.8, 4), alt)}</picture>{_caption(caption)}</figure>\n"


def picture(draw: Callable[[Axes], Any], size: tuple[float, float], alt: str, caption: str) -> str:
    """A drawing of a given size in inches, on white in both themes, with a caption."""
    return f'<figure class="paper">{_img(png(draw, size, "light"), size, alt)}{_caption(caption)}</figure>'


def png(draw: Callable[[Axes], Any], size: tuple[float, float], theme: str) -> str:
    """A drawing as the address of an image that holds the image itself."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    ink, ground = THEMES[theme]
    colours = dict.fromkeys(INK, ink) | dict.fromkeys(GROUND, ground)
    with style.context({**colours, "axes.spines.top": False, "axes.spines.right": False}, after_reset=True):
        figure = Figure(size, layout="constrained", dpi=DPI)
        canvas = FigureCanvasAgg(figure)
        draw(figure.subplots())
        canvas.draw()
    few = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256)  # a third of the size
    file = io.BytesIO()
    few.save(file, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _img(source: str, size: tuple[float, float], alt: str) -> str:
    width, height = (round(96 * side) for side in size)
    return f'<img src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>"


def number(value: float) -> str:
    """A whole number with commas."""
    return f"{int(value):,}"


def signed(value: float, error: float) -> str:
    """A number with its sign and its standard error."""
    return f"{value:+.3f} ± {error:.3f}".replace("-", "\N{MINUS SIGN}") if np.isfinite(value) else "–"


def some(names: Sequence[str], most: int = 10) -> str:
    """Names in one line, cut after ``most``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
