"""Images that lie on top of each other, and images that adjoin."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from spaformer_sc import _checks
from spaformer_sc.data._overlap import Neighbours


def squares(corners, n_cells, seed=0):
    """Cells in squares of side 1 with these lower left corners: positions, and the square of each."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(len(corners)), n_cells)
    return np.asarray(corners, dtype=float)[images] + rng.random((len(images), 2)), images


def overlaid(coordinates, images, codes=None):
    return Neighbours(coordinates, np.zeros(len(images), int) if codes is None else codes).overlaid(images)


@pytest.mark.parametrize("n_cells", [1, 4, 20, 500])
def test_adjoining_images_do_not_overlap(n_cells):
    assert overlaid(*squares([(0, 0), (1, 0), (0, 1), (1, 1)], n_cells)) == 0


@pytest.mark.parametrize("n_images", [2, 5, 30])
def test_images_on_top_of_each_other(n_images):
    found = overlaid(*squares([(0, 0)] * n_images, 2000))
    assert found == pytest.approx(0.81, abs=0.04)  # 0.9 of each axis is the middle


def test_a_small_image_on_a_large_one():
    (large, _), (small, _) = squares([(0, 0)], 2000), squares([(0, 0)], 60, seed=1)
    images = np.repeat([0, 1], [2000, 60])
    assert overlaid(np.concatenate([large, small]), images) > 0.6
    assert overlaid(np.concatenate([large, np.add(small, (1, 0))]), images) == 0


def test_overlap_depends_neither_on_order_nor_on_names_nor_on_unit():
    coordinates, images = squares([(0, 0), (0.4, 0.1), (2, 0)], 200)
    found = overlaid(coordinates, images)
    assert 0.1 < found < 0.5
    order = np.random.default_rng(0).permutation(len(images))
    names = np.array([7, 3, 40])
    assert overlaid(1000 * coordinates[order] - 5, names[images][order]) == pytest.approx(found)


def test_only_images_of_one_field_are_compared():
    coordinates, images = squares([(0, 0), (0, 0), (3, 0)], 100)
    assert overlaid(coordinates, images, codes=images) == 0
    assert overlaid(coordinates, images, codes=np.array([0, 1, 1])[images]) == 0
    assert overlaid(coordinates, images, codes=np.array([0, 0, 1])[images]) > 0.6


def test_sections_at_different_heights_are_apart():
    coordinates, images = squares([(0, 0), (0, 0)], 200)
    assert overlaid(np.column_stack([coordinates, images]), images) == 0


@pytest.mark.parametrize("n_cells", [1, 2])
def test_few_cells(n_cells):
    coordinates, images = squares([(0, 0)], n_cells)
    assert overlaid(coordinates, images) == 0
    assert overlaid(np.zeros((2, 2)), np.array([0, 1])) >= 0


# --- what is made of it -----------------------------------------------------------------------------------------------


def slide(corners, **obs):
    coordinates, images = squares(corners, 80)
    adata = ad.AnnData(np.ones((len(images), 2), np.float32), obsm={"spatial": coordinates})
    adata.obs_names = [f"cell{i}" for i in range(len(images))]
    for name, labels in obs.items():
        adata.obs[name] = pd.Categorical(np.array(labels)[images])
    return adata


def check(adata, library=None, key="spatial"):
    codes = np.zeros(adata.n_obs, int) if library is None else adata.obs.groupby(library, observed=True).ngroup()
    _checks.check_images_apart(adata, key, np.asarray(adata.obsm[key]), np.asarray(codes), library)


def test_fields_of_view_are_refused_samples_warned_about():
    stacked = [(0, 0)] * 3
    with pytest.raises(
        ValueError, match=r"the 3 images that `adata\.obs\['FOV'\]` .* Pass library_key='FOV'\. If they"
    ):
        check(slide(stacked, FOV=list("abc")))
    with pytest.warns(UserWarning, match=r"the 3 images that `adata\.obs\['sample'\]` .* Pass library_key='sample'\.$"):
        check(slide(stacked, sample=list("abc")))
    check(slide(stacked, cell_type=list("abc")))
    check(slide(stacked, FOV=list("abc")), ["FOV"])
    check(slide([(0, 0), (1, 0), (2, 0)], FOV=list("abc")))


