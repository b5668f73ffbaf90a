"""Several networks that are trained at the same time, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from spaformer_sc._config import Training
from spaformer_sc._threads import Workers
from spaformer_sc.nn.network import Network

from .checkpoint import Checkpoint
from .progress import ProgressBar
from .ranks import Ranks
from .sequences import FieldCounts, Sampler
from .trainer import Diverged, History, planned_steps, train


@dataclass(frozen=True)
class Task:
    """A network to train: its number, the network at its start, how to train it, and the seed of what is random.

    ``tuned`` says that it has been trained before.
    """

    number: int
    network: Network
    training: Training
    seed: int
    tuned: bool


def train_abreast(
    tasks: Sequence[Task],
    data: Sequence[FieldCounts],
    sampler: Sampler,
    validate: Callable[[Network], float],
    workers: Workers,
    bar: ProgressBar,
    checkpoint: Checkpoint | None,
    ranks: Ranks,
) -> list[tuple[Network, History] | Diverged]:
    """Train networks that do not depend on each other; see :func:`.trainer.train`.

    Where there are fewer networks than threads, batches are made beside the training. Results depend on neither.

    Parameters
    ----------
    tasks
        The networks.
    data, sampler, validate
        As in :func:`.trainer.train`; each network has the number of tokens in a step that its training says.
    workers
        Threads to train in.
    bar
        Shows the progress of all.
    checkpoint
        Where trained networks, and the state of those in training, are kept; None for nowhere.
    ranks
        The processes that train together.

    Returns
    -------
    Trained networks and their histories, in the order of the tasks; an error in place of one that has nothing good.
    """
    # Dropout draws from a generator that all threads share; what several processes say to each other has one order.
    alone = ranks.size > 1 or any(task.network.config.dropout for task in tasks)
    n_abreast = 1 if alone else min(workers.n, len(tasks))
    samplers = {task.number: replace(sampler, tokens_per_step=task.training.tokens_per_step) for task in tasks}
    n_steps = {task.number: planned_steps(data, samplers[task.number], task.training)[1] for task in tasks}
    for number, n in n_steps.items():
        bar.plan(number, n)

    def run(task: Task, go_on: Callable[[], None]) -> tuple[Network, History] | Diverged:
        kept = None if checkpoint is None else checkpoint.load(f"network_{task.number}")
        if kept is not None:
            task.network.load_state_dict(kept["weights"])
            history = History(**kept["history"])
            bar.update(history.step[-1], history.step[-1], history.best_score, task.number)
            return task.network.eval(), history

        def progress(step: int, n_steps: int, score: float) -> None:
            bar.update(step, n_steps, score, task.number)
            go_on()

        try:
            trained, history = train(
                task.network,
                data,
                samplers[task.number],
                task.training,
                validate=validate,
                seed=task.seed,
                progress=progress,
                tuned=task.tuned,
                ahead=workers.ahead if workers.spare(n_abreast) else None,
                checkpoint=checkpoint,
                state=f"training_{task.number}",
                ranks=ranks,
            )
        except Diverged as error:
            return error.with_traceback(None)  # which holds the network, its optimiser and a batch
        if checkpoint is not None:
            checkpoint.save(f"network_{task.number}", {"weights": trained.state_dict(), "history": vars(history)})
            checkpoint.drop(f"training_{task.number}")
        return trained, history

    with bar:
        return workers.abreast(run, tasks, n_abreast, cost=lambda task: n_steps[task.number])
