"""Workers on Ray apart from a grid: what their losses mean."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.grids.cluster import Cluster, Hand
from finetune.grids.connection import check_machine
from finetune.grids.settings import GridSettings
from finetune.grids.worker import Promise
from potstill.errors import InputError, TrainingError

ray = pytest.importorskip("ray", reason="the grid's extra, [cluster]")


class Lost:
    """What stands for Ray where a worker's answer is an error."""

    exceptions = ray.exceptions

    def __init__(self, error: Exception) -> None:
        self._error = error

    def wait(
        self, references: list[Any], num_returns: int, timeout: float
    ) -> tuple[Any, list[Any]]:
        """Every answer is there."""
        return references, []

    def get(self, reference: Any) -> Any:
        """The error."""
        raise self._error

    def nodes(self) -> list[dict[str, Any]]:
        """One node."""
        return [{"NodeID": "n", "Alive": True, "Resources": {}}]


def lost(error: Exception, ticket: Any) -> list[Any]:
    """The events of a cluster whose one worker gives an error for `ticket`."""
    cluster = Cluster(Lost(error), 1, Promise(Path("token"), ()))
    work = SimpleNamespace(remote=lambda *_: "reference")
    hand = Hand(SimpleNamespace(work=work), "n", "here")
    cluster.idle.append(hand)
    cluster._hands.append(hand)
    cluster.give(ticket)
    return list(cluster.wait(0))


@pytest.mark.parametrize(
    "error",
    [ray.exceptions.OutOfMemoryError("memory"), ray.exceptions.RaySystemError("lost")],
    ids=["Ray's own guard over the memory", "anything else"],
)
def test_a_worker_that_ray_ends_costs_its_trial_an_attempt_not_the_grid(error: Exception) -> None:
    (event,) = lost(error, "trial")
    assert (event.ticket, event.outcome, event.by_node) == ("trial", None, False)
    assert "its process died" in event.reason


@pytest.mark.parametrize("ticket", [None, "trial"])
def test_a_worker_for_a_node_that_just_died_costs_nothing(ticket: str | None) -> None:
    error = ray.exceptions.ActorUnschedulableError("the node does not exist any more")
    assert [event.by_node for event in lost(error, ticket)] == [True] * (ticket is not None)


def test_who_idles_on_a_node_that_is_gone_gets_no_trial() -> None:
    cluster = Cluster(Lost(ValueError()), 1, Promise(Path("token"), ()), limit=0)
    there, gone = Hand(None, "n", "here"), Hand(None, "m", "there")
    cluster.idle, cluster._hands = [there, gone], [there, gone]
    cluster.hire()
    assert cluster.idle == cluster._hands == [there]


def test_the_last_machine_that_leaves_is_no_fault_of_the_flags() -> None:
    cluster = Cluster(Lost(ValueError()), 1, Promise(Path("token"), ()))
    with pytest.raises(InputError, match="--threads 1: no machine of the cluster has room"):
        cluster.hire()
    cluster._had_workers, cluster._looked = True, -10.0
    with pytest.raises(TrainingError, match="no machine of the cluster is left"):
        cluster.hire()


def test_a_worker_that_cannot_start_ends_the_grid_with_a_line() -> None:
    with pytest.raises(InputError, match="node here: a worker cannot start"):
        lost(ray.exceptions.RaySystemError("no module"), None)


def test_more_workers_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    flags: dict[str, Any] = {"data": "d", "output": "o", "model": [f"a={tmp_path}"]}
    check_machine(GridSettings(**flags, workers=1))
    with pytest.raises(InputError, match="--workers 2: a trial takes a GPU of its own"):
        check_machine(GridSettings(**flags, workers=2))
