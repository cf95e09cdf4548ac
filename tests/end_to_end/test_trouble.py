"""What a run does when its numbers, its disk or its checkpoints fail."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from data_prep.shard_format import TRAIN, ShardReader
from potstill.files import read_sealed_json, sha256_of, write_sealed_json
from potstill.lock import hold
from pretrain.checkpoint import RECORD, WEIGHTS, verify_checkpoint
from pretrain.order import Order
from tests.launch import (
    REPOSITORY,
    SEVERAL,
    START_LIMIT,
    Materials,
    by_run,
    environment,
    flags,
    losses,
    metrics,
    runs,
    write_ds_config,
)
from tests.launch import materials_fixture as materials_fixture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, LIMIT, SEED = 16, 3, 7
FAULTS = ("LossOnce", "GradientOnce", "InfiniteLossOnce")
STAGES = (0, 1, 2, 3)


def command_line(materials: Materials, root: Path, name: str, **given: Any) -> list[str]:
    common: dict[str, Any] = dict(
        data=materials.ragged,
        teacher=materials.teacher,
        student_layers=2,
        dropout=0.1,
        max_steps=STEPS,
        log_every=1,
        validate_every=1,
        save_every=4,
        max_skipped_steps=LIMIT,
        seed=SEED,
        lr=2e-3,
    )
    return flags(**{**common, "output": root / name, **given})


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Started runs find the faulty objectives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        yield


@pytest.fixture(scope="module")
def folder(materials: Materials) -> Path:
    """Runs of two ranks: `Sound`, `FAULT-STAGE`, `Passing`, `Lasting`, and what they printed."""
    root = materials.folder / "trouble"
    root.mkdir()

    def run(name: str, objective: str, stage: int) -> list[str]:
        config = write_ds_config(root / f"z{stage}.json", zero_optimization={"stage": stage})
        faulty = f"tests.end_to_end.faulty:{objective}"
        return command_line(materials, root, name, ds_config=config, objective=faulty)

    several = [run(f"Sound-{stage}", "Sound", stage) for stage in (0, 3)]
    several += [run(f"{fault}-{stage}", fault, stage) for fault in FAULTS for stage in STAGES]
    several += [run(f"Passing-{stage}", "Passing", stage) for stage in (0, 3)]
    several.append(run("Lasting", "Lasting", 1))
    (done,) = runs(materials, "trouble", (2, several))
    statuses = [status for status, _ in by_run(done.errors)]
    assert statuses == [0] * len(several[1:]) + [1], done.output[-3000:] + done.errors[-5000:]
    assert done.statuses == [1, 1]
    (root / "errors").write_text(done.errors)
    return root


def held_out(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run, "validation")]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in metrics(run, "event") if line["event"] == name]


# --- numbers that are not finite


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_update_that_is_not_finite_is_left_out_and_counted(
    folder: Path, fault: str, stage: int
) -> None:
    """By all ranks, though only one of them met it."""
    run, sound = folder / f"{fault}-{stage}", folder / "Sound-0"
    assert [line["skipped_steps"] for line in events(run, "skipped step")] == [1]
    assert events(run, "skipped step")[0]["step"] == 5
    assert losses(run)[:4] == pytest.approx(losses(sound)[:4], rel=1e-5)
    assert math.isfinite(losses(run)[4]) == (fault == "GradientOnce")
    before, after = held_out(run)[4:6]
    assert before == after, "the weights stayed as they were"
    assert held_out(run)[6] != after and len(losses(run)) == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimiser_is_as_if_the_left_out_step_had_not_been(folder: Path, stage: int) -> None:
    """Under every stage alike: the same losses follow."""
    plain = losses(folder / "LossOnce-0")[5:]
    for fault in FAULTS:
        assert losses(folder / f"{fault}-{stage}")[5:] == pytest.approx(plain, rel=1e-5), fault


@pytest.mark.parametrize("stage", (0, 3))
def test_after_several_in_a_row_the_run_goes_back_and_on_as_if_nothing_had_been(
    folder: Path, stage: int
) -> None:
    run, sound = folder / f"Passing-{stage}", folder / f"Sound-{stage}"
    (rollback,) = events(run, "rollback")
    assert (rollback["step"], rollback["from_step"]) == (8, 12)
    assert losses(run) == losses(sound) and held_out(run) == held_out(sound)
    ours, theirs = (load_file(r / "student" / "model.safetensors") for r in (run, sound))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_rows_of_the_steps_that_failed_are_written_down(
    folder: Path, materials: Materials
) -> None:
    written = json.loads((folder / "Passing-0" / "skipped-00000010-00000012.json").read_text())
    reader = ShardReader(materials.ragged, TRAIN)
    order = Order(reader.rows, SEED)
    assert list(written) == ["10", "11", "12"]
    for step, rows in written.items():
        samples = np.arange(8) + (int(step) - 1) * 8
        epochs, expected = order(samples)
        assert [row["row"] for row in rows] == expected.tolist()  # one shard
        assert [row["epoch"] for row in rows] == epochs.tolist()
        assert {row["file"] for row in rows} == {"train-00000-of-00001.h5"}


def test_a_run_goes_back_once_and_then_stops(folder: Path) -> None:
    run = folder / "Lasting"
    assert len(events(run, "rollback")) == 1 and len(events(run, "stopped")) == 1
    newest = max((run / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000008", "nothing is saved of a state in doubt"
    assert verify_checkpoint(newest).progress.skipped_in_a_row == 0
    assert not (run / "student").exists()
    errors = [x for x in (folder / "errors").read_text().splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and "nan" in errors[0] and "lower lr" in errors[0]


# --- runs of one rank, behind one another in one start

MOUNT = ("unshare", "-rm", "sh", "-c")
ON_DISK = 'mount -t tmpfs -o size=1500k none "$1" || exit; shift; '


@pytest.fixture(scope="module")
def alone(folder: Path, materials: Materials) -> Mapping[str, tuple[int, str]]:
    """Status and errors by name: `early`, `early again`, `held`, `other weights` and, where one may
    mount a disk, `full` and `enlarged`, whose folders are copied to `full` and `enlarged`."""
    early = dict(early_stop_after=0.3, early_stop_loss=1e-6, validate_every=2)
    for name in ("held", "other-weights"):
        shutil.copytree(folder / "Sound-0", folder / name)
        shutil.rmtree(folder / name / "student")
    spoil_weights(folder / "other-weights")
    several: dict[str, list[str]] = {
        "early": again(materials, folder, "early", **early),
        "early again": again(materials, folder, "early", **early),
        "held": again(materials, folder, "held"),
        "other weights": again(materials, folder, "other-weights"),
    }
    items: list[list[str] | str] = [*several.values()]
    place, tool = folder / "small", list[str]()
    place.mkdir()
    trial = [*MOUNT, f"{ON_DISK}true", "sh", str(place)]
    if not subprocess.run(trial, capture_output=True).returncode:
        tool = [*MOUNT, f'{ON_DISK}exec "$@"', "sh", str(place)]
        config = write_ds_config(folder / "one.json", 8)
        given = dict(ds_config=config, objective="att-mse", keep_checkpoints=9)
        words = again(materials, folder, "small/run", **given)
        several |= {"full": words, "enlarged": words}
        full, enlarged = (f"cp -a '{place}/run' '{folder}/{name}'" for name in ("full", "enlarged"))
        items += [words, f"{full}; mount -o remount,size=64m '{place}'", words, enlarged]
    (folder / "alone.json").write_text(json.dumps(items))
    with hold(folder / "held" / ".lock", "held by the test"):
        done = subprocess.run(
            [*tool, sys.executable, str(SEVERAL), str(folder / "alone.json")],
            env=environment(materials.folder),
            cwd=materials.folder,
            capture_output=True,
            text=True,
            timeout=START_LIMIT,
        )
    ended = by_run(done.stderr)
    assert len(ended) == len(several) and "Traceback" not in done.stderr, done.stderr[-5000:]
    return dict(zip(several, ended, strict=True))


def test_a_run_that_learns_too_little_by_its_time_stops_with_a_checkpoint(
    folder: Path, alone: Mapping[str, tuple[int, str]]
) -> None:
    for start in ("early", "early again"):  # the second trains no further
        status, errors = alone[start]
        assert status == 1 and "--early_stop_loss 1e-06" in errors
    assert len(losses(folder / "early")) == 6, "the first validation behind 30 % of 16 steps"
    newest = max((folder / "early" / "checkpoints").glob("step-*"))
    assert verify_checkpoint(newest).progress.step == 6


# --- checkpoints and folders


def spoil_weights(root: Path) -> None:
    """Make a run's newest checkpoint but one its newest, of other weights; whole by checksums."""
    shutil.rmtree(max((root / "checkpoints").glob("step-*")))
    newest = max((root / "checkpoints").glob("step-*"))
    weights = load_file(newest / WEIGHTS)
    save_file({name: w * 0.5 if w.ndim > 1 else w for name, w in weights.items()}, newest / WEIGHTS)
    record = read_sealed_json(newest / RECORD)
    record["files"][WEIGHTS]["sha256"] = sha256_of(newest / WEIGHTS)
    record["files"][WEIGHTS]["bytes"] = (newest / WEIGHTS).stat().st_size
    write_sealed_json(newest / RECORD, record)


