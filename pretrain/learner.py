"""One student in training: its engine, its place in the run, and what is written of it.

A lone run has one, a run with `--students` several; `loop.py` leads them through the same steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from potstill.console import is_main_rank, say
from potstill.errors import InputError, TrainingError
from pretrain.agreement import from_main_rank
from pretrain.batches import Batch
from pretrain.checkpoint import (
    CheckpointWriter,
    Progress,
    Record,
    checkpoints_in,
    load_state,
    name_of,
    read_record,
    remove_checkpoints,
    update_progress,
    verify_checkpoint,
)
from pretrain.engine_state import read_state, scale_is_at_floor, write_state
from pretrain.features import Feature
from pretrain.health import SpikeDetector
from pretrain.meter import Meter, Reading
from pretrain.metrics import Metrics
from pretrain.objectives.composite import WeightedSum
from pretrain.run_folder import CHECKPOINTS
from pretrain.schedules import LinearSchedule
from pretrain.step import StepResult, StudentStep
from pretrain.students import STOPPED, Stop
from pretrain.totals import Totals, totals

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}
"""Relative, between a loss before a checkpoint and after it, on other ranks and devices too."""


@dataclass
class Learner:
    """A student that learns.

    Attributes:
        name: "" in a lone run. folder: of its files.
        export: writes it to a folder, for a step; all ranks call it.
        seeds: of the run and of the student, for dropout.
        flops_per_token: of its own forward and backward.
        frozen: the parameters that are not trained, float32 copies by name.
        identity: of its run, for its checkpoints.
        progress: where it is; `flops` is what it cost so far, with its share of the teacher.
        probe_rows: a digest of the rows of the probe, which are few and fixed.
        probe: the terms of its loss on them when its checkpoint was saved, if that can be compared.
        held_out: its loss at the last validation, None before the first.
    """

    name: str
    folder: Path
    engine: Any
    export: Callable[[Path, int], None]
    metrics: Metrics
    schedule: LinearSchedule
    seeds: tuple[int, int]
    flops_per_token: float
    frozen: Mapping[str, Tensor]
    identity: dict[str, Any]
    progress: Progress
    probe_rows: str
    probe: dict[str, float] | None = None
    held_out: float | None = None
    _weights: list[float] = field(init=False)
    _logged: Progress = field(init=False)
    _read: Reading | None = field(init=False, default=None)
    _skipped: int = field(init=False)
    _taken: int = field(init=False)
    _spikes: SpikeDetector = field(init=False, default_factory=SpikeDetector)
    _told_floor: bool = field(init=False, default=False)
    _rate: float = field(init=False, default=0.0)
    _result: StepResult | None = field(init=False, default=None)
    _loss: tuple[float, dict[str, float]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._weights = self.objective.weights_at(0)
        self._logged = self.progress
        self._skipped = self._taken = self.engine.skipped_steps

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
        before = self.progress
        self.progress = replace(
            now,
            flops=before.flops + flops,
            skipped_in_a_row=before.skipped_in_a_row + 1 if self._was_skipped() else 0,
            rolled_back=before.rolled_back,
        )
        self._result, self._loss = result, None

    def _was_skipped(self) -> bool:
        """Whether the last update was left out for a reason that will not pass by itself.

        A loss scale that is too large under fp16 is no such reason: it is halved.
        """
        skipped, self._taken = self.engine.skipped_steps > self._taken, self.engine.skipped_steps
        at_floor = scale_is_at_floor(self.engine) if skipped else None
        if at_floor and not self._told_floor:
            self._told_floor = True
            self.metrics.write("event", self.progress.step + 1, event="loss scale at its floor")
            say(
                f"note: {self.title}the fp16 loss scale is at its floor and gradients still "
                "overflow; bf16 has no such limit, or give a lower lr or min_loss_scale"
            )
        return skipped and at_floor is not False

    def loss(self) -> tuple[float, dict[str, float]]:
        """Loss and terms of its last step over all ranks; waits for them, all of them call it."""
        assert self._result is not None, "no step has been taken"
        if self._loss is None:
            self._loss = step_loss(self.objective, self._weights, self._result)
        return self._loss

    def stop(self, loss: float, reason: str) -> Stop:
        """Say and write that it stops alone: its loss, or its gradients, stay not finite."""
        stop = Stop(self.progress.step, loss, reason)
        self.metrics.write("event", stop.step, event=STOPPED, loss=stop.loss, reason=stop.reason)
        say(f"step {stop.step}: {self.title}stopped, its loss is {stop.loss}: {stop.reason}")
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
        now = self.progress = self._own(now)
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
        if spike := self._spikes.check(loss):
            self.metrics.write("event", now.step, event="loss spike", factor=spike.factor)
            say(f"note: step {now.step}: {self.title}{spike}")
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

    def _own(self, now: Progress) -> Progress:
        """The run's progress with what is this student's own."""
        own = ("flops", "skipped_in_a_row", "rolled_back")
        return replace(now, **{name: getattr(self.progress, name) for name in own})

    def write_validation(self, now: Progress, result: StepResult, rows: int) -> None:
        """Write and say its loss on the held-out rows, with the objective's weights of `now`."""
        weights = self.objective.weights_at(self.schedule.done(now.step, now.seconds))
        loss, terms = step_loss(self.objective, weights, result)
        self.metrics.write("validation", now.step, loss=loss, terms=terms, rows=rows)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        say(f"step {now.step}: {self.title}held-out {shown} ({rows} rows)")
        self.held_out = loss

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / CHECKPOINTS

    def save(self, now: Progress, probe: dict[str, float], writer: CheckpointWriter) -> None:
        """Begin to write a checkpoint; all ranks call it."""
        state = read_state(self.engine)
        record = Record(
            progress=self._own(now),
            world_size=dist.get_world_size(),
            zero_stage=self.engine.zero_optimization_stage(),
            identity=self.identity,
            probe=probe,
            probe_rows=self.probe_rows,
            numbers=state.numbers,
            scale=state.scale,
            skipped=state.skipped,
            optimizer=state.optimizer,
        )
        if is_main_rank():
            writer.begin(self.checkpoints / name_of(now.step), state, self.frozen, record)

    def check_probe(self, terms: Mapping[str, float]) -> None:
        """Compare its loss on the probe, term by term, with that of its checkpoint.

        Raises:
            TrainingError: they differ by more than rounding explains.
        """
        limit = PROBE_TOLERANCE[next(self.engine.module.parameters()).dtype]
        for name, before in (self.probe or {}).items():
            now = terms.get(name, math.nan)
            same = abs(now - before) <= limit * abs(before) or not math.isfinite(before)
            if not same:
                raise TrainingError(
                    f"{self.title}after loading step {self.progress.step} the probe's {name} is "
                    f"{now:.6g}, and was {before:.6g} when it was saved: something else was "
                    "loaded, or the teacher has changed. Give --resume another checkpoint"
                )

    def saved(self, step: int, stalled: float, written: float) -> None:
        """Write that its checkpoint of a step stands; seconds that training waited, and in all."""
        self.metrics.write(
            "event",
            step,
            event="checkpoint",
            path=name_of(step),
            stalled_seconds=stalled,
            seconds=written,
        )

    def mark_validated(self, now: Progress) -> None:
        """Write into the checkpoint of this very step that only a validation came since."""
        checkpoint, progress = self.checkpoints / name_of(now.step), self._own(now)
        from_main_rank(lambda: update_progress(checkpoint, progress))

    def last_good(self) -> Path | None:
        """Its newest whole checkpoint that was saved while updates were taken."""
        for path in reversed(checkpoints_in(self.checkpoints)):
            try:
                if verify_checkpoint(path).progress.skipped_in_a_row == 0:
                    return path
            except InputError as error:
                say(f"note: {error}")
        return None

    def go_back(self, checkpoint: Path) -> Progress:
        """Take up the state of one of its earlier checkpoints, of which it is written that the run
        went back to it; later ones go. All ranks call it."""
        left, record = self.progress, read_record(checkpoint)
        back = replace(record.progress, rolled_back=left.rolled_back + 1)
        from_main_rank(lambda: self._forget_behind(checkpoint, back))
        write_state(self.engine, load_state(checkpoint)[0], back.step)
        self.progress = replace(back, seconds=left.seconds)
        self.probe = record.probe
        self._logged, self._result, self._loss = self.progress, None, None
        self._skipped = self._taken = self.engine.skipped_steps
        self.metrics.write(
            "event",
            back.step,
            event="rollback",
            from_step=left.step,
            to=checkpoint.name,
            skipped_steps=left.skipped_in_a_row,
        )
        return self.progress

    def _forget_behind(self, checkpoint: Path, back: Progress) -> None:
        later = [p for p in checkpoints_in(self.checkpoints) if p.name > checkpoint.name]
        remove_checkpoints(later)
        update_progress(checkpoint, back)
        self.metrics.cut_behind(back.step, back.validated)

    def keep_newest(self, number: int) -> None:
        """Remove all checkpoints but the newest `number`, and the last one that is good."""
        old = checkpoints_in(self.checkpoints)[:-number] if is_main_rank() else []
        if not old:
            return
        try:
            kept = self.last_good() if self.progress.skipped_in_a_row else None
            remove_checkpoints([path for path in old if path != kept])
        except OSError as error:  # untidy, but no reason to stop
            say(f"note: {error.filename}: an old checkpoint cannot be removed ({error.strerror})")


def step_loss(
    objective: WeightedSum, weights: Sequence[float], result: StepResult
) -> tuple[float, dict[str, float]]:
    """Loss and unweighted terms of all ranks, as numbers; all ranks call it."""
    sums = result.sums.clone()
    dist.all_reduce(sums)
    values = (sums / result.counts).tolist()
    terms = dict(zip(objective.names, values, strict=True))
    return sum(w * v for w, v in zip(weights, values, strict=True)), terms
