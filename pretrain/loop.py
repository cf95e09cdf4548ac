"""The training loop: batch, step, log, validate, export, save; for one student or several."""

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace

import torch

from potstill.console import progress, say
from pretrain.batches import Batch
from pretrain.checkpoint import Progress
from pretrain.clock import Clock
from pretrain.config import RunConfig, ScheduleConfig
from pretrain.features import Feature
from pretrain.learner import Learner
from pretrain.meter import Meter
from pretrain.step import train_step, validation_terms, with_features
from pretrain.students import Stop
from pretrain.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """Everything the loop uses, ready made by `engine.py`.

    Attributes:
        learners: the students that still learn; one that diverges is taken out.
        stopped: those that do not, by name.
        batches: this rank's micro-batches from a step on. accumulation: how many make a step.
        validation: this rank's validation batches, each with whether it counts.
        teacher_flops: per token, for the features that it gives.
        schedule: how long the run is.
        save: whether checkpoints and exports are written (not in a dry run, nor a validation).
        resumed: whether it goes on from a checkpoint.
        tokens_per_step: of all ranks. peak_flops: of all devices together, if known.
    """

    learners: list[Learner]
    stopped: dict[str, Stop]
    teacher: Teacher | None
    batches: Callable[[int], Iterator[Batch]]
    accumulation: int
    validation: Callable[[], Iterator[tuple[Batch, bool]]]
    teacher_flops: Callable[[Set[Feature]], float]
    settings: RunConfig
    schedule: ScheduleConfig
    save: bool
    resumed: bool
    tokens_per_step: int
    peak_flops: float | None
    device: torch.device

    @property
    def last_step(self) -> float:
        """The step at which the run ends, infinite if only time ends it."""
        return math.inf if self.schedule.max_steps is None else self.schedule.max_steps


