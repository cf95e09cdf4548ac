"""Several students in one run are each, bit by bit, the student that is trained alone.

One start of two ranks does all runs, with those of an MLM head on a frozen encoder.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import checkpoints_in
from pretrain.models import UNTRAINED, load_config
from tests.launch import Materials, by_run, flags, losses, metrics, runs, write_ds_config
from tests.launch import materials_fixture as materials_fixture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS, SAVE_EVERY = 8, 3
STUDENTS: dict[str, dict[str, Any]] = {
    "att": {"objective": "att-mse", "init": "uniform", "student_layers": 2, "dropout": 0.1},
    "narrow": {"objective": "hid-seq+0.5*kd", "student_hidden": 16, "student_seed": 5, "lr": 1e-3},
    "deep": {"objective": "mlm+val-kl", "student_layers": 3, "layers": "uniform", "dropout": 0.0},
}
HOPELESS = {"lr": 1e30, "warmup": 0.0, "objective": "hid-seq"}
STAGES = (0, 1)


def command_line(
    materials: Materials, root: Path, name: str, stage: int, **given: Any
) -> list[str]:
    """A run in `root/name` on ragged rows, two micro-batches a step."""
    bucket = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000} if stage else {}
    sections = {"zero_optimization": {"stage": stage, **bucket}}
    config = write_ds_config(root / f"zero{stage}.json", 2, 2, **sections)
    common = dict(data=materials.ragged, teacher=materials.teacher, max_steps=STEPS, lr=2e-3)
    often = dict(log_every=1, validate_every=4, save_every=SAVE_EVERY, seed=3)
    return flags(ds_config=config, output=root / name, **(common | often | given))


def students_file(root: Path, name: str, students: dict[str, Any]) -> Path:
    path = root / f"{name}.json"
    path.write_text(json.dumps(students))
    return path


@pytest.fixture(scope="module")
def folder(materials: Materials) -> Path:
    """Runs `together-STAGE`, `NAME-STAGE` alone, `diverging`, and what they printed.

    `head` is an MLM head on a frozen headless encoder, `taught` a student that learns from it.
    `killed` is `diverging` as if killed while it saved its last checkpoints, and started again;
    before it `together-0`, which is finished, is started again.
    """
    root = materials.folder / "students"
    root.mkdir()
    three = students_file(root, "three", STUDENTS)
    four = students_file(root, "four", {"hopeless": HOPELESS, **STUDENTS})
    several = []
    for stage in STAGES:
        several.append(command_line(materials, root, f"together-{stage}", stage, students=three))
        for name, settings in STUDENTS.items():
            several.append(command_line(materials, root, f"{name}-{stage}", stage, **settings))
    one = dict(validate_every=0, save_every=0, dropout=0)
    frozen = dict(objective="mlm", freeze="encoder", student=materials.headless, teacher=None)
    several.append(
        command_line(materials, root, "head", 0, **(one | frozen | dict(lr=2e-2, max_steps=30)))
    )
    taught = dict(objective="kd", teacher=root / "head" / "student", student_layers=1)
    several.append(command_line(materials, root, "taught", 0, **(one | taught)))
    several.append(command_line(materials, root, "together-0", 0, students=three))
    several.append(command_line(materials, root, "diverging", 1, students=four))
    killed = command_line(materials, root, "killed", 1, students=four)
    (done,) = runs(materials, "students", (2, [*several, kill(root), killed]))
    printed = by_run(done.output)
    statuses = [status for status, _ in printed]
    assert statuses == [0] * len(several[1:]) + [1, 1], done.output[-3000:] + done.errors[-5000:]
    assert done.statuses == [1, 1]
    for name, part in (
        ("", printed[:-2]),
        ("-diverging", printed[-2:-1]),
        ("-again", printed[-1:]),
    ):
        (root / f"printed{name}").write_text("".join(text for _, text in part))
    (root / "errors").write_text(by_run(done.errors)[-2][1])
    return root


def kill(root: Path) -> str:
    """The shell command that makes `killed` of `diverging`."""
    words = [f"cd '{root}'", "cp -r diverging killed"]
    for number, student in enumerate(STUDENTS):
        run = f"killed/students/{student}"
        words.append(f"rm -r {run}/student")
        if number != 1:  # this one had already saved
            words.append(f"rm -r $(ls -d {run}/checkpoints/step-* | tail -n 1)")
    return "\n".join(words)


def member(run: Path, name: str) -> Path:
    return run / "students" / name


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, gradient norms, validation and the exported weights are bitwise equal."""
    for kind, names in (("train", ("loss", "terms", "lr", "grad_norm")), ("validation", ("loss",))):
        ours, theirs = (
            [tuple(line[n] for n in ("step", *names)) for line in metrics(run, kind)]
            for run in (one, other)
        )
        assert ours == theirs and len(ours) > 2, kind
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.equal(theirs[name]), name


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_student_among_others_is_bitwise_the_one_trained_alone(
    folder: Path, stage: int, name: str
) -> None:
    alone = folder / f"{name}-{stage}"
    assert_same_run(member(folder / f"together-{stage}", name), alone)
    assert len(losses(alone)) == STEPS


