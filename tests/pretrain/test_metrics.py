"""metrics.jsonl: whole lines, each step once, mirrored to DeepSpeed's monitor."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.metrics import Metrics


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_lines_hold_kind_step_and_values_in_order(path: Path) -> None:
    metrics = Metrics(path)
    metrics.write("train", 1, loss=0.1, terms={"att-mse": 0.1})
    metrics.write("event", 1, event="export", path="student")
    assert lines(path) == [
        {"kind": "train", "step": 1, "loss": 0.1, "terms": {"att-mse": 0.1}},
        {"kind": "event", "step": 1, "event": "export", "path": "student"},
    ]


def test_losses_survive_the_file_bitwise(path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, 2 / 3]
    for step, value in enumerate(values):
        Metrics(path).write("train", step, loss=value)
    assert [line["loss"] for line in lines(path)] == values


def test_a_resume_drops_the_steps_that_it_repeats(path: Path) -> None:
    metrics = Metrics(path)
    for step in (1, 2, 3, 4):
        metrics.write("train", step, loss=float(step))
    metrics.cut_behind(2, 0)
    metrics.write("train", 3, loss=30.0)
    assert [(line["step"], line["loss"]) for line in lines(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_validation_that_the_checkpoint_does_not_know_is_dropped(path: Path) -> None:
    """A start that was killed behind it, before the next checkpoint, would repeat it."""
    metrics = Metrics(path)
    for kind, step in (("validation", 24), ("train", 30), ("validation", 30)):
        metrics.write(kind, step, loss=1.0)
    metrics.cut_behind(30, 24)
    assert [(line["kind"], line["step"]) for line in lines(path)] == [
        ("validation", 24),
        ("train", 30),
    ]


def test_a_torn_last_line_is_dropped(path: Path) -> None:
    Metrics(path).write("train", 1, loss=1.0)
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    Metrics(path).cut_behind(5, -1)
    assert [line["step"] for line in lines(path)] == [1]


def test_a_run_that_starts_afresh_drops_everything(path: Path) -> None:
    Metrics(path).write("validation", 0, loss=1.0)
    Metrics(path).cut_behind(-1, -1)
    assert path.read_text() == ""


def test_other_ranks_and_dry_runs_write_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Metrics(None).write("train", 1, loss=1.0)
    monkeypatch.setenv("RANK", "1")
    Metrics(path).write("train", 1, loss=1.0)
    assert not path.exists()


def test_the_monitor_gets_every_number_by_name_and_no_events(path: Path) -> None:
    seen: list[tuple[str, float, int]] = []
    metrics = Metrics(path, SimpleNamespace(enabled=True, write_events=seen.extend))
    metrics.write("train", 3, loss=0.5, terms={"kd": 0.2, "mlm": 0.3}, mfu=None)
    metrics.write("event", 3, event="checkpoint", path="step-00000003")
    assert seen == [
        ("train/loss", 0.5, 3),
        ("train/terms/kd", 0.2, 3),
        ("train/terms/mlm", 0.3, 3),
    ]


def test_a_monitor_that_is_off_is_left_alone(path: Path) -> None:
    def write_events(_: Any) -> None:
        pytest.fail("written to a monitor that is off")

    Metrics(path, SimpleNamespace(enabled=False, write_events=write_events)).write("train", 1, a=1)
