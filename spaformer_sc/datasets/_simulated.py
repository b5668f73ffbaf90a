"""A simulated tissue whose true expression is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.special import ndtri

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

AREA_PER_CELL = 150.0  # µm², as in CosMx lung, where nearest neighbours are about 8 µm apart
FOV_ASPECT = 1.5  # width / height of a CosMx FOV
TOUCHING_RADIUS = 12.0  # µm between the centres of cells that touch
LEAK_PER_NEIGHBOUR = 0.02  # share of a cell's transcripts that is assigned to each cell it touches
NEIGHBOUR_RADIUS = 25.0  # µm within which neighbours switch programs on
ZEROS = 0.88  # share of zero entries to which the depth of the assay is set
DEPTH_SIGMA = 0.55  # standard deviation of log depth between cells of one type, before sectioning
CELLS_PER_BLOCK = 1024  # cells drawn at a time: bounds the memory for intermediate results

CELL_TYPES = (
    "tumour cell",
    "epithelial cell",
    "fibroblast",
    "smooth muscle cell",
    "endothelial cell",
    "T cell",
    "B cell",
    "plasma cell",
    "macrophage",
    "mast cell",
)
# Transcripts in a cell of each type, relative to a tumour cell.
TYPE_DEPTH = np.array([1.0, 0.9, 0.75, 0.75, 0.65, 0.5, 0.5, 0.85, 0.8, 0.6])

# (name, share of the slide that lies before the end of the layer, along the axis across the layers)
LAYERS = (("epithelium", 0.24), ("stroma", 0.46), ("tumour", 0.82), ("muscle", 1.0))

# name: (cells per area relative to the mean, composition in the order of CELL_TYPES)
NICHES = {
    "epithelial": (1.1, (0.00, 0.72, 0.06, 0.00, 0.05, 0.06, 0.01, 0.01, 0.08, 0.01)),
    "stromal": (0.65, (0.02, 0.02, 0.52, 0.04, 0.07, 0.11, 0.03, 0.08, 0.09, 0.02)),
    "tumour nest": (1.2, (0.88, 0.00, 0.02, 0.00, 0.02, 0.03, 0.00, 0.00, 0.05, 0.00)),
    "tumour septum": (0.7, (0.10, 0.00, 0.36, 0.02, 0.09, 0.16, 0.03, 0.06, 0.16, 0.02)),
    "muscular": (0.6, (0.00, 0.00, 0.20, 0.64, 0.06, 0.03, 0.00, 0.01, 0.04, 0.02)),
    "follicle": (1.7, (0.00, 0.00, 0.04, 0.00, 0.03, 0.24, 0.58, 0.06, 0.05, 0.00)),
    "vessel": (1.1, (0.00, 0.00, 0.12, 0.24, 0.56, 0.03, 0.01, 0.01, 0.03, 0.00)),
}
# Niche of each layer where neither a follicle nor a vessel lies; tumour nests lie between septa.
LAYER_NICHE = {"epithelium": "epithelial", "stroma": "stromal", "tumour": "tumour septum", "muscle": "muscular"}

TYPE_PROGRAMS: dict[str, tuple[str, ...]] = {
    "epithelial lineage": ("tumour cell", "epithelial cell"),
    "immune lineage": ("T cell", "B cell", "plasma cell", "macrophage", "mast cell"),
    "mesenchymal lineage": ("fibroblast", "smooth muscle cell", "endothelial cell"),
    **{cell_type: (cell_type,) for cell_type in CELL_TYPES},
}
# name: (type that has the program, type whose cells nearby switch it on)
NEIGHBOUR_PROGRAMS = {
    "macrophage near tumour": ("macrophage", "tumour cell"),
    "fibroblast near tumour": ("fibroblast", "tumour cell"),
    "T cell near tumour": ("T cell", "tumour cell"),
    "tumour near T cell": ("tumour cell", "T cell"),
}
STATE_PROGRAMS = ("cell cycle", "stress")
SPATIAL_PROGRAMS = ("gradient up", "gradient down", "hypoxia")
PROGRAMS = ("background", *TYPE_PROGRAMS, *NEIGHBOUR_PROGRAMS, *STATE_PROGRAMS, *SPATIAL_PROGRAMS)

# Ordered such that a small panel holds markers of many types.
MARKERS = (
    ("EPCAM", "epithelial lineage"),
    ("COL1A1", "fibroblast"),
    ("CD68", "macrophage"),
    ("CD3E", "T cell"),
    ("PECAM1", "endothelial cell"),
    ("MS4A1", "B cell"),
    ("CEACAM6", "tumour cell"),
    ("SPP1", "macrophage near tumour"),
    ("ACTA2", "smooth muscle cell"),
    ("JCHAIN", "plasma cell"),
    ("SCGB3A1", "epithelial cell"),
    ("TPSAB1", "mast cell"),
    ("PTPRC", "immune lineage"),
    ("VIM", "mesenchymal lineage"),
    ("KRT8", "epithelial lineage"),
    ("MKI67", "cell cycle"),
    ("VEGFA", "hypoxia"),
    ("POSTN", "fibroblast near tumour"),
    ("PDCD1", "T cell near tumour"),
    ("CXCL10", "tumour near T cell"),
    ("FOS", "stress"),
    ("DCN", "fibroblast"),
    ("CD163", "macrophage"),
    ("CD8A", "T cell"),
    ("VWF", "endothelial cell"),
    ("CD79A", "B cell"),
    ("S100P", "tumour cell"),
    ("APOC1", "macrophage near tumour"),
    ("MYH11", "smooth muscle cell"),
    ("IGHG1", "plasma cell"),
    ("SFTPC", "epithelial cell"),
    ("CPA3", "mast cell"),
    ("KRT19", "epithelial lineage"),
    ("TOP2A", "cell cycle"),
    ("NDRG1", "hypoxia"),
    ("FAP", "fibroblast near tumour"),
    ("LAG3", "T cell near tumour"),
    ("JUN", "stress"),
)
# Shares of the program families among genes without a name of their own.
FAMILY_SHARES = (
    (("background",), 0.25),
    (tuple(TYPE_PROGRAMS), 0.53),
    (tuple(NEIGHBOUR_PROGRAMS), 0.07),
    (STATE_PROGRAMS, 0.05),
    (SPATIAL_PROGRAMS, 0.10),
)


def simulated_tissue(
    n_fovs: int = 4,
    n_cells: int = 600,
    n_genes: int = 300,
    random_state: int | np.random.Generator = 0,
    panel_state: int | None = None,
) -> AnnData:
    """Simulate counts of a tissue as a CosMx-like assay sees them, with the true expression kept.

    The tissue is a slab of lung tumour: four layers with wavy borders; inside them niches (tumour nests and the septa
    between them, lymphoid follicles, vessels), whose composition the cell types are drawn from. The layout runs on
    from one FOV to the next, and cells near a border have their neighbours in the next FOV.

    Expression follows, for cell :math:`c` of type :math:`t` in niche :math:`s` and gene :math:`g` of program :math:`k`,

    .. math::

        \\lambda_{cg} \\propto a_g \\, e^{b_{tg} + b'_{sg}} \\, (1 + (f_g - 1) \\, u_{ck}), \\qquad
        p_{cg} = \\lambda_{cg} / \\textstyle\\sum_h \\lambda_{ch}, \\qquad
        m_{cg} = d_c (1 - r |N_c|) \\, p_{cg} + r \\textstyle\\sum_{n \\in N_c} d_n \\, p_{ng}, \\qquad
        x_{cg} \\sim \\mathrm{Poisson}(m_{cg} \\, \\gamma_{cg}),

    with the abundance :math:`a_g` (log-normal above a floor, about three decades), small differences :math:`b_{tg}`
    between types and :math:`b'_{sg}` between niches, the fold change :math:`f_g` of the program, its activity
    :math:`u_{ck}` in the cell (from the cell's type, the types of its neighbours within 25 µm, its position or its
    state, times a Gamma variable of the cell), the depth :math:`d_c` (log-normal, and cut by sectioning), the cells
    :math:`N_c` that touch it (within 12 µm), each of which receives the share :math:`r` of its transcripts, and a Gamma
    variable :math:`\\gamma_{cg}` of mean 1 and variance ``var["dispersion"]`` for each entry. What capture loses is in
    the depth: a binomial part of a Poisson count is a Poisson count. The depth is set such that 88 % of the entries are
    expected to be zero, as in CosMx; with 960 genes that is about 200 counts per cell, and in proportion with fewer.

    Parameters
    ----------
    n_fovs
        Fields of view, laid out in a grid without gaps.
    n_cells
        Cells in each FOV. An FOV covers 150 µm² per cell.
    n_genes
        Genes. The first 38 carry names of human marker genes, ``"EPCAM"`` first, and the rest ``"gene_0039"`` and
        so on.
    random_state
        Seed or generator. The same seed gives the same tissue, bit by bit, on one machine.
    panel_state
        Seed of what the genes are (abundance, program, fold changes), to simulate several slides of the same genes;
        None takes that from ``random_state`` too.

    Returns
    -------
    ``n_fovs * n_cells`` cells with

    - ``X``: CSR, float32, whole numbers. Observed counts.
    - ``layers["true_rate"]``: dense, float32, cells × genes, rows sum to 1. The share :math:`p_{cg}` that the gene is
      expected to have among the cell's own transcripts, given the type, neighbours, position and state of the cell. It
      is free of depth, of leakage and of the noise of entries, so it is what an imputation can hope to recover: where
      no cell touches, ``true_depth * true_rate`` is the expected count.
    - ``obs["fov"]``, ``obs["cell_type"]``, ``obs["layer"]``, ``obs["niche"]``: categorical.
    - ``obs["true_depth"]``: float64, :math:`d_c`, the expected number of captured transcripts that are the cell's own.
    - ``obsm["spatial"]``: float64, cells × 2, µm, one frame for the slide.
    - ``var["program"]``: categorical, the program :math:`k` of the gene. ``var["mean_rate"]``: float64, mean of
      ``true_rate`` over cells. ``var["dispersion"]``: float64, the variance of :math:`\\gamma_{cg}`.
    - ``uns["simulation"]``: the arguments and constants of the simulation, numbers and strings.

    Raises
    ------
    TypeError
        If a number is not an integer, or ``random_state`` is neither an integer nor a ``numpy.random.Generator``.
    ValueError
        If ``n_fovs``, ``n_cells`` or ``n_genes`` is below 1, or ``random_state`` is negative.
    """
    n_fovs = _count("n_fovs", n_fovs)
    n_cells = _count("n_cells", n_cells)
    n_genes = _count("n_genes", n_genes)
    layout_rng, panel_rng, state_rng, count_rng = _generator(random_state).spawn(4)
    if panel_state is not None:
        panel_rng = _generator(panel_state)

    tissue = _lay_out(n_fovs, n_cells, layout_rng)
    panel = _design_panel(n_genes, panel_rng)
    activity = _program_activity(tissue, state_rng)
    true_rate = _true_rate(tissue, activity, panel)
    depth = _relative_depth(tissue.types, state_rng)
    touching = _adjacency(tissue.xy, TOUCHING_RADIUS)
    depth *= _depth_scale(true_rate, depth, touching, panel.dispersion)
    counts = _draw_counts(true_rate, depth, touching, panel.dispersion, count_rng)

    fov_names = [f"fov{i + 1}" for i in range(n_fovs)]
    obs = pd.DataFrame(
        {
            "fov": pd.Categorical.from_codes(tissue.fov, fov_names),
            "cell_type": pd.Categorical.from_codes(tissue.types, list(CELL_TYPES)),
            "layer": pd.Categorical.from_codes(tissue.layers, [name for name, _ in LAYERS]),
            "niche": pd.Categorical.from_codes(tissue.niches, list(NICHES)),
            "true_depth": depth,
        },
        index=[f"{name}_{i + 1}" for name in fov_names for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {
            "program": pd.Categorical.from_codes(panel.programs, list(PROGRAMS)),
            "mean_rate": true_rate.mean(axis=0, dtype=np.float64),
            "dispersion": panel.dispersion,
        },
        index=panel.names,
    )
    simulation = {
        "n_fovs": n_fovs,
        "n_cells": n_cells,
        "n_genes": n_genes,
        "random_state": "generator" if isinstance(random_state, np.random.Generator) else int(random_state),
        "panel_state": "random_state" if panel_state is None else int(panel_state),
        "area_per_cell_um2": AREA_PER_CELL,
        "touching_radius_um": TOUCHING_RADIUS,
        "leak_per_neighbour": LEAK_PER_NEIGHBOUR,
        "neighbour_radius_um": NEIGHBOUR_RADIUS,
        "zeros": ZEROS,
        "true_rate": "expected share of each gene among the cell's own transcripts, before depth, leakage and noise",
    }
    return AnnData(
        X=counts,
        obs=obs,
        var=var,
        obsm={"spatial": tissue.xy},
        layers={"true_rate": true_rate},
        uns={"simulation": simulation},
    )


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be an integer of at least 1, but is {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"`{name}={value}`: at least 1 is needed.")
    return int(value)


def _generator(random_state: int | np.random.Generator) -> np.random.Generator:
    if isinstance(random_state, np.random.Generator):
        return random_state
    if isinstance(random_state, bool) or not isinstance(random_state, int | np.integer):
        raise TypeError(
            "`random_state` must be a non-negative integer or a numpy.random.Generator, "
            f"but is {random_state!r} ({type(random_state).__name__})."
        )
    if random_state < 0:
        raise ValueError(f"`random_state={random_state}`: a seed must not be negative.")
    return np.random.default_rng(int(random_state))


class _SmoothField:
    """A random function of position with mean 0, variance 1 and a correlation that falls off over `length` (µm).

    Random Fourier features of a Gaussian process with squared-exponential covariance (Rahimi & Recht 2007, section 3).
    """

    def __init__(self, length: float, rng: np.random.Generator) -> None:
        self.frequency = rng.standard_normal((2, 32)) / length
        self.phase = rng.uniform(0, 2 * np.pi, 32)

    def __call__(self, xy: FloatArray) -> FloatArray:
        angle = xy[:, :1] * self.frequency[0] + xy[:, 1:] * self.frequency[1] + self.phase
        field: FloatArray = np.sqrt(2 / 32) * np.cos(angle).sum(axis=1)
        return field


class _Blobs:
    """Rounded patches: centres, radii (µm) and a three-lobed outline for each."""

    def __init__(self, centres: FloatArray, radii: tuple[float, float], rng: np.random.Generator) -> None:
        self.centres = centres
        self.radius = rng.uniform(*radii, len(centres))
        self.phase = rng.uniform(0, 2 * np.pi, (2, len(centres)))

    def contain(self, xy: FloatArray) -> NDArray[np.bool_]:
        dx = xy[:, :1] - self.centres[:, 0]
        dy = xy[:, 1:] - self.centres[:, 1]
        angle = np.arctan2(dy, dx)
        outline = 1 + 0.25 * np.cos(2 * angle + self.phase[0]) + 0.12 * np.cos(3 * angle + self.phase[1])
        inside: NDArray[np.bool_] = (np.hypot(dx, dy) < self.radius * outline).any(axis=1)
        return inside


class _Plan:
    """Where the layers and niches of a slide of `size` (width, height in µm) lie."""

    def __init__(self, size: FloatArray, rng: np.random.Generator) -> None:
        tilt = rng.uniform(-0.3, 0.3)
        self.axis = np.array([np.sin(tilt), np.cos(tilt)])
        self.centre = size / 2
        self.extent = float((size * np.abs(self.axis)).sum())
        self.long_wave = _SmoothField(0.3 * float(size.max()), rng)
        self.short_wave = _SmoothField(60.0, rng)
        self.nests = _SmoothField(45.0, rng)
        area = float(size.prod())
        scale = min(1.0, np.sqrt(area) / 500)
        spots = rng.uniform(size=(400, 2)) * size
        position = self.position(spots)
        self.borders = np.quantile(position, [end for _, end in LAYERS[:-1]])
        layer = self.layer(position)
        stroma = spots[layer == 1][: max(1, round(area / 120_000))]
        inner = spots[::-1][layer[::-1] > 0][: max(1, round(area / 40_000))]
        self.follicles = _Blobs(stroma, (40 * scale, 65 * scale), rng)
        self.vessels = _Blobs(inner, (14 * scale, 28 * scale), rng)

    def position(self, xy: FloatArray) -> FloatArray:
        """Position along the axis across the layers, about 0 to 1."""
        along = (xy[:, 0] - self.centre[0]) * self.axis[0] + (xy[:, 1] - self.centre[1]) * self.axis[1]
        waves = 0.04 * self.long_wave(xy) + min(0.04, 12 / self.extent) * self.short_wave(xy)
        position: FloatArray = along / self.extent + 0.5 + waves
        return position

    def layer(self, position: FloatArray) -> IntArray:
        return np.searchsorted(self.borders, position).astype(np.int64)

    def niche(self, xy: FloatArray, layer: IntArray) -> IntArray:
        codes = {name: i for i, name in enumerate(NICHES)}
        niche = np.array([codes[LAYER_NICHE[name]] for name, _ in LAYERS])[layer]
        niche[(layer == 2) & (self.nests(xy) > -0.6)] = codes["tumour nest"]
        niche[self.follicles.contain(xy)] = codes["follicle"]
        niche[self.vessels.contain(xy)] = codes["vessel"]
        return niche.astype(np.int64)


@dataclass
class _Tissue:
    xy: FloatArray
    fov: IntArray
    position: FloatArray
    layers: IntArray
    niches: IntArray
    types: IntArray


def _lay_out(n_fovs: int, n_cells: int, rng: np.random.Generator) -> _Tissue:
    columns = int(np.ceil(np.sqrt(n_fovs)))
    rows = -(-n_fovs // columns)
    fov_size = np.sqrt(n_cells * AREA_PER_CELL * np.array([FOV_ASPECT, 1 / FOV_ASPECT]))
    plan = _Plan(fov_size * [columns, rows], rng)

    fov = np.repeat(np.arange(n_fovs), n_cells)
    low = np.column_stack([fov % columns, fov // columns]).astype(np.float64) * fov_size
    xy = _place_cells(plan, low, fov_size, n_cells, rng)
    position = plan.position(xy)
    layers = plan.layer(position)
    niches = plan.niche(xy, layers)

    composition = np.array([share for _, share in NICHES.values()])
    logits = np.log(composition + 0.002)[niches]
    logits += 1.2 * np.column_stack([_SmoothField(25.0, rng)(xy) for _ in CELL_TYPES])
    types = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return _Tissue(xy, fov, position, layers, niches, types)


def _place_cells(
    plan: _Plan, low: FloatArray, fov_size: FloatArray, n_cells: int, rng: np.random.Generator
) -> FloatArray:
    """Place `n_cells` in each FOV, denser in some niches, and push apart those that overlap."""
    density = np.array([density for density, _ in NICHES.values()])
    xy = np.empty_like(low)
    for start in range(0, len(low), n_cells):
        spots = low[start] + rng.uniform(size=(4 * n_cells, 2)) * fov_size
        weight = density[plan.niche(spots, plan.layer(plan.position(spots)))]
        # The largest of log weight + Gumbel noise are a weighted draw without replacement.
        chosen = np.argsort(-(np.log(weight) + rng.gumbel(size=len(weight))))[:n_cells]
        xy[start : start + n_cells] = spots[chosen]

    high = low + fov_size
    n_neighbours = min(7, len(xy))
    for _ in range(3):
        niche = plan.niche(xy, plan.layer(plan.position(xy)))
        reach = 0.8 * np.sqrt(AREA_PER_CELL / density[niche])[:, None]
        distance, index = cKDTree(xy).query(xy, k=range(1, n_neighbours + 1))
        push = np.clip(1 - distance / reach, 0, None) / np.maximum(distance, 1e-9)
        xy = xy + 0.3 * reach * ((xy[:, None] - xy[index]) * push[..., None]).sum(axis=1)
        xy = np.clip(low + np.abs(xy - low), low, high)
        xy = np.clip(high - np.abs(high - xy), low, high)
    return xy


@dataclass
class _Panel:
    names: list[str]
    programs: IntArray
    abundance: FloatArray
    fold: FloatArray
    type_effect: FloatArray  # cell types × genes, factors
    niche_effect: FloatArray  # niches × genes, factors
    dispersion: FloatArray


def _design_panel(n_genes: int, rng: np.random.Generator) -> _Panel:
    markers = MARKERS[:n_genes]
    n_other = n_genes - len(markers)
    names = [name for name, _ in markers] + [f"gene_{i + 1:04d}" for i in range(len(markers), n_genes)]

    codes = {name: i for i, name in enumerate(PROGRAMS)}
    probability = np.zeros(len(PROGRAMS))
    for family, share in FAMILY_SHARES:
        probability[[codes[name] for name in family]] = share / len(family)
    programs = np.concatenate(
        [
            np.array([codes[program] for _, program in markers], dtype=np.int64),
            rng.choice(len(PROGRAMS), size=n_other, p=probability),
        ]
    )

    # Quantiles rather than draws, so that every panel has the same spread: that of the gene means in CosMx lung.
    quantile = rng.permutation((np.arange(n_genes) + 0.5) / n_genes)
    if n_other:  # markers are chosen for being seen, so they come from the upper part of the range
        upper = np.flatnonzero(quantile > 0.4)[: len(markers)]
        quantile = np.concatenate([quantile[upper], np.delete(quantile, upper)])
    abundance = 0.025 + np.exp(1.6 * ndtri(quantile) - 2.75)

    fold = np.exp(rng.normal(np.log(11.0), 0.75, n_genes)).clip(2.0, 100.0)
    type_effect = rng.normal(0.0, 0.45, (len(CELL_TYPES), n_genes))
    niche_effect = rng.normal(0.0, 0.4, (len(NICHES), n_genes))
    # Markers follow their program closely.
    fold[: len(markers)] *= 2
    type_effect[:, : len(markers)] *= 0.3
    niche_effect[:, : len(markers)] *= 0.3
    dispersion = np.exp(rng.normal(np.log(0.25), 0.4, n_genes))
    return _Panel(names, programs, abundance, fold, np.exp(type_effect), np.exp(niche_effect), dispersion)


def _program_activity(tissue: _Tissue, rng: np.random.Generator) -> FloatArray:
    """Activity of each program in each cell, cells × programs; 0 is off and about 1 is fully on."""
    n = len(tissue.types)
    code = {name: i for i, name in enumerate(CELL_TYPES)}
    is_type = np.eye(len(CELL_TYPES))[tissue.types]
    near = _adjacency(tissue.xy, NEIGHBOUR_RADIUS)
    share_near = (near @ is_type) / np.maximum(np.diff(near.indptr), 1)[:, None]

    activity: dict[str, FloatArray] = {"background": np.zeros(n)}
    for name, types in TYPE_PROGRAMS.items():
        activity[name] = is_type[:, [code[cell_type] for cell_type in types]].sum(axis=1)
    for name, (own, other) in NEIGHBOUR_PROGRAMS.items():
        share = share_near[:, code[other]]
        activity[name] = is_type[:, code[own]] * share**2 / (share**2 + 0.2**2)
    cycling = np.full(len(CELL_TYPES), 0.02)
    cycling[[code["tumour cell"], code["B cell"]]] = 0.2
    activity["cell cycle"] = (rng.uniform(size=n) < cycling[tissue.types]).astype(np.float64)
    activity["stress"] = 0.3 * np.exp(0.5 * _SmoothField(60.0, rng)(tissue.xy))
    slope = np.clip(tissue.position, 0.0, 1.0)
    activity["gradient up"] = slope
    activity["gradient down"] = 1 - slope
    activity["hypoxia"] = 1 / (1 + np.exp(-2 * _SmoothField(120.0, rng)(tissue.xy) - 4 * (slope - 0.6)))
    cell_noise = rng.standard_gamma(4.0, (n, len(PROGRAMS))) / 4
    noisy: FloatArray = np.column_stack([activity[name] for name in PROGRAMS]) * cell_noise
    return noisy


def _true_rate(tissue: _Tissue, activity: FloatArray, panel: _Panel) -> NDArray[np.float32]:
    rate = np.empty((len(tissue.xy), len(panel.names)), dtype=np.float32)
    total = np.zeros(rate.shape[1])
    for start in range(0, len(rate), CELLS_PER_BLOCK):
        block = slice(start, start + CELLS_PER_BLOCK)
        relative = panel.type_effect[tissue.types[block]] * panel.niche_effect[tissue.niches[block]]
        relative *= 1 + (panel.fold - 1) * activity[block][:, panel.programs]
        total += relative.sum(axis=0)
        rate[block] = relative
    weight = panel.abundance / total
    for start in range(0, len(rate), CELLS_PER_BLOCK):
        block = slice(start, start + CELLS_PER_BLOCK)
        weighted = rate[block] * weight
        rate[block] = weighted / weighted.sum(axis=1, keepdims=True)
    return rate


def _relative_depth(types: IntArray, rng: np.random.Generator) -> FloatArray:
    """Depth of the cells up to a factor: type, a log-normal of the cell, and the part of it that is in the section."""
    cell = np.exp(rng.normal(0.0, DEPTH_SIGMA, len(types)))
    in_section = rng.beta(1.7, 1.0, len(types))
    depth: FloatArray = TYPE_DEPTH[types] * cell * in_section
    return depth


def _adjacency(xy: FloatArray, radius: float) -> sparse.csr_matrix:
    """Symmetric 0/1 adjacency, without self-loops, of the cells whose centres lie within `radius` of each other."""
    pairs = cKDTree(xy).query_pairs(radius, output_type="ndarray")
    ones = np.ones(2 * len(pairs), dtype=np.float32)
    ends = (np.concatenate([pairs[:, 0], pairs[:, 1]]), np.concatenate([pairs[:, 1], pairs[:, 0]]))
    return sparse.csr_matrix((ones, ends), shape=(len(xy), len(xy)))


def _expected_counts(
    rate: NDArray[np.float32], depth: FloatArray, touching: sparse.csr_matrix, cells: IntArray
) -> FloatArray:
    """Expected counts of `cells` after leakage, cells × genes."""
    neighbours = touching[cells]
    kept = depth[cells] * (1 - LEAK_PER_NEIGHBOUR * np.diff(neighbours.indptr)).clip(0.5, 1.0)
    received = LEAK_PER_NEIGHBOUR * neighbours.multiply(depth.astype(np.float32)).tocsr() @ rate
    expected: FloatArray = kept[:, None] * rate[cells] + received
    return expected


def _depth_scale(
    rate: NDArray[np.float32], depth: FloatArray, touching: sparse.csr_matrix, dispersion: FloatArray
) -> float:
    """Factor on `depth` at which the expected share of zeros, over at most 1,000 cells, is `ZEROS`.

    An entry with mean m and Gamma variance v is zero with probability (1 + m v)^(-1/v): the negative binomial at 0.
    """
    cells = np.unique(np.linspace(0, len(depth) - 1, 1000).astype(np.int64))
    expected = _expected_counts(rate, depth, touching, cells)
    low, high = -12.0, 24.0
    for _ in range(40):
        middle = (low + high) / 2
        zeros = np.exp(-np.log1p(np.exp(middle) * expected * dispersion) / dispersion).mean()
        low, high = (middle, high) if zeros > ZEROS else (low, middle)
    return float(np.exp(low))


def _draw_counts(
    rate: NDArray[np.float32],
    depth: FloatArray,
    touching: sparse.csr_matrix,
    dispersion: FloatArray,
    rng: np.random.Generator,
) -> sparse.csr_matrix:
    blocks = []
    for start in range(0, len(depth), CELLS_PER_BLOCK):
        cells = np.arange(start, min(start + CELLS_PER_BLOCK, len(depth)))
        expected = _expected_counts(rate, depth, touching, cells)
        noise = rng.standard_gamma(np.broadcast_to(1 / dispersion, expected.shape)) * dispersion
        blocks.append(sparse.csr_matrix(rng.poisson(expected * noise).astype(np.float32)))
    return sparse.vstack(blocks, format="csr", dtype=np.float32)
