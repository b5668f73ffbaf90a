"""What is random depends on `random_state` alone: bit-equal, in this process and another, and nothing global moves."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import spaformer_sc as sf
from spaformer_sc import metrics
from tests.conftest import contents

TWO_NETWORKS = {"max_epochs": 2, "settings": {"n_networks": 2}, "library_key": "fov", "progress": False}


@cache
def tissue():
    return sf.datasets.simulated_tissue(n_fovs=3, n_cells=40, n_genes=20)


@cache
def imputed(state=0):
    """Counts with fractions, some of them held out, and an imputation."""
    adata = tissue().copy()
    split = metrics.thin(adata.X, 0.6, random_state=0)
    adata.X, adata.layers["held"] = split.train, split.held.astype(np.float32)
    adata.layers["held"].data[::3] += 0.25
    sf.tl.impute(adata, random_state=state, **TWO_NETWORKS)
    return adata


@cache
def model(state=0):
    return sf.SpaFormer(random_state=state, **TWO_NETWORKS).fit(tissue())


def fitted(state):
    return [model(state).impute(tissue()), model(state).embed(tissue()), model(state).gene_scores]


def tuned(state):
    """A model of the same weights, with another seed for what is drawn in tuning."""
    first = sf.SpaFormer(random_state=state, **TWO_NETWORKS)
    known = model()
    first.__dict__.update({**known.__dict__, "random_state": state})
    other = first.fine_tune(tissue()[:, ::-1].copy(), effort=0.5)
    return [other.impute(tissue()), other.gene_scores]


def reach(state):
    return sf.tl.reach(tissue(), model(), n_cells=5, n_steps=1, random_state=state)


def evaluated(state):
    adata = imputed().copy()
    sf.tl.evaluate(adata, "held", random_state=state)
    return [adata.var, adata.obs]


STOCHASTIC = {
    "datasets.simulated_tissue": lambda state: sf.datasets.simulated_tissue(2, 30, 15, random_state=state),
    "metrics.hide_blocks": lambda state: metrics.hide_blocks(tissue().X, tissue().obs["fov"], random_state=state).train,
    "metrics.hide_entries": lambda state: metrics.hide_entries(tissue().X, random_state=state).train,
    "metrics.make_split": lambda state: metrics.make_split(tissue().X, "thinning", random_state=state).test,
    "metrics.noise_ceiling": lambda state: metrics.noise_ceiling(
        tissue().X, metrics.thin(tissue().X, 0.3).train, random_state=state
    ),
    "metrics.thin": lambda state: metrics.thin(tissue().X, random_state=state).held,
    "tl.evaluate": evaluated,
    "tl.impute": imputed,
    "tl.reach": lambda state: reach(state).curve,
    "tl.sample": lambda state: sf.tl.sample(imputed(), ["EPCAM", "VIM"], n=3, of="count", random_state=state),
    "SpaFormer": fitted,
    "SpaFormer.fine_tune": tuned,
}
"""Every public function that draws random numbers, by name."""

STEADY = {
    "SpaFormer.impute": lambda folder: model().impute(tissue()),
    "SpaFormer.load": lambda folder: (model().save(folder / "m"), sf.SpaFormer.load(folder / "m", progress=False)),
    "pp.check": lambda folder: sf.pp.check(tissue(), library_key="fov"),
    "pp.positional_encoding": lambda folder: sf.pp.positional_encoding(
        tissue(), "conditional", library_key="fov", copy=True
    ),
    "pp.tile": lambda folder: sf.pp.tile(tissue(), library_key="fov", tile_size=50, copy=True),
    "tl.attribution": lambda folder: sf.tl.attribution(tissue(), model(), "EPCAM", tissue().obs_names[3], n_steps=1),
    "tl.detection": lambda folder: sf.tl.detection(imputed(), "EPCAM"),
    "tl.interval": lambda folder: sf.tl.interval(imputed(), "EPCAM"),
}
"""Others that compute with torch or random weights."""


def digest(value):
    """Checksum of all bytes of a result."""
    if isinstance(value, ad.AnnData):
        found = repr(sorted(contents(value).items())).encode()
    elif isinstance(value, pd.DataFrame):
        found = b"".join(value[column].astype(str).str.cat(sep="\n").encode() for column in value)
        found += b"".join(value[column].to_numpy().tobytes() for column in value.select_dtypes("number"))
    elif isinstance(value, list | tuple):
        found = b"".join(digest(part).encode() for part in value)
    else:
        found = np.ascontiguousarray(value.toarray() if sp.issparse(value) else value).tobytes()
    return hashlib.sha256(found).hexdigest()


@cache
def known(name, state):
    return digest(STOCHASTIC[name](state))


def digests():
    """Checksums of the results of all stochastic functions."""
    return {name: known(name, 0) for name in STOCHASTIC}


def forget():
    for function in (tissue, imputed, model, known):
        function.cache_clear()


class GlobalStates:
    """Sets the global random states, and tells whether they are as they were set."""

    def __init__(self, seed):
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        random.seed(seed)
        self.before = self.now()

    @staticmethod
    def now():
        numpy = np.random.get_state()  # noqa: NPY002
        return [numpy[1].tobytes(), numpy[2:], torch.get_rng_state().numpy().tobytes(), random.getstate()]

    @property
    def untouched(self):
        return self.now() == self.before


def test_every_function_with_a_random_state_is_tested():
    rooms = {"datasets": sf.datasets, "metrics": metrics, "pl": sf.pl, "pp": sf.pp, "tl": sf.tl}
    public = {f"{room}.{name}": getattr(module, name) for room, module in rooms.items() for name in module.__all__}
    public["SpaFormer"] = sf.SpaFormer
    drawing = {name for name, function in public.items() if "random_state" in inspect.signature(function).parameters}
    assert drawing == set(STOCHASTIC) - {"SpaFormer.fine_tune"}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_seed_decides_and_nothing_global_does(name):
    first = GlobalStates(1)
    one = known(name, 0)
    assert first.untouched
    forget()
    second = GlobalStates(2)
    assert known(name, 0) == one
    assert second.untouched
    assert digest(STOCHASTIC[name](1)) != one
    assert second.untouched


@pytest.mark.parametrize("name", STEADY)
def test_others_leave_global_states_alone_too(name, tmp_path):
    states = GlobalStates(3)
    STEADY[name](tmp_path)
    assert states.untouched


OTHER_PROCESS = """
import json, sys, torch
from tests.test_determinism import GlobalStates, digests, reach

torch.set_num_threads(int(sys.argv[1]))
states = GlobalStates(4)
print(json.dumps([digests(), states.untouched, reach(0).curve["attribution"].tolist()]))
"""


@pytest.mark.parametrize("threads", [1, 3])
def test_another_process_gives_the_same_bits(threads):
    """With several threads networks train abreast and fields of view are read ahead; only gradients, which threads sum
    together, are then the same up to rounding. Hashes of strings are other ones there, and what the package loads when
    it is first needed is loaded after the global states are set."""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(Path(sf.__file__).parents[1]), str(root)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS, str(threads)],
        check=True,
        capture_output=True,
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": path},
    )
    found, untouched, shares = json.loads(done.stdout)
    wanted = digests()
    if threads > 1:
        del found["tl.reach"], wanted["tl.reach"]
    assert found == wanted
    assert untouched
    np.testing.assert_allclose(shares, reach(0).curve["attribution"], rtol=1e-4, atol=1e-6)
