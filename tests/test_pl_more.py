"""Plots: where they draw, what becomes of the figure, colours, encodings in space, what moved a value."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import spaformer_sc as sf
from spaformer_sc.pl import _drawing
from tests import made_up
from tests.conftest import contents

pytestmark = pytest.mark.usefixtures("unseen")

ON_AXES = ("reliability", "calibration", "history", "reach")
ON_FIGURES = ("imputed", "encodings", "influence")


def call(name: str, **choices):
    adata = made_up.with_encodings()
    others = {"imputed": ["gene3"], "encodings": ["laplacian"], "influence": [made_up.attribution(adata)]}
    data = [made_up.reach()] if name == "reach" else [adata, *others.get(name, [])]
    return getattr(sf.pl, name)(*data, **choices)


@pytest.fixture
def shown(unseen, monkeypatch):
    """How often figures were shown, where scanpy is set to show them."""
    from scanpy import settings

    settings.autoshow, calls = True, []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: calls.append(1))
    return calls


# --- axes, figures, show, save ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_AXES)
def test_draws_on_the_axes_that_are_given(name: str, shown) -> None:
    import matplotlib.pyplot as plt

    ax = Figure().subplots()
    assert call(name, ax=ax) is ax
    assert ax.has_data()
    assert not plt.get_fignums()
    assert not shown
    with pytest.raises(TypeError, match=r"`ax` must be the axes to draw on, or None, not Figure\. For several panels"):
        call(name, ax=ax.figure)


@pytest.mark.parametrize("name", ON_FIGURES)
def test_draws_on_the_figure_or_subfigure_that_is_given(name: str, shown) -> None:
    import matplotlib.pyplot as plt

    for figure in (Figure(), Figure(layout="constrained").subfigures(1, 2)[1]):
        axes = np.ravel(call(name, fig=figure))
        assert all(ax.figure is figure for ax in axes)
    assert not plt.get_fignums()
    assert not shown
    with pytest.raises(TypeError, match="`fig` must be a figure or subfigure"):
        call(name, fig=axes[0])


@pytest.mark.parametrize("name", [*ON_AXES, *ON_FIGURES])
def test_shows_as_scanpy_is_set_to(name: str, shown) -> None:
    from scanpy import settings

    for autoshow, show, times in ((False, None, 0), (False, True, 1), (True, False, 0), (True, None, 1)):
        settings.autoshow = autoshow
        shown.clear()
        call(name, show=show)
        assert len(shown) == times


@pytest.mark.parametrize("name", [*ON_AXES, *ON_FIGURES])
def test_saves_in_the_format_of_the_ending(name: str, tmp_path: Path, shown) -> None:
    for ending, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        call(name, save=tmp_path / f"plot{ending}")
        assert (tmp_path / f"plot{ending}").read_bytes().startswith(start)
    assert not shown
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match=r"`save='plot\.xls'` must end in \.eps"):
        call(name, save="plot.xls")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        call(name, save=tmp_path / "nowhere" / "plot.png")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "plot.png"
    path.write_text("old")
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("history", save=path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["reliability", "calibration", "history", *ON_FIGURES])
def test_data_stay_as_they_are(name: str) -> None:
    adata = made_up.with_encodings()
    before = contents(adata)
    extra = {"imputed": ["gene3"], "encodings": ["laplacian"], "influence": [made_up.attribution(adata)]}.get(name, [])
    getattr(sf.pl, name)(adata, *extra, show=False)
    assert contents(adata) == before


# --- colours ----------------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1, of linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    "none": np.eye(3),
}


def lab(colour: str, blindness: str) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    rgb = np.asarray(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.asarray(BLIND[blindness]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("blindness", BLIND)
def test_verdicts_differ_in_colour_for_everybody_and_in_marker(blindness: str) -> None:
    colours = [lab(colour, blindness) for colour, _ in _drawing.VERDICTS.values()]
    assert min(np.linalg.norm(one - other) for one, other in combinations(colours, 2)) > 25
    assert len({marker for _, marker in _drawing.VERDICTS.values()}) == 3


def test_red_and_green_of_one_lightness_would_be_found() -> None:
    assert np.linalg.norm(lab("#c05a3a", "deuteranopia") - lab("#7f7f20", "deuteranopia")) < 25


@pytest.mark.parametrize("blindness", BLIND)
def test_ends_of_signed_values_differ_for_everybody(blindness: str) -> None:
    low, middle, high = (lab(mpl.colors.to_hex(mpl.colormaps[_drawing.SIGNED](x)), blindness) for x in (0.0, 0.5, 1.0))
    assert min(np.linalg.norm(one - other) for one, other in combinations((low, middle, high), 2)) > 30


def test_lines_differ_in_style_as_well() -> None:
    for name in ("calibration", "history"):
        lines = [line for line in call(name).lines if line.get_label()[0] != "_"]
        assert len({line.get_linestyle() for line in lines}) == len(lines)


# --- where cells lie --------------------------------------------------------------------------------------------------


def test_fields_with_coordinates_of_their_own_are_drawn_apart() -> None:
    places = np.tile(np.random.default_rng(0).random((50, 2)), (3, 1))
    codes = np.repeat([0, 1, 2], 50)
    moved = _drawing.apart(places, codes)
    for field in range(3):
        shift = (moved - places)[codes == field]
        np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-12)
    boxes = [(moved[codes == field].min(axis=0), moved[codes == field].max(axis=0)) for field in range(3)]
    for (low, high), (low2, high2) in combinations(boxes, 2):
        assert ((high < low2) | (high2 < low)).any()


def test_only_fields_on_top_of_one_another_are_moved(caplog) -> None:
    adata = made_up.result()
    shown = np.asarray(sf.pl.imputed(adata, "gene3")[0, 0].collections[0].get_offsets())
    assert sorted(map(tuple, shown)) == sorted(map(tuple, adata.obsm["spatial"]))
    assert not caplog.text
    adata.obsm["global"] = adata.obsm["spatial"].copy()
    adata.obsm["spatial"][(adata.obs["fov"] == "right").to_numpy(), 0] -= 120
    shown = np.asarray(sf.pl.imputed(adata, "gene3")[0, 0].collections[0].get_offsets())
    assert len(np.unique(shown, axis=0)) == adata.n_obs
    assert "fields of view are drawn beside one another" in caplog.text
    shown = np.asarray(sf.pl.imputed(adata, "gene3", spatial_key="global")[0, 0].collections[0].get_offsets())
    assert sorted(map(tuple, shown)) == sorted(map(tuple, adata.obsm["global"]))


def test_a_column_of_fields_that_is_gone() -> None:
    adata = made_up.result()
    del adata.obs["fov"]
    with pytest.raises(KeyError, match=r"`library_key='fov'` is not in `adata\.obs`"):
        sf.pl.imputed(adata, "gene3")


# --- encodings --------------------------------------------------------------------------------------------------------


def test_each_component_has_a_panel_with_its_values() -> None:
    adata = made_up.with_encodings()
    axes = sf.pl.encodings(adata, "laplacian")
    assert [ax.get_title() for ax in axes] == ["eigenvector 1", "eigenvector 2", "eigenvector 3"]
    for ax, values in zip(axes, adata.obsm["X_pe_laplacian"].T, strict=True):
        np.testing.assert_array_equal(np.sort(ax.collections[0].get_array()), np.sort(values.astype(float)))
        low, high = ax.collections[0].get_clim()
        assert low == -high == -np.abs(values).max()


def test_components_and_field_are_chosen() -> None:
    adata = made_up.with_encodings()
    (ax,) = sf.pl.encodings(adata, "laplacian", components=2, fov="left")
    of = (adata.obs["fov"] == "left").to_numpy()
    assert ax.get_title() == "eigenvector 3"
    np.testing.assert_allclose(np.sort(ax.collections[0].get_array()), np.sort(adata.obsm["X_pe_laplacian"][of, 2]))
    with pytest.raises(KeyError, match="none of the fields of view: left, right"):
        sf.pl.encodings(adata, "laplacian", fov="middle")
    with pytest.raises(ValueError, match="3 is none of the 3 columns"):
        sf.pl.encodings(adata, "laplacian", components=[0, 3])
    with pytest.raises(ValueError, match="names no column"):
        sf.pl.encodings(adata, "laplacian", components=[])
    with pytest.raises(KeyError, match="there are: X_pe_laplacian, X_pe_random_walk"):
        sf.pl.encodings(adata, "patch")


@pytest.mark.parametrize("name", ["linear", "patch", "sinusoidal", "fourier", "conditional", "signnet", "random_walk"])
def test_every_encoding_that_is_written_can_be_drawn(name: str, tissue) -> None:
    sf.pp.positional_encoding(tissue, name, library_key="fov", k=3, key_added="mine")
    axes = sf.pl.encodings(tissue, "mine", ncols=3)
    titles = [ax.get_title() for ax in axes]
    n = tissue.obsm["mine"].shape[1]
    assert len(set(titles)) == len(axes) == min(n, 12)
    if name == "sinusoidal":
        assert titles[0] == "sin x, wavelength 1 of 3"
        assert titles[-1] == "cos y, wavelength 3 of 3"
    if name == "random_walk":
        assert axes[0].collections[0].get_clim() == (0, 1)  # nobody is back after one step


# --- what moved a value -----------------------------------------------------------------------------------------------


def test_neighbours_lie_around_the_cell_in_colours_centred_on_zero() -> None:
    adata = made_up.result()
    found = made_up.attribution(adata)
    ax, bars = sf.pl.influence(adata, found, n_genes=4)
    points, *_, rings, star = ax.collections  # squidpy adds its points twice
    low, high = points.get_clim()
    assert low == -high
    assert rings.get_offsets().shape[0] == (found.neighbours["hops"] == 1).sum() == 8
    np.testing.assert_array_equal(star.get_offsets(), [[0, 0]])
    inside = points.get_offsets()
    assert np.abs(inside).max() < ax.get_xlim()[1]
    place = dict(zip(map(tuple, inside.round(6).tolist()), np.asarray(points.get_array()), strict=True))
    for name, contribution in found.neighbours["contribution"].items():
        apart = adata[name].obsm["spatial"][0] - adata[found.cell].obsm["spatial"][0]
        if tuple(apart.tolist()) in place:
            assert place[tuple(apart.tolist())] == contribution
    assert [text.get_text() for text in bars.get_yticklabels()] == list(found.own.abs().nlargest(4).index)
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], found.own[found.own.abs().nlargest(4).index])
    said = ax.figure.get_suptitle()
    assert said.startswith("gene3 in cell150, log rate: baseline −3.00, own counts +0.26")


def test_share_in_view_grows_with_the_window() -> None:
    adata = made_up.result()
    found = made_up.attribution(adata)

    def share(radius: float) -> int:
        title = sf.pl.influence(adata, found, radius=radius)[0].get_title()
        return int(title.split("(")[1].split("%")[0])

    assert share(12) < share(25) < share(1000) == 100


def test_a_window_without_neighbours_is_empty() -> None:
    adata = made_up.result()
    ax, _ = sf.pl.influence(adata, made_up.attribution(adata), radius=1)
    assert not len(ax.collections[0].get_offsets())
    assert "(0% of their influence in view)" in ax.get_title()


def test_neighbours_in_the_place_of_the_cell_are_drawn() -> None:
    adata = made_up.result()
    found = made_up.attribution(adata)
    near = found.neighbours.index[found.neighbours["hops"] <= 2]
    adata.obsm["spatial"][adata.obs_names.get_indexer(near)] = adata[found.cell].obsm["spatial"]
    ax, _ = sf.pl.influence(adata, found)
    assert ax.get_xlim() == (-1, 1)
    assert len(ax.collections[0].get_offsets()) == len(near)


def test_influence_refuses_what_does_not_fit() -> None:
    adata = made_up.result()
    found = made_up.attribution(adata)
    with pytest.raises(TypeError, match=r"must be what sf\.tl\.attribution.*not list; pass one of the list"):
        sf.pl.influence(adata, [found])
    with pytest.raises(KeyError, match=r"1 of its cells are not in `adata\.obs_names`: cell150"):
        sf.pl.influence(adata[adata.obs_names != "cell150"].copy(), found)
    with pytest.raises(KeyError, match=r"`spatial_key='places'` is not in `adata\.obsm`"):
        sf.pl.influence(adata, found, spatial_key="places")
    with pytest.raises(ValueError, match=r"`radius=-1`|`radius"):
        sf.pl.influence(adata, found, radius=-1)
    twice = adata.copy()
    twice.obs_names = ["cell"] * twice.n_obs
    with pytest.raises(ValueError, match="are not unique"):
        sf.pl.influence(twice, found)


def test_reach_marks_half_and_nine_tenths() -> None:
    found = made_up.reach()
    ax = sf.pl.reach(found)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), 100 * found.curve["attribution"])
    assert [tuple(float(v[0]) for v in line.get_data()) for line in ax.lines[2:]] == [(21, 50), (69, 90)]
    with pytest.raises(TypeError, match=r"what sf\.tl\.reach"):
        sf.pl.reach(made_up.result())
    empty = type(found)(found.curve.iloc[:0], np.nan, np.nan, 1.0, found.cells)
    with pytest.raises(ValueError, match="nothing to draw"):
        sf.pl.reach(empty)


def test_a_real_attribution_is_drawn(tissue, fitted) -> None:
    found = sf.tl.attribution(tissue, fitted, tissue.var_names[0], 5, n_steps=2)
    ax, bars = sf.pl.influence(tissue, found)
    assert len(bars.patches) == 10
    assert 0 < len(ax.collections[0].get_offsets()) < 60
    sf.pl.reach(sf.tl.reach(tissue, fitted, n_cells=2, n_steps=2))
