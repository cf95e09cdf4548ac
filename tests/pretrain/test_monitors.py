"""Monitors: real ones are written to, and none that fails can stop a run."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.metrics import Metrics
from pretrain.monitors import MONITORS, Monitors, without_monitors

# Tensorboard writes in a thread of its own, which prints why it ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def started(one_rank: None) -> Iterator[None]:
    """DeepSpeed's monitors ask it for the rank."""
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    yield
    deepspeed.comm.comm.cdb = None  # bound to this module's process group


def enabled(folder: Path, *names: str) -> dict[str, Any]:
    """A resolved ds_config with these monitors."""
    return {
        name: {"enabled": True, "output_path": str(folder / name), "job_name": "."}
        if name in ("tensorboard", "csv_monitor")
        else {"enabled": True}
        for name in names
    }


def monitored(folder: Path, *names: str, step: int = 0) -> Metrics:
    """Metrics that are mirrored to monitors."""
    metrics = Metrics(folder / "metrics.jsonl")
    metrics.monitor = Monitors(enabled(folder, *names), step, metrics.monitor_failed)
    return metrics


def column(folder: Path, name: str) -> list[list[str]]:
    with open(folder / "csv_monitor" / f"{name}.csv", newline="") as file:
        return list(csv.reader(file))[1:]


def events(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "event"]


def test_monitors_get_every_number_by_name_and_no_events(tmp_path: Path) -> None:
    metrics = monitored(tmp_path, "tensorboard", "csv_monitor")
    metrics.write("train", 3, loss=0.5, terms={"kd": 0.25}, mfu=None)
    metrics.write("event", 3, event="checkpoint", path="step-00000003")
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert written.Tags()["scalars"] == ["train/loss", "train/terms/kd"]
    assert [(e.step, e.value) for e in written.Scalars("train/terms/kd")] == [(3, 0.25)]
    assert column(tmp_path, "train_loss") == [["3", "0.5"]]
    assert len(events(tmp_path / "metrics.jsonl")) == 1


def test_monitors_that_cannot_start_are_named_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file in the place of the folder")
    metrics = monitored(tmp_path, "tensorboard", "wandb", "csv_monitor", step=7)
    metrics.write("train", 1, loss=0.5)
    metrics.write("train", 2, loss=0.25)
    failed = events(tmp_path / "metrics.jsonl")
    assert [(e["monitor"], e["step"]) for e in failed] == [("tensorboard", 7), ("wandb", 7)]
    assert "NotADirectoryError" in failed[0]["reason"] and "wandb" in failed[1]["reason"]
    assert column(tmp_path, "train_loss") == [["1", "0.5"], ["2", "0.25"]]
    printed = capsys.readouterr().out
    assert printed.count("note: the monitor tensorboard failed and is left out") == 1


def test_a_monitor_that_fails_in_training_is_left_out_and_the_lines_go_on(tmp_path: Path) -> None:
    metrics = monitored(tmp_path, "csv_monitor", "tensorboard")
    metrics.write("train", 1, loss=0.5)
    shutil.rmtree(tmp_path / "csv_monitor")
    for step in (2, 3):
        metrics.write("train", step, loss=0.25)
    (failed,) = events(tmp_path / "metrics.jsonl")
    assert (failed["monitor"], failed["step"]) == ("csv_monitor", 2)
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in written.Scalars("train/loss")] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_full_disk_under_tensorboard_does_not_stop_the_run(tmp_path: Path) -> None:
    metrics = monitored(tmp_path, "tensorboard")
    metrics.write("train", 1, loss=0.5)
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    file.unlink()
    file.symlink_to("/dev/full")
    for step in (2, 3):
        metrics.write("train", step, loss=0.5)
    (failed,) = events(tmp_path / "metrics.jsonl")
    assert failed["monitor"] == "tensorboard" and "No space left on device" in failed["reason"]


def test_other_ranks_have_no_monitors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not monitored(tmp_path, "tensorboard", "csv_monitor").monitor.enabled
    assert list(tmp_path.iterdir()) == []


def test_deepspeed_gets_a_config_without_monitors(tmp_path: Path) -> None:
    config = {"train_batch_size": 4, **enabled(tmp_path, *MONITORS)}
    assert without_monitors(config) == {"train_batch_size": 4}
