"""The training loop: batch, step, log, validate, export, save; for one student or several."""

import math
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import distributed as dist

from potstill.console import is_main_rank, progress, say
from potstill.signals import Stopped
from pretrain.agreement import Agreement, from_main_rank
from pretrain.batches import Batch
from pretrain.checkpoint import CheckpointWriter, Progress
from pretrain.clock import Clock
from pretrain.config import RunConfig, ScheduleConfig
from pretrain.features import Feature
from pretrain.health import LoaderWatch
from pretrain.knowledge.source import StoredTeacher
from pretrain.learner import Learner, step_loss
from pretrain.meter import Meter
from pretrain.saving import AGAIN, Saver
from pretrain.signals import Signals
from pretrain.step import train_step, validation_terms, with_features
from pretrain.students import NOT_FINITE, Stop
from pretrain.teacher import Teacher


@dataclass(frozen=True)
class Run:
    """Everything the loop uses, ready made by `engine.py`.

    Attributes:
        learners: the students that still learn; one that diverges is taken out.
        stopped: those that do not, by name.
        batches: this rank's micro-batches from a step on. accumulation: how many make a step.
        validation: this rank's validation batches, each with whether it counts.
        probe: a few held-out rows, the same on every rank and at every start.
        write_rows: writes down which rows some steps took, and says where.
        teacher_flops: per token, for the features that it gives.
        schedule: how long the run is.
        save: whether checkpoints and exports are written (not in a dry run, nor a validation).
        goes_on: whether it goes on from a checkpoint of its own folder.
        begin: forgets what lies behind the checkpoint, and writes where the run goes on.
        tokens_per_step: of all ranks. peak_flops: of all devices together, if known.
        signals: those that end a run, as this rank sees them.
        writer: of checkpoints. loader_workers: processes that prepare batches.
    """

    learners: list[Learner]
    stopped: dict[str, Stop]
    teacher: Teacher | StoredTeacher | None
    batches: Callable[[int], Iterator[Batch]]
    accumulation: int
    validation: Callable[[], Iterator[tuple[Batch, bool]]]
    probe: Batch
    write_rows: Callable[[Learner, range], str]
    teacher_flops: Callable[[Set[Feature]], float]
    settings: RunConfig
    schedule: ScheduleConfig
    save: bool
    goes_on: bool
    begin: Callable[[], None]
    tokens_per_step: int
    peak_flops: float | None
    device: torch.device
    signals: Signals
    writer: CheckpointWriter
    loader_workers: int

    @property
    def last_step(self) -> float:
        """The step at which the run ends, infinite if only time ends it."""
        return math.inf if self.schedule.max_steps is None else self.schedule.max_steps


class _Told(Exception):
    """A signal came to some rank; all ranks raise this at the same place."""


class _GoBack(Exception):
    """The last updates were all left out; all ranks raise this at the same place."""


