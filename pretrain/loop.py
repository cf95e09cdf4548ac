"""The training loop: batch, step, log, validate, export, save."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from potstill.console import progress, say
from potstill.errors import TrainingError
from pretrain.batches import Batch
from pretrain.checkpoint import Progress, save_checkpoint
from pretrain.clock import Clock
from pretrain.config import RunConfig, ScheduleConfig
from pretrain.metrics import Metrics
from pretrain.schedules import LinearSchedule
from pretrain.step import StepResult, train_step, validation_terms
from pretrain.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """Everything the loop uses, ready made by `engine.py`.

    Attributes:
        batches: this rank's micro-batches from a step on.
        validation: this rank's validation batches, each with whether it counts.
        export: writes the student to a folder, for a step; all ranks call it.
        save: whether checkpoints and exports are written (not in a dry run, nor a validation).
        resumed: whether it goes on from a checkpoint.
        tokens_per_step: of all ranks. flops_per_token: of both models.
        peak_flops: of all devices together, if known.
    """

    engine: Any
    teacher: Teacher | None
    batches: Callable[[int], Iterator[Batch]]
    validation: Callable[[], Iterator[tuple[Batch, bool]]]
    export: Callable[[Path, int], None]
    metrics: Metrics
    settings: RunConfig
    schedule: ScheduleConfig
    save: bool
    resumed: bool
    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(str(self.settings.output))

    @property
    def last_step(self) -> float:
        """The step at which the run ends, infinite if only time ends it."""
        return math.inf if self.schedule.max_steps is None else self.schedule.max_steps


@dataclass
class Loop:
    """Where a run is, and the acts that take it further."""

    run: Run
    now: Progress
    clock: Clock = field(init=False)
    logged: Progress = field(init=False)
    skipped: int = field(init=False)
    saved: tuple[int, int] | None = field(init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        engine = self.run.engine
        weights = engine.module.objective.weights
        self.weights = torch.tensor(weights, dtype=torch.float64, device=engine.device)
        self.clock = Clock(self.now.seconds, self.run.engine.device)
        self.logged, self.skipped = self.now, self.run.engine.skipped_steps
        self.saved = (self.now.step, self.now.validated) if self.run.resumed else None

    def train(self) -> Progress:
        """Train to the end of the run; returns where it ended.

        Raises:
            TrainingError: the loss is not finite; that state is not saved.
        """
        run, schedule = self.run, _schedule(self.run.schedule)
        if self.now.step == 0 and self.now.validated < 0:
            with self.clock.paused():
                self.validate()
        markers = [share for share in run.settings.markers() if share > self._share()]
        batches = run.batches(self.now.step)
        steps = None if math.isinf(run.last_step) else int(run.last_step)
        with progress(total=steps, initial=self.now.step, unit="step") as bar:
            while not self._finished():
                rate = schedule.learning_rate(self.now.step, self.now.seconds)
                result = self._step(batches, rate)
                bar.update()
                last = self._finished()
                if _due(self.now.step, run.settings.log_every) or self.now.step == 1 or last:
                    self._log(result, rate)
                while markers and self._share() >= markers[0]:
                    self._export_marker(markers.pop(0), result)
                if _due(self.now.step, run.settings.validate_every):
                    with self.clock.paused():
                        self.validate()
                if _due(self.now.step, run.settings.save_every):
                    with self.clock.paused():
                        self.save(result)
        return self.now

    def _export_marker(self, share: float, result: StepResult) -> None:
        run = self.run
        if not run.save:
            return
        with self.clock.paused():
            _check_finite(step_loss(run.engine.module.objective, result)[0], self.now.step)
            run.export(run.folder / "markers" / f"{share:.2f}", self.now.step)

    def _finished(self) -> bool:
        hours = self.run.schedule.max_hours
        return self.now.step >= self.run.last_step or (
            hours is not None and self.now.seconds >= hours * 3600
        )

    def _share(self) -> float:
        """The share of the run that is done."""
        hours = self.run.schedule.max_hours
        by_time = self.now.seconds / (hours * 3600) if hours else 0.0
        return max(by_time, self.now.step / self.run.last_step if self.run.last_step else 1.0)

    def _step(self, batches: Iterator[Batch], rate: float) -> StepResult:
        run, engine = self.run, self.run.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        micro_batches = [next(batches) for _ in range(engine.gradient_accumulation_steps())]
        finished, seed = self.now.step + 1, run.settings.seed
        timed = run.schedule.max_hours is not None  # any step may turn out to be the last
        log = timed or _due(finished, run.settings.log_every) or finished in (1, run.last_step)
        result = train_step(
            engine, run.teacher, micro_batches, self.weights, seed, self.now.step, log
        )
        self.now = Progress(
            step=finished,
            tokens=self.now.tokens + run.tokens_per_step,
            flops=self.now.flops + run.tokens_per_step * run.flops_per_token,
            seconds=self.clock.agreed_seconds() if timed else self.clock.seconds(),
            validated=self.now.validated,
        )
        return result

    def _log(self, result: StepResult, rate: float) -> None:
        """One line of metrics; waits for the device and for the other ranks."""
        run, before = self.run, self.logged
        loss, terms = step_loss(run.engine.module.objective, result)
        _check_finite(loss, self.now.step)
        if run.schedule.max_hours is None:  # read after the device is done
            self.now = replace(self.now, seconds=self.clock.seconds())
        now = self.now
        seconds = now.seconds - before.seconds
        speed = (now.flops - before.flops) / seconds
        run.metrics.write(
            "train",
            now.step,
            loss=loss,
            terms=terms,
            lr=rate,
            grad_norm=result.grad_norm,
            tokens=now.tokens,
            seconds=now.seconds,
            tokens_per_second=(now.tokens - before.tokens) / seconds,
            flops=now.flops,
            mfu=speed / run.peak_flops if run.peak_flops else None,
        )
        skipped = run.engine.skipped_steps
        if skipped > self.skipped:
            run.metrics.write("event", now.step, event="skipped step", skipped_steps=skipped)
        self.logged, self.skipped = now, skipped

    def validate(self) -> float:
        """Loss on the held-out rows; writes a line and returns it."""
        run, objective = self.run, self.run.engine.module.objective
        result, rows = validation_terms(run.engine, run.teacher, run.validation())
        loss, terms = step_loss(objective, result)
        run.metrics.write("validation", self.now.step, loss=loss, terms=terms, rows=rows)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        say(f"step {self.now.step}: held-out {shown} ({rows} rows)")
        self.now = replace(self.now, validated=self.now.step)
        return loss

    def save(self, result: StepResult | None = None) -> None:
        """Write a checkpoint, unless the last step's loss is not finite or it is a dry run."""
        run = self.run
        if not run.save or self.saved == (self.now.step, self.now.validated):
            return
        if result is not None:
            _check_finite(step_loss(run.engine.module.objective, result)[0], self.now.step)
        folder = run.folder / "checkpoints"
        path = save_checkpoint(run.engine, folder, self.now, run.settings.keep_checkpoints)
        if self.saved is None or self.saved[0] != self.now.step:  # not only a validation since
            run.metrics.write("event", self.now.step, event="checkpoint", path=path.name)
        self.saved = (self.now.step, self.now.validated)


def step_loss(objective: Any, result: StepResult) -> tuple[float, dict[str, float]]:
    """Loss and unweighted terms of all ranks, as numbers; all ranks call it."""
    sums = result.sums.clone()
    dist.all_reduce(sums)
    values = (sums / result.counts).tolist()
    terms = dict(zip(objective.names, values, strict=True))
    return sum(w * v for w, v in zip(objective.weights, values, strict=True)), terms


def _check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss of step {step} is {loss}; nothing of it is saved. Start again from the last "
            "checkpoint (the same command does it) with a lower --lr or a longer --warmup"
        )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _schedule(settings: ScheduleConfig) -> LinearSchedule:
    if settings.schedule == "time":
        return LinearSchedule(settings.lr, settings.warmup, hours=settings.max_hours)
    return LinearSchedule(settings.lr, settings.warmup, steps=settings.max_steps)