def again(materials: Materials, folder: Path, name: str, **given: Any) -> list[str]:
    """The command line of `Sound-0`, in another folder."""
    config, objective = folder / "z0.json", "tests.end_to_end.faulty:Sound"
    return command_line(
        materials, folder, name, **{"ds_config": config, "objective": objective, **given}
    )


def test_a_state_that_is_not_the_runs_own_is_noticed_by_its_loss(
    folder: Path, alone: Mapping[str, tuple[int, str]]
) -> None:
    """Whole by its checksums, and other weights: only the probe can tell."""
    status, errors = alone["other weights"]
    assert status == 1 and "probe" in errors
    assert verify_checkpoint(max((folder / "other-weights" / "checkpoints").glob("step-*")))


def test_a_second_run_on_the_same_folder_is_refused(
    folder: Path, alone: Mapping[str, tuple[int, str]]
) -> None:
    status, errors = alone["held"]
    assert status == 2 and "another process writes into this folder" in errors
    ours, before = ((folder / run / "metrics.jsonl").read_bytes() for run in ("held", "Sound-0"))
    assert ours == before


def test_a_full_disk_ends_the_run_and_leaves_its_last_checkpoint(
    folder: Path, alone: Mapping[str, tuple[int, str]]
) -> None:
    if "full" not in alone:
        pytest.skip("this machine gives no user a file system of its own")
    status, printed = alone["full"]
    errors = [x for x in printed.splitlines() if x.startswith("error: ")]
    assert status == 1 and len(errors) == 1 and "No space left on device" in errors[0]
    checkpoints = sorted((folder / "full" / "checkpoints").glob("step-*"))
    assert checkpoints and all(verify_checkpoint(path) for path in checkpoints)
    assert not (folder / "full" / "student").exists()


def test_with_room_again_the_run_on_a_full_disk_goes_on(
    folder: Path, alone: Mapping[str, tuple[int, str]]
) -> None:
    if "full" not in alone:
        pytest.skip("this machine gives no user a file system of its own")
    assert alone["enlarged"][0] == 0
    (resumed,) = events(folder / "enlarged", "resume")
    newest = max((folder / "full" / "checkpoints").glob("step-*"))
    assert f"step-{resumed['step']:08d}" == newest.name
    assert len(losses(folder / "enlarged")) == STEPS