def test_a_students_folder_is_that_of_a_lone_run(folder: Path) -> None:
    for name in STUDENTS:
        ours, theirs = (
            {
                str(p.relative_to(run))
                for p in run.rglob("*")
                if "tensorboard" not in str(p) and p.name != ".lock"  # held for the whole group
            }
            for run in (member(folder / "together-0", name), folder / f"{name}-0")
        )
        assert ours == theirs
        ours, theirs = (
            json.loads((run / "config.json").read_text())["identity"]
            for run in (member(folder / "together-0", name), folder / f"{name}-0")
        )
        assert ours == theirs


def test_the_students_differ_from_each_other(folder: Path) -> None:
    """Else the comparison with lone runs would show little."""
    last = [losses(member(folder / "together-0", name))[-1] for name in STUDENTS]
    assert len(set(last)) == len(STUDENTS)


def test_flops_of_all_students_count_the_teacher_once(folder: Path) -> None:
    """Shared evenly; each of the lone runs pays for a teacher of its own."""
    together, alone = (
        sum(metrics(run, "train")[-1]["flops"] for run in runs_)
        for runs_ in (
            [member(folder / "together-0", name) for name in STUDENTS],
            [folder / f"{name}-0" for name in STUDENTS],
        )
    )
    assert 0.4 * alone < together < 0.9 * alone
    printed = (folder / "printed").read_text()
    line = next(line for line in printed.splitlines() if line.startswith("sharing"))
    told, lone = (
        float(word) for word in line.split() if word.replace(".", "").isdigit() and "." in word
    )
    tokens = metrics(folder / "att-0", "train")[-1]["tokens"]
    assert together / tokens / 1e6 == pytest.approx(told, abs=0.06)
    assert alone / tokens / 1e6 == pytest.approx(lone, abs=0.06)


def test_a_diverging_student_stops_alone_and_is_named(folder: Path) -> None:
    run = member(folder / "diverging", "hopeless")
    (event,) = [line for line in metrics(run, "event") if line["event"] == "stopped"]
    assert 1 < event["step"] < STEPS and not event["loss"] < float("inf")
    assert len(losses(run)) == event["step"] and math.isnan(losses(run)[-1])
    assert not checkpoints_in(run / "checkpoints"), "nothing is saved while updates are left out"
    assert not (run / "student").exists()
    error = next(e for e in (folder / "errors").read_text().splitlines() if e.startswith("error: "))
    assert "hopeless" in error and not any(name in error for name in STUDENTS)
    assert "hopeless: stopped" in (folder / "printed-diverging").read_text()


@pytest.mark.parametrize("name", STUDENTS)
def test_the_others_go_on_as_if_it_had_never_been_there(folder: Path, name: str) -> None:
    assert_same_run(member(folder / "diverging", name), folder / f"{name}-1")


@pytest.mark.parametrize("name", STUDENTS)
def test_resumed_students_are_bitwise_the_unbroken_ones(folder: Path, name: str) -> None:
    ours = member(folder / "killed", name)
    events = [line for line in metrics(ours, "event") if line["event"] == "resume"]
    assert [line["step"] for line in events] == [2 * SAVE_EVERY], "the newest common step"
    assert_same_run(ours, folder / f"{name}-1")


def test_a_stopped_student_stays_stopped(folder: Path) -> None:
    before, after = (
        (member(folder / run, "hopeless") / "metrics.jsonl").read_bytes()
        for run in ("diverging", "killed")
    )
    assert before == after
    printed = (folder / "printed-again").read_text()
    assert "stopped    hopeless, at step" in printed


def test_a_finished_group_started_again_trains_nothing(folder: Path) -> None:
    assert (folder / "printed").read_text().count("finished already") == len(STUDENTS)


# --- an MLM head on a frozen encoder


def test_a_head_learns_on_a_frozen_encoder(folder: Path) -> None:
    first, last = (line["loss"] for line in metrics(folder / "head", "validation"))
    assert last < 0.95 * first


def test_the_frozen_encoder_is_bitwise_what_it_was(folder: Path, materials: Materials) -> None:
    ours, before = weights(folder / "head"), load_file(materials.headless / "model.safetensors")
    encoder = [name for name in ours if name.startswith("bert.")]
    assert len(encoder) > 60
    for name in encoder:
        assert ours[name].equal(before[name.removeprefix("bert.")]), name


def test_a_head_on_a_frozen_encoder_makes_a_teacher_for_kd(folder: Path) -> None:
    assert getattr(load_config(str(folder / "head" / "student"), "--teacher"), UNTRAINED) == []
    assert len(losses(folder / "taught")) == STEPS
    assert "encoder frozen" in (folder / "printed").read_text()