def thirds(rng):
    """Fields in a square; a third of each was taken again by each of the next."""
    images = np.repeat(range(36), 100)
    return np.stack([images % 6, images // 6], axis=1) + 1.33 * rng.random((3600, 2)), images


def strays(rng):
    """Cells of one field, three of which have another label."""
    return rng.random((2000, 2)), np.arange(2000) < 3


def cores(rng):
    """Small fields whose numbers start again in each of many pieces of tissue."""
    piece, image = np.divmod(np.repeat(range(36 * 9), 8), 9)
    corners = np.stack([6 * (piece % 6) + image % 3, 6 * (piece // 6) + image // 3], axis=1)
    return corners + rng.random(corners.shape), image


@pytest.mark.parametrize("of", [thirds, strays, cores])
def test_fields_of_view_that_overlap_in_part_are_not_refused(of):
    coordinates, images = of(np.random.default_rng(0))
    adata = ad.AnnData(np.ones((len(images), 2), np.float32), obsm={"spatial": coordinates})
    adata.obs["fov"] = images
    with pytest.warns(UserWarning, match=r"the \d+ images that `adata\.obs\['fov'\]` .* Pass library_key='fov'\.$"):
        check(adata)


def test_fields_of_view_within_the_slides_that_were_named():
    adata = slide([(0, 0)] * 4, slide=list("aabb"), fov=list("1212"))
    with pytest.raises(ValueError, match=r"Pass library_key=\['slide', 'fov'\]\. If"):
        check(adata)
    with pytest.raises(ValueError, match=r"'fov'.* Pass library_key=\['slide', 'fov'\]\. If"):
        check(adata, ["slide"])
    with pytest.warns(UserWarning, match=r"'slide'.* Pass library_key=\['fov', 'slide'\]\.$"):
        check(adata, ["fov"])
    check(adata, ["slide", "fov"])


def test_images_that_squidpy_or_spatialdata_know_of():
    adata = slide([(0, 0)] * 2, whole=list("ab"))
    check(adata)
    adata.uns["spatial"] = {"a": {}, "b": {}}
    with pytest.warns(UserWarning, match="'whole'"):
        check(adata)
    adata.uns = {"spatialdata_attrs": {"region": ["a", "b"], "region_key": "whole", "instance_key": "cell"}}
    with pytest.warns(UserWarning, match="'whole'"):
        check(adata)


def test_other_positions_are_named_only_where_images_lie_apart_there():
    adata = slide([(0, 0)] * 2, fov=list("ab"))
    adata.obsm["X_umap"] = adata.obsm["spatial"] + 5 * (adata.obs[["fov"]] == "a").to_numpy()
    adata.obsm["again"] = adata.obsm["spatial"] * 2
    adata.obsm["holes"] = np.full((adata.n_obs, 2), np.nan)
    with pytest.raises(ValueError, match=r"Pass library_key='fov'\. If"):
        check(adata)
    adata.obsm["world"] = adata.obsm["X_umap"]
    with pytest.raises(ValueError, match=r"library_key='fov', or spatial_key='world', where they lie beside"):
        check(adata)
    check(adata, key="world")


@pytest.mark.parametrize(
    ("name", "control"),
    [
        *((name, True) for name in ("NegPrb3", "Negative1", "SystemControl12", "FalseCode5", "Blank-12", "BLANK_0006")),
        *((name, True) for name in ("NegControlProbe_00042", "NegControlCodeword_0500", "antisense_ADCY4")),
        *((name, True) for name in ("UnassignedCodeword_0001", "DeprecatedCodeword_0002", "Intergenic_Region_7")),
        *((name, False) for name in ("NEGR1", "BLNK", "SYS1", "BLANKET", "FALZ", "CD8A", "INTS1", "Neg")),
    ],
)
def test_names_of_controls(name, control, caplog):
    _checks.describe_controls(ad.AnnData(np.ones((1, 2), np.float32), var=pd.DataFrame(index=["EPCAM", name])))
    assert (name in caplog.text) == control
    kept = pd.Index(["EPCAM", name])
    if control:
        (call,) = [record.args[-1] for record in caplog.records]
        assert list(kept[eval(call, {"adata": type("A", (), {"var_names": kept})})]) == ["EPCAM"]
