"""A grid's loop on workers that do what the test says: retries, failures, starts from MNLI."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.grids.check import survey
from finetune.grids.cluster import Event, Hand
from finetune.grids.file import claim, describe
from finetune.grids.loop import Loop, Try
from finetune.grids.plan import FineTuning, plan
from finetune.grids.settings import GridSettings
from finetune.grids.tables import read_failed, write_tables
from finetune.grids.worker import Outcome, Worker
from finetune.results import read_result
from potstill.errors import TrainingError
from potstill.files import write_json
from tests.finetune.conftest import mnli_rows, write_parquet
from tests.finetune.test_grid_plan import rte

NAMES = ["entailment", "neutral", "contradiction"]
Answer = Callable[[Try, FineTuning, Path], Event]
HAND = Hand(None, "n", "here")


class Scripted:
    """Stands for a cluster with one worker, whose every answer comes from a function."""

    ray = None

    def __init__(self, answer: Answer) -> None:
        self.idle, self.replaced = [HAND], 0
        self.given: list[FineTuning] = []
        self._answer, self._events = answer, deque[Event]()

    def hire(self) -> None:
        """The one worker is there."""

    def give(self, ticket: Try, job: FineTuning, folder: Path, judge: Any) -> None:
        """Have the answer ready for `wait`."""
        self.given.append(job)
        self.idle.pop()
        self._events.append(self._answer(ticket, job, folder))

    def wait(self, seconds: float) -> Iterator[Event]:
        """The answers so far."""
        while self._events:
            self.idle = [HAND]
            yield self._events.popleft()

    def replace(self, hand: Hand) -> None:
        """Count it."""
        self.replaced += 1


def grid(place: Path, bert: Path, answer: Answer, **flags: Any) -> tuple[Scripted, Path]:
    """Run a grid of one configuration on RTE's kind of rows, but for `flags`; its folder."""
    given: dict[str, Any] = {"lr": "1e-3", "batch_size": "16", "epochs": "1", "max_length": 32}
    settings = GridSettings(
        data=str(rte(place / "data")),
        output=str(place / "grid"),
        model=[f"tiny={bert}"],
        **(given | {"tasks": "rte", "seeds": 1} | flags),
    )
    found = survey(settings)
    cluster = Scripted(answer)
    with claim(place / "grid", describe(settings, found)):
        loop = Loop(plan(settings, found), settings, lambda: None)
        loop.run(cluster)  # type: ignore[arg-type]
        write_tables(place / "grid")
    return cluster, place / "grid"


def real(ticket: Try, job: FineTuning, folder: Path) -> Event:
    """What a worker does, in this process."""
    return Event(ticket, HAND, outcome=Worker(1).work(job, folder, None))


class Raising:
    """Stands for a trial that ends with an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def run(self, _: Any) -> dict[str, Any]:
        """Raise it."""
        raise self._error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TrainingError("the loss is nan"), "failed"),
        (MemoryError(), "died"),
        (OSError(12, "Cannot allocate memory"), "died"),
        (RuntimeError("CUDA error: device-side assert triggered"), "died"),
    ],
)
def test_what_nobody_foresaw_costs_the_worker_and_what_would_happen_again_the_trial(
    tmp_path: Path, error: Exception, kind: str
) -> None:
    outcome = Worker(1).work(Raising(error), tmp_path, None)
    assert outcome.kind == kind
    assert str(error) in outcome.reason


def test_a_trial_that_finished_behind_our_back_did_not_fail(tmp_path: Path) -> None:
    for name, files in (("a", ["failed.json"]), ("b", ["failed.json", "result.json"])):
        for file in files:
            write_json(tmp_path / f"trials/rte/{name}/1/{file}", {"reason": "lost", "attempts": 1})
    assert [one["model"] for one in read_failed(tmp_path)] == ["a"]


def test_memory_that_runs_out_means_halves_then_quarters_then_a_failure(
    tmp_path: Path, bert: Path
) -> None:
    def answer(ticket: Try, job: FineTuning, folder: Path) -> Event:
        return Event(ticket, HAND, outcome=Outcome("died", reason="MemoryError: full"))

    cluster, output = grid(tmp_path, bert, answer)
    assert [job.train.accumulation for job in cluster.given] == [1, 2, 4]
    assert cluster.replaced == 3  # its memory may be full of what failed
    (failed,) = read_failed(output)
    assert (failed["attempts"], failed["reason"]) == (3, "MemoryError: full")
    assert (
        "| rte | tiny | 0.001-16-1-0 | 3 | MemoryError: full |"
        in (output / "summary.md").read_text()
    )


def test_a_node_that_dies_counts_as_no_attempt(tmp_path: Path, bert: Path) -> None:
    def answer(ticket: Try, job: FineTuning, folder: Path) -> Event:
        if ticket.node_deaths < 4:
            return Event(ticket, HAND, reason="its process died", by_node=True)
        return real(ticket, job, folder)

    cluster, output = grid(tmp_path, bert, answer)
    assert [job.train.accumulation for job in cluster.given] == [1] * 5
    assert not read_failed(output)


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """MNLI's and RTE's kind of rows in one folder."""
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_parquet(tmp_path / f"data/mnli/{split}.parquet", mnli_rows(30, NAMES), NAMES)
    return tmp_path


def test_rte_starts_from_the_encoder_of_the_models_own_mnli(both: Path, bert: Path) -> None:
    flags = {"tasks": "rte,mnli", "start_from_task": "mnli", "save_models": "all"}
    cluster, output = grid(both, bert, real, **flags)
    assert [job.data.task for job in cluster.given] == ["mnli", "rte"]
    assert cluster.given[1].where.model == str(output / "from_mnli/tiny")
    result = read_result(output / "trials/rte/tiny/0.001-16-1-0")
    assert result is not None
    assert any("classifier" in name for name in result["fresh_parameters"])
    tables = json.loads((output / "results.json").read_text())
    assert {one["task"]: one["started_from"] for one in tables["best"]} == {
        "mnli": None,
        "rte": "mnli",
    }


def test_where_mnli_fails_what_waits_for_it_fails_with_the_reason_and_runs_with_it_again(
    both: Path, bert: Path
) -> None:
    def answer(ticket: Try, job: FineTuning, folder: Path) -> Event:
        return Event(ticket, HAND, outcome=Outcome("failed", reason="the loss is not finite"))

    flags = {"tasks": "rte,mnli", "start_from_task": "mnli"}
    cluster, output = grid(both, bert, answer, **flags)
    assert len(cluster.given) == 1
    reasons = {one["task"]: one["reason"] for one in read_failed(output)}
    assert reasons["mnli"] == "the loss is not finite"
    assert reasons["rte"] == "no trial of mnli finished to start from"

    cluster, output = grid(both, bert, real, **flags)
    assert [job.data.task for job in cluster.given] == ["mnli", "rte"]
    assert not read_failed(output)
