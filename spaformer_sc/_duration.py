"""How long a run takes, from a few steps of it."""

from __future__ import annotations

import copy
import math
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ._config import in_form, with_missing
from ._gather import InMemory
from ._threads import Workers
from .model import VALIDATED_CELLS, Opened, SpaFormer, resolve_device

if TYPE_CHECKING:
    from .data._fields import FieldOfView
    from .training.mixing import HeldCounts
    from .training.sequences import FieldCounts

TRIED_CELLS = 1024
"""Cells of the trial, at most."""

MEASURED = 0.3
"""Seconds of training, at least, over which the speed of a network is measured, after one epoch to warm up."""


class _Enough(Exception):
    """The speed has been measured."""


def duration(model: SpaFormer, opened: Opened, fields: list[FieldOfView]) -> tuple[float, float]:
    """Estimate how long ``tl.impute`` takes, by training and using each form of network on some cells for a moment.

    The times per cell of training and prediction are measured in one thread on :data:`TRIED_CELLS` cells and multiplied
    by the cells that pass through both in a run, which are known but for when training stops. What is done once
    (reading, graphs, scores, writing) is left out, and so is what threads lose that share a memory.

    Parameters
    ----------
    model
        The model, not fitted; stays as it is.
    opened
        The data.
    fields
        What the model will be fitted to.

    Returns
    -------
    Seconds where every network stops as early as it can, and where none does.
    """
    from .training.mixing import HeldCounts
    from .training.sequences import sequences
    from .training.trainer import SHORTENED, planned_steps

    trial, device = copy.copy(model), resolve_device(model.device)
    with Workers(device) as workers:
        n_threads, workers.n = workers.n, 1
        some = _some(opened)
        loaded = trial._take(some)
        trial.settings = s = with_missing(trial._chosen, loaded.hidden_as)
        trial.progress = False
        split, _, data = trial._part(loaded)
        whole = sequences(fields, loaded.counts, None)  # only the sizes of the fields are looked at
        n_fitted = sum(int(field.own.sum()) for field in fields)
        late, early, shortest, predicting = [], [], [], []
        for form in s.forms[: s.n_networks]:
            training = in_form(s, form, n_fitted).training
            sampler = replace(trial._sampler(device), tokens_per_step=training.tokens_per_step)
            n_epochs, _ = planned_steps(whole, sampler, training)
            held = HeldCounts(data, sampler, split.validation, trial._shares, workers)
            training_time, validation_time, prediction_time = _times(trial, form, some, data, held, workers)
            validations = training.n_validations * min(VALIDATED_CELLS, n_fitted)
            late.append(n_epochs * n_fitted * training_time + validations * validation_time)
            early.append(late[-1] * min(1.0, (1 + training.patience) / training.n_validations))
            shortest.append(late[-1] * min(1.0, SHORTENED / training.n_validations))
            predicting.append(prediction_time)
    # The scores take a prediction of what was fitted, the result one of everything.
    n_cells = n_fitted + opened.counts.shape[0]
    prediction = s.n_networks * float(np.mean(predicting)) * n_cells / n_threads
    n_more, n_abreast = s.n_networks - len(late), 1 if s.dropout else n_threads
    least = _abreast(early, n_abreast) + _abreast([min(shortest)] * n_more, n_abreast)
    most = _abreast(late, n_abreast) + _abreast([max(late)] * n_more, n_abreast)
    return least + prediction, most + prediction


def _some(opened: Opened) -> Opened:
    """Some cells, up to :data:`TRIED_CELLS`: those in the middle of one FOV after the other, the largest first."""
    from .data._counts import in_memory

    layout, chosen, n_left = opened.layout, [], TRIED_CELLS
    for code in np.argsort(-np.bincount(layout.codes), kind="stable"):
        cells = np.flatnonzero(layout.codes == code)
        here = layout.coordinates[cells]
        distance = ((here - np.median(here, axis=0)) ** 2).sum(axis=1)
        chosen.append(cells[np.argsort(distance, kind="stable")[:n_left]])
        n_left -= len(chosen[-1])
        if not n_left:
            break
    cells = np.sort(np.concatenate(chosen))
    used, codes = np.unique(layout.codes[cells], return_inverse=True)
    given = None if layout.given is None else layout.given[cells][:, cells].tocsr()
    names = [layout.names[code] for code in used]
    layout = replace(layout, coordinates=layout.coordinates[cells], codes=codes, names=names, given=given)
    missing = None if opened.missing is None else opened.missing[cells]
    return Opened(in_memory(opened.counts.rows(cells), opened.counts.fractional), missing, layout)


def _times(
    trial: SpaFormer,
    form: str,
    some: Opened,
    data: list[FieldCounts],
    held: HeldCounts,
    workers: Workers,
) -> tuple[float, float, float]:
    """Seconds that training, validation and prediction take for each cell, for a network of one form."""
    from .training.pooling import CONCENTRATIONS
    from .training.trainer import train

    device = resolve_device(trial.device)
    training = in_form(trial.settings, form).training
    sampler = replace(trial._sampler(device), tokens_per_step=training.tokens_per_step)
    network = trial._new_network(0, form).to(device)
    per_epoch = sampler.steps_per_epoch(data)
    ends: list[float] = []

    def progress(step: int, n_steps: int, score: float) -> None:
        if step % per_epoch == 0 or step == n_steps:
            ends.append(time.perf_counter())
            if len(ends) > 1 and ends[-1] - ends[0] > MEASURED:
                raise _Enough

    endless = replace(training, max_epochs=10**6, n_validations=1)
    with suppress(_Enough):
        train(network, data, sampler, endless, validate=lambda _: float("nan"), seed=0, progress=progress)
    n_cells, n_genes = some.counts.shape
    training_time = (ends[-1] - ends[0]) / (len(ends) - 1) / n_cells

    trial._networks, trial._forms, trial._weights = [network.eval()], [form], np.ones((2, 1))
    trial._concentration = CONCENTRATIONS[0] if trial.settings.n_pooled else math.inf
    gathered = InMemory(n_cells, n_genes, 0)
    began = time.perf_counter()
    held.gain(network)
    validated = time.perf_counter()
    trial._predict(
        [sequence.fov for sequence in data],
        some.read,
        gathered,
        workers,
        output="lognorm",
        target_sum=trial.target_sum,
        genes=None,
        embed=False,
    )
    return training_time, (validated - began) / n_cells, (time.perf_counter() - validated) / n_cells


def _abreast(times: list[float], n: int) -> float:
    """Time that tasks take with ``n`` at a time."""
    return max([*times, sum(times) / n]) if times else 0.0
