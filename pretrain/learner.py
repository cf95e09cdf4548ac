"""One student in training: its engine, its place in the run, and what is written of it.

A lone run has one, a run with `--students` several; `loop.py` leads them through the same steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import distributed as dist

from potstill.console import say
from pretrain.batches import Batch
from pretrain.checkpoint import Progress, remove_checkpoints, save_checkpoint, whole_checkpoints
from pretrain.features import Feature
from pretrain.meter import Meter, Reading
from pretrain.metrics import Metrics
from pretrain.objectives.composite import WeightedSum
from pretrain.schedules import LinearSchedule
from pretrain.step import StepResult, StudentStep
from pretrain.students import STOPPED, Stop
from pretrain.totals import Totals, totals


@dataclass
class Learner:
    """A student that learns.

    Attributes:
        name: "" in a lone run. folder: of its files.
        export: writes it to a folder, for a step; all ranks call it.
        seeds: of the run and of the student, for dropout.
        flops_per_token: of its own forward and backward.
        progress: where it is; `flops` is what it cost so far, with its share of the teacher.
    """

    name: str
    folder: Path
    engine: Any
    export: Callable[[Path, int], None]
    metrics: Metrics
    schedule: LinearSchedule
    seeds: tuple[int, int]
    flops_per_token: float
    progress: Progress
    _weights: list[float] = field(init=False)
    _logged: Progress = field(init=False)
    _read: Reading | None = field(init=False, default=None)
    _skipped: int = field(init=False)
    _rate: float = field(init=False, default=0.0)
    _result: StepResult | None = field(init=False, default=None)
    _loss: tuple[float, dict[str, float]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._weights = self.objective.weights_at(0)
        self._logged, self._skipped = self.progress, self.engine.skipped_steps

    @property
    def objective(self) -> WeightedSum:
        """What it learns."""
        return self.engine.module.objective

    @property
    def wanted(self) -> frozenset[Feature]:
        """The teacher's features that it learns from."""
        return self.objective.teacher_features()

    def begin_step(
        self, batches: Sequence[Batch], now: Progress, log: bool, meter: Meter
    ) -> StudentStep:
        """Its part of the next step, at the learning rate and the objective's weights of `now`."""
        phase = partial(meter.phase, student=self.name)
        self._weights = self.objective.weights_at(self.schedule.done(now.step, now.seconds))
        self._rate = self.schedule.learning_rate(now.step, now.seconds)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._rate
        return StudentStep(self.engine, batches, self._weights, self.seeds, now.step, log, phase)

    def end_step(self, result: StepResult, now: Progress, flops: float) -> None:
        """Take over what a step measured, and what it cost."""
        self.progress = replace(now, flops=self.progress.flops + flops)
        self._result, self._loss = result, None

    def loss(self) -> tuple[float, dict[str, float]]:
        """Loss and terms of its last step over all ranks; waits for them, all of them call it."""
        assert self._result is not None, "no step has been taken"
        if self._loss is None:
            self._loss = step_loss(self.objective, self._weights, self._result)
        return self._loss

    def has_diverged(self) -> bool:
        """Whether the loss of its last step, if it took one, is not finite; all ranks agree."""
        return self._result is not None and not math.isfinite(self.loss()[0])

    def stop(self) -> Stop:
        """Say and write that it stops alone, for its loss is not finite."""
        stop = Stop(self.progress.step, self.loss()[0])
        self.metrics.write("event", stop.step, event=STOPPED, loss=stop.loss)
        say(f"step {stop.step}: {self.title}stopped, its loss is {stop.loss}")
        return stop

    @property
    def title(self) -> str:
        """How lines for people name it; a lone run's student needs no name."""
        return f"{self.name}: " if self.name else ""

    def log(self, now: Progress, peak_flops: float | None, reading: Reading) -> None:
        """One line of metrics about the last step.

        Args:
            now: with the seconds of training until now. peak_flops: of all devices, if known.
            reading: of the meter, since the start.
        """
        (loss, terms), before, result = self.loss(), self._logged, self._result
        assert result is not None
        now = self.progress = replace(now, flops=self.progress.flops)
        seconds = now.seconds - before.seconds
        speed = (now.flops - before.flops) / seconds
        self.metrics.write(
            "train",
            now.step,
            loss=loss,
            terms=terms,
            lr=self._rate,
            grad_norm=self._grad_norm(result),
            tokens=now.tokens,
            seconds=now.seconds,
            tokens_per_second=(now.tokens - before.tokens) / seconds,
            flops=now.flops,
            mfu=speed / peak_flops if peak_flops else None,
            shares=reading.since(self._read).shares(self.name),
            memory_peak=reading.memory_peak,
        )
        self._read = reading
        skipped = self.engine.skipped_steps
        if skipped > self._skipped:
            self.metrics.write("event", now.step, event="skipped step", skipped_steps=skipped)
        self._logged, self._skipped = now, skipped

    def _grad_norm(self, result: StepResult) -> float | None:
        """The norm of the last step's gradients, None where DeepSpeed is told not to compute it."""
        norm = result.grad_norm
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def summarise(self, peak_flops: float | None) -> Totals:
        """Write and say what its run took, once its last step is logged."""
        assert self._read is not None, "no step has been logged"
        result = totals(self.progress, peak_flops, self._read, self.name)
        self.metrics.write("event", self.progress.step, event="summary", **result.record())
        for line in result.lines():
            say(f"{line[:11]}{self.title}{line[11:]}")
        return result

    def write_validation(self, now: Progress, result: StepResult, rows: int) -> None:
        """Write and say its loss on the held-out rows, with the objective's weights of `now`."""
        weights = self.objective.weights_at(self.schedule.done(now.step, now.seconds))
        loss, terms = step_loss(self.objective, weights, result)
        self.metrics.write("validation", now.step, loss=loss, terms=terms, rows=rows)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        say(f"step {now.step}: {self.title}held-out {shown} ({rows} rows)")

    def save(self, now: Progress, known: bool) -> None:
        """Write a checkpoint; `known`: only a validation came since the one of this step."""
        progress = replace(now, flops=self.progress.flops)
        path = save_checkpoint(self.engine, self.folder / "checkpoints", progress)
        if not known:
            self.metrics.write("event", now.step, event="checkpoint", path=path.name)

    def keep_newest(self, number: int) -> None:
        """Remove all checkpoints but the newest `number`."""
        remove_checkpoints(whole_checkpoints(self.folder / "checkpoints")[:-number])


def step_loss(
    objective: WeightedSum, weights: Sequence[float], result: StepResult
) -> tuple[float, dict[str, float]]:
    """Loss and unweighted terms of all ranks, as numbers; all ranks call it."""
    sums = result.sums.clone()
    dist.all_reduce(sums)
    values = (sums / result.counts).tolist()
    terms = dict(zip(objective.names, values, strict=True))
    return sum(w * v for w, v in zip(weights, values, strict=True)), terms