@dataclass
class Loop:
    """Where a run is, and the acts that take it further."""

    run: Run
    now: Progress
    meter: Meter = field(init=False)
    clock: Clock = field(init=False)
    agreement: Agreement = field(init=False)
    saver: Saver = field(init=False)
    loader: LoaderWatch = field(init=False)
    _waited: tuple[float, float] = field(init=False)
    """Seconds of waiting for data and of training, at the last line of metrics."""
    told: int = field(init=False, default=0)
    """The signal to obey, 0 for none; the same on every rank."""
    teacher: Teacher | StoredTeacher | None = field(init=False)
    teacher_share: float = field(init=False)
    """FLOPs of the teacher's forward per token and student."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.run.device, [learner.name for learner in self.run.learners])
        self.clock = Clock(self.now.seconds, self.run.device, self.meter)
        self.agreement = Agreement(self.run.device)
        place = (self.now.step, self.now.validated) if self.run.goes_on else None
        self.saver = Saver(
            self.agreement, self.run.writer, self.run.settings.keep_checkpoints, place
        )
        self._waited = 0.0, self.now.seconds
        self.loader = LoaderWatch(_tell, self.run.loader_workers)
        self._share_teacher()

    @contextmanager
    def obeying_signals(self) -> Iterator[None]:
        """A block that a signal ends at its next step, with a checkpoint of it.

        Raises:
            Stopped: a signal came to some rank.
        """
        with self.run.signals.deferred():
            try:
                yield
                self._ask()
                kept = "everything is saved"
            except _Told:
                self.save(hurried=True)
                self.saver.settle()
                kept = f"step {self.now.step} is saved: {AGAIN}" if self.saver.place else AGAIN
            if self.told:
                raise Stopped(self.told, kept)

    def train(self) -> Progress:
        """Train to the end of the run, or until no student is left; returns where it ended."""
        begun = self.now.step
        self.check_probe()
        self.run.begin()
        if self.now.validated == self.now.step:
            self._stop_hopeless()  # as an earlier start did
        with self.meter.running(), self.loader:
            while True:
                try:
                    self._advance()
                    break
                except _GoBack:
                    self._go_back()
        if self.now.step > begun:
            self._summarise()
        return self.now

    def _advance(self) -> None:
        """Train from here on to the end of the run."""
        run = self.run
        if self._validation_is_due():
            with self.clock.paused():
                self.validate()
        markers = [share for share in run.settings.markers() if share > self._share()]
        batches = run.batches(self.now.step)
        steps = None if math.isinf(run.last_step) else int(run.last_step)
        with progress(total=steps, initial=self.now.step, unit="step") as bar:
            while not self._finished():
                self.step(batches)
                bar.update()
                last = self._finished()
                if _due(self.now.step, run.settings.log_every) or self.now.step == 1 or last:
                    self._log()
                self._look_after_skipped()
                while markers and self._share() >= markers[0]:
                    self._export_marker(markers.pop(0))
                self._leave_if_told()
                if _due(self.now.step, run.settings.validate_every):
                    with self.clock.paused():
                        self.validate()
                if _due(self.now.step, run.settings.save_every):
                    self.save()

    def _validation_is_due(self) -> bool:
        """Before the first step, and where a signal came between a step and its validation."""
        if self.now.step == 0:
            return self.now.validated < 0
        due = _due(self.now.step, self.run.settings.validate_every) and not self._finished()
        return due and self.now.validated != self.now.step

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
        with self.meter.phase("data"), self.loader.waiting():
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
            seconds=self._ask(),
        )
        for learner, result in zip(run.learners, results, strict=True):
            flops = run.tokens_per_step * (learner.flops_per_token + self.teacher_share)
            learner.end_step(result, self.now, flops)

    def _ask(self) -> float:
        """Let all ranks know what any of them knows: a signal, a fault in writing.

        Returns:
            Rank 0's seconds of training, the same on every rank.

        Raises:
            TrainingError: rank 0 cannot write; all ranks raise it.
        """
        fault = next((x.metrics.fault for x in self.run.learners if x.metrics.fault), None)
        told, seconds, faulty = self.agreement.largest(
            float(self.run.signals.pending or 0),
            self.clock.seconds() if is_main_rank() else 0.0,
            float(fault is not None or self.saver.has_failed()),
            phase=self.meter.phase,
        )
        self.told = int(told)
        if self.told:
            self.run.signals.request(self.told)  # to another rank: this one leaves with it
        if faulty:
            self.saver.fail(fault)
        return seconds

    def _leave_if_told(self) -> None:
        if self.told:
            raise _Told

    def _between_batches(self) -> None:
        """Behind every batch of a validation: a long one is given up for a signal."""
        self._ask()
        self._leave_if_told()

    def _log(self) -> None:
        """One line of metrics per student; waits for the device and for the other ranks."""
        reading = self.meter.reading()  # waits
        if self.run.schedule.max_hours is None:  # what it is now that the device is done
            self.now = replace(self.now, seconds=self.clock.seconds())
        for learner in self.run.learners:
            learner.log(self.now, self.run.peak_flops, reading)
        waited, before = reading.data_seconds(), self._waited
        self._waited = waited, self.now.seconds
        share = self.loader.check(waited - before[0], self.now.seconds - before[1])
        for learner in self.run.learners if share else ():
            learner.metrics.write("event", self.now.step, event="slow data", share=share)
        self.saver.note_written()

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
            for learner in self.run.learners:
                learner.export(learner.folder / "markers" / f"{share:.2f}", self.now.step)

    def _look_after_skipped(self) -> None:
        """Go back, once, when a student's updates are left out again and again; then stop it.

        A fault that passes (a bad memory cell, a device) is mended by that. Students that learn
        together do not go back for one of them: it stops alone, the others go on.

        Raises:
            _GoBack: a lone student goes back to its last good checkpoint.
        """
        limit = self.run.settings.max_skipped_steps
        for learner in [x for x in self.run.learners if x.progress.skipped_in_a_row >= limit]:
            end = self.now.step
            where = self.run.write_rows(learner, range(end - limit, end))
            say(
                f"step {end}: {learner.title}{limit} updates in a row were not finite and left "
                f"out; their rows are in {where}"
            )
            alone = not learner.name and self.run.save
            if alone and not learner.progress.rolled_back and self._has_good(learner):
                raise _GoBack
            self._stop(learner, learner.loss()[0], NOT_FINITE)

    def _has_good(self, learner: Learner) -> bool:
        self.saver.settle()
        return from_main_rank(learner.last_good) is not None

    def _go_back(self) -> None:
        """Take up the last good checkpoint of the lone student."""
        (learner,) = self.run.learners
        checkpoint = from_main_rank(learner.last_good)
        assert checkpoint is not None
        say(f"step {self.now.step}: going back to {checkpoint.name}, this once")
        self.now = replace(learner.go_back(checkpoint), flops=0.0)
        self.saver.place = (self.now.step, self.now.validated)
        self.check_probe()

    def _stop(self, learner: Learner, loss: float, reason: str) -> None:
        """Take out a student that learns no more; the others go on. All ranks agree on it."""
        self.run.stopped[learner.name] = learner.stop(loss, reason)
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
        """Losses on the held-out rows; writes a line for each student that still learns.

        A student whose loss there is not finite, or above what was asked for, is stopped.
        """
        learners = list(self.run.learners)
        if not learners:
            return
        engines = [learner.engine for learner in learners]
        results, rows = validation_terms(
            engines, self.teacher, self.run.validation(), self._between_batches
        )
        for learner, result in zip(learners, results, strict=True):
            learner.write_validation(self.now, result, rows)
        self.now = replace(self.now, validated=self.now.step)
        self._stop_hopeless()

    def _stop_hopeless(self) -> None:
        """Stop the students whose last validation says that they will not learn enough."""
        early, share = self.run.settings.early_stop, self._share()
        for learner in list(self.run.learners):
            loss = learner.held_out
            if loss is None:
                continue
            if not math.isfinite(loss):
                self._stop(learner, loss, NOT_FINITE)
            elif early is not None and share < 1 and early.applies(share, loss):
                self.save(hurried=True)
                self._stop(learner, loss, early.reason(share, loss))

    def save(self, hurried: bool = False) -> None:
        """Begin to write checkpoints, if there is anything to save.

        None is written while updates are left out, since its weights may be the reason; but a
        run that is told to leave (`hurried`) has no other chance.
        """
        run = self.run
        in_doubt = any(learner.progress.skipped_in_a_row for learner in run.learners)
        if not run.save or not run.learners or self.now.step == 0:
            return
        if in_doubt and not hurried and not self._finished():
            return
        with self.clock.paused():
            self.saver.save(run.learners, self.now, self._probe)

    def _probe(self) -> list[dict[str, float]]:
        """The unweighted terms of each student's loss on the probe; all ranks call it."""
        learners = self.run.learners
        engines = [learner.engine for learner in learners]
        results, _ = validation_terms(engines, self.teacher, [(self.run.probe, True)])
        return [
            step_loss(learner.objective, [0.0] * len(result.sums), result)[1]
            for learner, result in zip(learners, results, strict=True)
        ]

    def check_probe(self) -> None:
        """Compare the loss on the probe with that which was saved with the checkpoint.

        Whatever went wrong in loading, it would show here.

        Raises:
            TrainingError: they differ by more than rounding explains.
        """
        if not any(learner.probe for learner in self.run.learners):
            return
        for learner, terms in zip(self.run.learners, self._probe(), strict=True):
            learner.check_probe(terms)


def _tell(message: str) -> None:
    """Say what a single rank has noticed: any of them may be the slow one."""
    with suppress(OSError):
        print(f"note: rank {dist.get_rank()}: {message}", file=sys.stderr, flush=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