@dataclass
class Loop:
    """Where a run is, and the acts that take it further."""

    run: Run
    now: Progress
    meter: Meter = field(init=False)
    clock: Clock = field(init=False)
    saved: tuple[int, int] | None = field(init=False)
    teacher: Teacher | None = field(init=False)
    teacher_share: float = field(init=False)
    """FLOPs of the teacher's forward per token and student."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.run.device, [learner.name for learner in self.run.learners])
        self.clock = Clock(self.now.seconds, self.run.device, self.meter)
        self.saved = (self.now.step, self.now.validated) if self.run.resumed else None
        self._share_teacher()

    def train(self) -> Progress:
        """Train to the end of the run, or until no student is left; returns where it ended."""
        run, begun = self.run, self.now.step
        if self.now.step == 0 and self.now.validated < 0:
            with self.clock.paused():
                self.validate()
        markers = [share for share in run.settings.markers() if share > self._share()]
        batches = run.batches(self.now.step)
        steps = None if math.isinf(run.last_step) else int(run.last_step)
        bar = progress(total=steps, initial=self.now.step, unit="step")
        with bar, self.meter.running():
            while not self._finished():
                self.step(batches)
                bar.update()
                last = self._finished()
                if _due(self.now.step, run.settings.log_every) or self.now.step == 1 or last:
                    self._log()
                while markers and self._share() >= markers[0]:
                    self._export_marker(markers.pop(0))
                if _due(self.now.step, run.settings.validate_every):
                    with self.clock.paused():
                        self.validate()
                if _due(self.now.step, run.settings.save_every):
                    with self.clock.paused():
                        self.save()
        if self.now.step > begun:
            self._summarise()
        return self.now

    def _finished(self) -> bool:
        hours = self.run.schedule.max_hours
        out_of_time = hours is not None and self.now.seconds >= hours * 3600
        return not self.run.learners or self.now.step >= self.run.last_step or out_of_time

    def _share(self) -> float:
        """The share of the run that is done."""
        hours = self.run.schedule.max_hours
        by_time = self.now.seconds / (hours * 3600) if hours else 0.0
        return max(by_time, self.now.step / self.run.last_step if self.run.last_step else 1.0)

    def step(self, batches: Iterator[Batch]) -> None:
        """One update of every student that still learns, from the next micro-batches."""
        run = self.run
        with self.meter.phase("data"):
            micro_batches = [next(batches) for _ in range(run.accumulation)]
        finished = self.now.step + 1
        timed = run.schedule.max_hours is not None  # any step may turn out to be the last
        log = timed or _due(finished, run.settings.log_every) or finished in (1, run.last_step)
        steps = [
            learner.begin_step(micro_batches, self.now, log, self.meter) for learner in run.learners
        ]
        features = with_features(self.teacher, micro_batches, run.device, self.meter.phase)
        results = train_step(steps, features)
        self.now = replace(
            self.now,
            step=finished,
            tokens=self.now.tokens + run.tokens_per_step,
            seconds=self.clock.agreed_seconds() if timed else self.clock.seconds(),
        )
        for learner, result in zip(run.learners, results, strict=True):
            flops = run.tokens_per_step * (learner.flops_per_token + self.teacher_share)
            learner.end_step(result, self.now, flops)

    def _log(self) -> None:
        """One line of metrics per student; waits for the device and for the other ranks."""
        self._stop_diverged()
        if self.run.schedule.max_hours is None:  # read after the device is done
            self.now = replace(self.now, seconds=self.clock.seconds())
        reading = self.meter.reading()
        for learner in self.run.learners:
            learner.log(self.now, self.run.peak_flops, reading)

    def _summarise(self) -> None:
        """What the run took, for each student that learned to the end; the papers' beside."""
        results = [learner.summarise(self.run.peak_flops) for learner in self.run.learners]
        if results:
            together = replace(results[0], flops=sum(result.flops for result in results))
            for line in together.paper_lines():
                say(line)

    def _export_marker(self, share: float) -> None:
        if not self.run.save:
            return
        with self.clock.paused():
            self._stop_diverged()
            for learner in self.run.learners:
                learner.export(learner.folder / "markers" / f"{share:.2f}", self.now.step)

    def _stop_diverged(self) -> None:
        """Take out the students whose last loss is not finite; the others go on.

        Nothing of such a state is ever saved. The loss is that of all ranks, so they agree.
        """
        for learner in [learner for learner in self.run.learners if learner.has_diverged()]:
            self.run.stopped[learner.name] = learner.stop()
            self.run.learners.remove(learner)
            self._share_teacher()

    def _share_teacher(self) -> None:
        """Let the teacher give what the students want that still learn, and no more."""
        learners = self.run.learners
        wanted = frozenset[Feature]().union(*(learner.wanted for learner in learners))
        self.teacher = self.run.teacher if wanted else None
        if self.teacher is not None:
            self.teacher.wanted = wanted
        self.teacher_share = self.run.teacher_flops(wanted) / max(1, len(learners))

    def validate(self) -> None:
        """Losses on the held-out rows; writes a line for each student that still learns."""
        self._stop_diverged()
        learners = self.run.learners
        if not learners:
            return
        engines = [learner.engine for learner in learners]
        results, rows = validation_terms(engines, self.teacher, self.run.validation())
        for learner, result in zip(learners, results, strict=True):
            learner.write_validation(self.now, result, rows)
        self.now = replace(self.now, validated=self.now.step)

    def save(self) -> None:
        """Write checkpoints, unless the last step's loss is not finite or it is a dry run.

        Old ones go only when all students have the new one: a run that is killed in between
        goes on from the newest that all have.
        """
        if not self.run.save or self.saved == (self.now.step, self.now.validated):
            return
        self._stop_diverged()
        known = self.saved is not None and self.saved[0] == self.now.step
        for learner in self.run.learners:
            learner.save(self.now, known)
        for learner in self.run.learners:
            learner.keep_newest(self.run.settings.keep_checkpoints)
        self.saved = (self.now.step, self.now.validated)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
