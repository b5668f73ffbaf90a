"""The training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spaformer_sc._config import Training
from spaformer_sc._logging import logger
from spaformer_sc._memory import give_back
from spaformer_sc.nn.decoders import CountDecoder
from spaformer_sc.nn.network import Network
from spaformer_sc.nn.seeding import random_state, reseed, seeded, set_random_state

from .checkpoint import Checkpoint
from .ranks import ALONE, Ranks
from .sequences import Batch, FieldCounts, Sampler

KL_WEIGHT = 0.01
"""Weight of the divergence of a variational latent, after its warm-up.

The latent is made from what is visible and judged by what is hidden. What it can say of the hidden counts is at most
what it keeps of the visible ones, which is at most the divergence: with a weight of 1, forgetting everything would be
optimal, and is what happens. With a small weight the sum is the variational information bottleneck of visible and
hidden counts (Alemi et al. 2017, "Deep Variational Information Bottleneck", ICLR, eq. 17), which keeps what tells about
the hidden counts at more than this rate.
"""


SHORTENED = 1.5
"""Steps of a training that is like another, for each step up to the best of that one."""


class Diverged(RuntimeError):
    """A training came to numbers that are not finite before there were good weights."""


@dataclass
class History:
    """Course of a training: one entry for each validation.

    Attributes
    ----------
    step, epoch
        Where the validation took place.
    loss
        Mean training loss since the validation before; NaN before the first step.
    validation
        Score on what is held out; larger is better.
    """

    step: list[int] = field(default_factory=list)
    epoch: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """Step of the weights that are kept: that of the best score, or the last when nothing was held out."""
        return self.step[-1 if math.isnan(self.best_score) else int(np.argmax(self.validation))]

    @property
    def best_score(self) -> float:
        """The best score; NaN when nothing was held out."""
        return max(self.validation)


def _asked(batch: Batch) -> Tensor:
    """Which entries the loss asks for, (cells, genes) or (cells, 1)."""
    # A cell without transcripts in the target says nothing about shares.
    informative = (batch.target_depth > 0)[:, None]
    return informative if batch.asked is None else informative & batch.asked


def batch_size(network: Network, batch: Batch) -> Tensor:
    """Transcripts that the loss asks for (Gaussian: entries)."""
    if isinstance(network.decoder, CountDecoder):
        return batch.target.sum() if batch.asked is None else (batch.target * batch.asked).sum()
    return _asked(batch).expand(batch.target.shape).sum()


def batch_loss(
    network: Network, batch: Batch, kl_weight: float, generator: torch.Generator, size: float | None = None
) -> Tensor:
    """Negative log-likelihood of what was hidden, per transcript asked for (Gaussian: per entry asked for).

    With a variational latent plus ``kl_weight`` times its divergence from the prior (Kingma and Welling 2014, eq. 3;
    see :data:`KL_WEIGHT`), over the cells of which something is asked: on others the prior would pull alone. Several
    processes, each with a part of a batch, give the mean ``size`` of the parts: the mean of their losses is then that
    of the batch, and so are the gradients.
    """
    output = network(batch.tokens, generator)
    likelihood = network.decoder.log_likelihood(output.decoded, batch.target, batch.target_depth, batch.measured)
    asked = _asked(batch)
    if not asked.all():
        likelihood = likelihood.masked_fill(~asked, 0.0)
    loss = -likelihood.sum()
    if output.divergence is not None:
        loss = loss + kl_weight * output.divergence.masked_fill(~asked.any(1), 0.0).sum()
    return loss / (batch_size(network, batch).clamp(min=1) if size is None else max(size, 1.0))


class _Loss(nn.Module):
    """:func:`batch_loss` as a module, so that all uses of the weights lie within it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch, kl_weight: float, generator: torch.Generator, size: float) -> Tensor:
        loss = batch_loss(self.network, batch, kl_weight, generator, size)
        # What a weight that this batch leaves out adds: other ranks may use it.
        return loss + 0.0 * sum(parameter.sum() for parameter in self.network.parameters())


class WeightAverage:
    """Exponential moving average of a network's weights, with a decay that grows from 0 at the start."""

    def __init__(self, network: Network, decay: float) -> None:
        self.network = copy.deepcopy(network).eval()
        self.decay = decay
        self.n_updates = 0

    @torch.no_grad()
    def update(self, network: Network) -> None:
        """Take one step towards the weights of ``network``; buffers are copied."""
        self.n_updates += 1
        decay = min(self.decay, self.n_updates / (self.n_updates + 10))
        for mean, parameter in zip(self.network.parameters(), network.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)
        for copied, buffer in zip(self.network.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)


def _optimizer(network: Network, config: Training) -> torch.optim.AdamW:
    decayed, plain, concentrations = [], [], []
    for name, parameter in network.named_parameters():
        if name.endswith(("log_concentration", "log_dispersion")):
            concentrations.append(parameter)
        elif parameter.ndim > 1:
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay, "lr": config.learning_rate},
        {"params": plain, "weight_decay": 0.0, "lr": config.learning_rate},
        # Live on a logarithmic scale and have far to go.
        {"params": concentrations, "weight_decay": 0.0, "lr": 10 * config.learning_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.98), fused=True)


