"""When checkpoints are written: begun between two steps, finished behind training's back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from potstill.errors import TrainingError
from pretrain.agreement import Agreement
from pretrain.checkpoint import CheckpointWriter, Progress
from pretrain.learner import Learner

AGAIN = "run the same command again to go on"


@dataclass
class Saver:
    """The checkpoints of a run's students.

    Attributes:
        keep: how many stay. place: step and last validation of the newest one, None for none.
    """

    agreement: Agreement
    writer: CheckpointWriter
    keep: int
    place: tuple[int, int] | None
    _learners: list[Learner] = field(init=False, default_factory=list)
    _unsettled: bool = field(init=False, default=False)
    """Whether one was begun of which not all ranks know that it stands."""
    _begun: tuple[int, float, float] | None = field(init=False, default=None)
    """Of the one that is being written: step, when it was begun, seconds that training waited."""

    def save(
        self,
        learners: Sequence[Learner],
        now: Progress,
        probe: Callable[[], list[dict[str, float]]],
    ) -> None:
        """Begin to write checkpoints, unless those of this very place stand; all ranks call it.

        Args:
            probe: measures each student's loss on the probe.
        """
        place = (now.step, now.validated)
        if self.place == place:
            return
        began = time.perf_counter()
        self.settle()
        if self.place is not None and self.place[0] == now.step:
            for learner in learners:
                learner.mark_validated(now)
        else:
            for learner, terms in zip(learners, probe(), strict=True):
                learner.save(now, terms, self.writer)
            self._begun = now.step, began, time.perf_counter() - began
            self._learners, self._unsettled = list(learners), True
        self.place = place

    def settle(self) -> None:
        """Wait until what is being written stands; all ranks call it.

        Raises:
            TrainingError: it cannot be written; what stood before stands still.
        """
        if not self._unsettled:
            return
        self._unsettled, fault = False, self._wait()
        if any(self.agreement.largest(float(fault is not None))):
            self.fail(fault)
        self.note_written()

    def has_failed(self) -> bool:
        """Whether what this rank was writing cannot be written."""
        return self.writer.has_failed()

    def fail(self, fault: str | None = None) -> None:
        """End the run because rank 0 cannot write; all ranks call it."""
        raise TrainingError(
            f"{fault or self._wait() or 'rank 0 cannot write'}; earlier checkpoints are as they "
            f"were: make room, then {AGAIN}"
        )

    def _wait(self) -> str | None:
        """Wait for the writer; what went wrong, None if nothing did."""
        fault = self.writer.settle()
        if fault:
            self._begun = None
        return fault

    def note_written(self) -> None:
        """Once a checkpoint stands: say so in the metrics, and let older ones go.

        Those go only when all students have the new one: a run that is killed in between goes on
        from the newest that all have.
        """
        if self._begun is None or not self.writer.is_done() or self.writer.has_failed():
            return
        (step, began, stalled), self._begun = self._begun, None
        for learner in self._learners:
            learner.saved(step, stalled, self.writer.ended - began)
        for learner in self._learners:
            learner.keep_newest(self.keep)
