"""Workers on Ray apart from a grid: what their losses mean, and who gets in."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.grids.cluster import Cluster, Hand
from finetune.grids.connection import check_machine
from finetune.grids.settings import GridSettings
from finetune.grids.worker import Promise
from potstill.errors import InputError
from tests.conftest import REPOSITORY

ray = pytest.importorskip("ray", reason="the grid's extra, [cluster]")

STRANGER = "import ray; ray.init(address='{}', log_to_driver=False, configure_logging=False)"
WITHIN = """
import os, subprocess, sys
from pathlib import Path
from finetune.grids.connection import connected
from finetune.grids.settings import GridSettings
place, code = Path(sys.argv[1]), sys.argv[2]
settings = GridSettings(data=".", output=str(place), model=["x=."], workers=1)
with connected(settings, place, []) as cluster:
    code = code.format(cluster.ray.get_runtime_context().gcs_address)
    bare = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    for token in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_TOKEN": os.environ["RAY_AUTH_TOKEN"]}):
        tried = subprocess.run([sys.executable, "-c", code], env=bare | token, timeout=120)
        print("in" if tried.returncode == 0 else "out")
"""


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
        return [{"NodeID": "n", "Alive": True}]


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


@pytest.mark.slow
def test_ray_inside_the_program_lets_in_nobody_without_the_grids_token(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", WITHIN, str(tmp_path), STRANGER],
        cwd=REPOSITORY,
        env=bare | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout.split() == ["out", "in"]
    assert not (tmp_path / ".ray").exists()  # neither the note in the grid nor a token at home