def learning_rate_factor(step: int, n_steps: int, config: Training) -> float:
    """Factor on the learning rate at a step: linear warm-up, then cosine to 0 or constant."""
    warmup = min(config.warmup_steps, max(1, n_steps // 10))
    factor = min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / n_steps)))
    return factor


def shortened(config: Training, history: History) -> Training:
    """Return how to train a network like one that has been trained.

    Where that one stopped early, its learning rate was still high at its best step; :data:`SHORTENED` times as many
    steps let that of the others come down.
    """
    if config.max_epochs is not None or math.isnan(history.best_score):
        return config
    return replace(config, n_steps=min(config.n_steps, round(SHORTENED * history.best_step)))


def planned_steps(data: Sequence[FieldCounts], sampler: Sampler, config: Training) -> tuple[int, int]:
    """Numbers of epochs and of steps of a training that does not stop early."""
    per_epoch = sampler.steps_per_epoch(data)
    n_epochs = max(1, round(config.n_steps / per_epoch)) if config.max_epochs is None else config.max_epochs
    return n_epochs, n_epochs * per_epoch


class _Watch:
    """Validates a network, remembers its best weights and the history, and says when to stop."""

    def __init__(self, network: Network, validate: Callable[[Network], float], patience: int) -> None:
        self.network = network
        self.validate = validate
        self.patience = patience
        self.history = History()
        self.losses: list[Tensor] = []
        self.stop = False
        self._best: dict[str, Tensor] = {}
        self._best_before: dict[str, Tensor] = {}
        self.best_score = -math.inf
        self._since_best = 0

    def check(self, step: int, epoch: float) -> bool:
        """Validate, and say whether the network is finite.

        Where nothing was held out (NaN), the last weights count as the best.
        """
        self.network.eval()
        give_back()
        score = self.validate(self.network)
        self._best_before = self._best
        self.history.step.append(step)
        self.history.epoch.append(epoch)
        losses = [loss.to(self.losses[-1].device) for loss in self.losses]
        self.history.loss.append(float(torch.stack(losses).mean()) if losses else math.nan)
        self.history.validation.append(score)
        self.losses = []
        if math.isnan(score) or score > self.best_score:
            self._best = copy.deepcopy(self.network.state_dict())
            self.best_score = self.best_score if math.isnan(score) else score
            self._since_best = 0
        else:
            self._since_best += 1
        self.stop = self._since_best >= self.patience
        return score != -math.inf and all(bool(weight.isfinite().all()) for weight in self.network.parameters())

    def confirm(self) -> None:
        """Take note that the loss after the last validation is finite: what was best before it is not needed."""
        self._best_before = {}

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` goes on from."""
        kept = ("losses", "stop", "_best", "_best_before", "best_score", "_since_best")
        return {"history": asdict(self.history), **{name: getattr(self, name) for name in kept}}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.history = History(**state["history"])
        for name, value in state.items():
            if name != "history":
                setattr(self, name, value)

    def diverged(self, step: int, learning_rate: float) -> tuple[Network, History]:
        """Give the last good weights and say so; an error when there are none."""
        if self.history.step and self.history.step[-1] == step:  # it is the weights validated last that are not good
            self._best = self._best_before
            for entries in vars(self.history).values():
                entries.pop()
        advice = (
            "Look for extreme values among the counts, or lower the learning rate: "
            f"settings={{'learning_rate': {min(learning_rate / 10, Training.learning_rate):g}}}."
        )
        if not self._best:
            raise Diverged(f"training diverged at step {step}, before anything was learnt. {advice}")
        kept = self.history.best_step
        logger.warning(
            "training diverged at step %d; the last good weights, of step %d, are kept. %s", step, kept, advice
        )
        return self.result()

    def result(self) -> tuple[Network, History]:
        """Return the network with its best weights, and the history."""
        self.network.load_state_dict(self._best)
        return self.network.eval(), self.history


def train(
    network: Network,
    data: Sequence[FieldCounts],
    sampler: Sampler,
    config: Training,
    *,
    validate: Callable[[Network], float],
    seed: int,
    progress: Callable[[int, int, float], None],
    tuned: bool = False,
    ahead: Callable[[Iterator[Batch]], Generator[Batch]] | None = None,
    checkpoint: Checkpoint | None = None,
    state: str = "training",
    ranks: Ranks = ALONE,
) -> tuple[Network, History]:
    """Train a network and return the best weights seen on what is held out.

    Parameters
    ----------
    network
        The network; trained in place.
    data
        FOVs with the counts to train on.
    sampler
        Makes the batches.
    config
        How to train.
    validate
        Scores a network on what is held out; larger is better. NaN where nothing is held out, minus infinity where the
        prediction is not finite.
    seed
        Seed of corruption, sampling and dropout.
    progress
        Called after each step with the number of steps done, of all steps (those done, when training stops early), and
        the best validation score so far, that of the weights that are kept; -inf before the first.
    tuned
        The network has been trained before: its weights as they are count too.
    ahead
        Iterates over the batches of an epoch, and makes them ahead of their use; None to make them when they are used.
    checkpoint
        Where the state is kept between epochs, and taken up from if one is there; None for nowhere.
    state
        Its name there.
    ranks
        The processes that train together. Each calls this with the same arguments, takes its share of the cells and of
        the tokens of a step, and gets the same result; ``validate`` has to give all of them the same score.

    Returns
    -------
    The network with the best (averaged) weights, and the history. A training that diverges ends with the last good
    weights and a warning.

    Raises
    ------
    Diverged
        If it does before there are any.
    """
    corruption, noise, features = (torch.Generator().manual_seed(seed + i) for i in range(3))
    n_epochs, n_steps = planned_steps(data, sampler, config)
    per_epoch = n_steps // n_epochs
    if ranks.size > 1 and sampler.tokens_per_step is not None:
        sampler = replace(sampler, tokens_per_step=max(1, sampler.tokens_per_step // ranks.size))
    every = max(1, n_steps // config.n_validations)
    optimizer = _optimizer(network, config)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    average = WeightAverage(network, config.averaging) if config.averaging else None
    # The cache of autocast is that of all threads; one that leaves would clear it for the others.
    half = config.precision == "bf16"
    autocast = partial(torch.autocast, sampler.device.type, torch.bfloat16, enabled=half, cache_enabled=False)
    watch = _Watch(average.network if average else network, validate, config.patience)
    losses = None if ranks.size == 1 else ranks.averaging(_Loss(network))
    network.train()
    step = first_epoch = 0
    generators = (corruption, noise, features)
    # Dropout draws from the global generator, which other threads may use otherwise.
    draws = network.config.dropout > 0
    with seeded(seed + 3, sampler.device) if draws else nullcontext():
        kept = None if checkpoint is None else checkpoint.load(state)
        if kept is not None:
            step, first_epoch = kept["step"], kept["epoch"]
            network.load_state_dict(kept["network"])
            optimizer.load_state_dict(kept["optimizer"])
            if average:
                average.network.load_state_dict(kept["average"])
                average.n_updates = kept["n_updates"]
            watch.restore(kept["watch"])
            for generator, at in zip(generators, kept["generators"], strict=True):
                generator.set_state(at)
            if draws:
                set_random_state(kept["dropout"], sampler.device)
        elif tuned:
            if not watch.check(0, 0.0):
                return watch.diverged(0, config.learning_rate)
            network.train()
        ranks.wait()  # the first may go on to keep another state in place of this
        for epoch in range(first_epoch, n_epochs):
            if checkpoint is not None and checkpoint.due(state):
                now = {
                    "step": step,
                    "epoch": epoch,
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average.network.state_dict() if average else {},
                    "n_updates": average.n_updates if average else 0,
                    "watch": watch.state(),
                    "generators": [generator.get_state() for generator in generators],
                    "dropout": random_state(sampler.device) if draws else [],
                }
                checkpoint.save(state, now)
            own = data
            if ranks.size > 1:
                # Drawn anew for each epoch and rank, so that the state that the first keeps does for all.
                own = ranks.deal(data, [seed, epoch], whole=sampler.tokens_per_step is None, compact=sampler.windows)
                seeds = np.random.SeedSequence([seed, epoch, ranks.rank]).generate_state(3).tolist()
                corruption.manual_seed(seeds[0])
                noise.manual_seed(seeds[1])
                if draws:
                    reseed(seeds[2], sampler.device)
            made = sampler.epoch(own, corruption, (epoch / n_epochs, (epoch + 1) / n_epochs))
            batches = made if ahead is None else ahead(made)
            for batch, size in ranks.together(batches, partial(batch_size, network)):
                factor = learning_rate_factor(step, n_steps, config)
                for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * factor
                if step and step % config.redraw_every == 0:
                    network.encoder.redraw(features)
                kl_weight = KL_WEIGHT * min(1.0, (step + 1) / max(1, n_steps // 4))
                with autocast():
                    if losses is None:
                        loss = batch_loss(network, batch, kl_weight, noise)
                    else:
                        loss = losses(batch, kl_weight, noise, size)
                shown = ranks.mean(loss.detach())
                if not torch.isfinite(shown):
                    return watch.diverged(step, config.learning_rate)
                watch.confirm()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
                optimizer.step()
                if average:
                    average.update(network)
                watch.losses.append(shown)
                step += 1
                if step % every == 0:
                    if not watch.check(step, step / per_epoch):
                        return watch.diverged(step, config.learning_rate)
                    network.train()
                progress(step, step if watch.stop else n_steps, watch.best_score)
                if watch.stop:
                    logger.info(
                        "done at step %d of at most %d: what is held out would be predicted no better", step, n_steps
                    )
                    return watch.result()
            batches.close()  # what another rank has no part in is made no more
            if epoch == n_epochs - 1 and watch.losses and not watch.check(step, float(n_epochs)):
                return watch.diverged(step, config.learning_rate)
        progress(step, step, watch.best_score)  # the number of steps was planned to within a few
    return watch.result()
