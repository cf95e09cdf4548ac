"""Students of uncut stored knowledge are bitwise those of the live teacher, on one rank and on two.

One process forks everything: knowledge is stored on one rank and on two, then students learn from
it and, for comparison, from the teacher, over several epochs of ragged rows.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launch import Materials, by_run, flags, metrics, runs, write_ds_config
from tests.launch import materials_fixture as materials_fixture

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STUDENTS: dict[str, dict[str, Any]] = {
    "hid": {"objective": "hid-seq", "student_hidden": 16},
    "att": {"objective": "att-mse", "init": "uniform"},
    "kl": {"objective": "att-kl+val-kl"},
    "relations": {"objective": "minilmv2", "relation_heads": 8},
    "predictions": {"objective": "kd+mlm"},
}
EVERYTHING = "hid-seq+att-kl+val-kl+kd"
"""Whose features are all that the students learn from."""

BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
STEPS = {"one": 200, "two": 40, "bf16": 20}
ROWS = 265  # of the ragged shards: an epoch is 66 steps on one rank, 33 on two


@pytest.fixture(scope="module")
def folder(materials: Materials) -> Path:
    """Runs `live-HOW` and `stored-HOW` of every student at once, by how they were run.

    `one` has one masked copy, `two` two ranks with two loader workers each and two copies, `bf16`
    a bf16 teacher and zstd. `lone` has no teacher at all. Knowledge is in `one`, `bf16` and `two`,
    stored on so many ranks; `again` is the latter from one rank, and `blocked` one of which
    the second rank could not write a file.
    """
    root = materials.folder / "knowledge"
    root.mkdir()
    every = root / "students.json"
    every.write_text(json.dumps({n: {"student_layers": 2, **s} for n, s in STUDENTS.items()}))
    half = write_ds_config(root / "bf16.json", 4, 1, **BF16)
    whole = write_ds_config(root / "fp32.json", 4, 1)

    def store(name: str, config: Path, **given: Any) -> list[str]:
        own = dict(ds_config=config, data=materials.ragged, teacher=materials.teacher, seed=3)
        more = dict(objective=EVERYTHING, layers="uniform", student_layers=2, rows_per_file=12)
        return ["cache_knowledge", *flags(output=root / name, **(own | more | given))]

    def train(how: str, config: Path, source: dict[str, Any], **given: Any) -> list[str]:
        common = dict(ds_config=config, data=materials.ragged, students=every, layers="uniform")
        steps = dict(max_steps=STEPS[how.rpartition("-")[2]], validate_every=20, save_every=0)
        often = dict(log_every=1, seed=3, lr=2e-3, dropout=0.1) | steps
        return flags(output=root / how, **(common | often | source | given))

    live = {"teacher": materials.teacher}
    learned = {how: {**live, "knowledge": root / how} for how in STEPS}
    two = dict(copies=2, loader_workers=2)
    lone = dict(students=None, objective="hid-seq", student_layers=2)
    alone = [
        store("one", whole, dtype="fp32", rows_per_file=None),
        store("bf16", half, dtype="bf16", compression="zstd"),
        store("again", whole, dtype="fp32", copies=2),
        train("live-one", whole, live, copies=1),
        train("stored-one", whole, learned["one"]),
        train("live-bf16", half, live, copies=1),
        train("stored-bf16", half, learned["bf16"]),
        train("lone-two", whole, {"knowledge": root / "again"}, **lone),
    ]
    blocked = "cp -r two blocked && cd blocked && rm knowledge.json train-00001* train-00002*"
    together = [
        store("two", whole, dtype="fp32", copies=2),
        train("live-two", whole, live, **two),
        train("stored-two", whole, learned["two"], **two),
        f"cd '{root}' && {blocked} && mkdir train-00002-of-00045.bin",
        store("blocked", whole, dtype="fp32", copies=2),
    ]
    one_rank, two_ranks = runs(materials, "knowledge", (0, alone), (2, together))
    assert one_rank.statuses == [0], one_rank.output[-3000:] + one_rank.errors[-5000:]
    statuses = [status for status, _ in by_run(two_ranks.output)]
    assert statuses == [0, 0, 0, 2], two_ranks.output[-3000:] + two_ranks.errors[-5000:]
    (root / "errors").write_text(by_run(two_ranks.errors)[-1][1])
    return root


def lines(run: Path, kind: str) -> list[tuple[Any, ...]]:
    """What is trained and validated, step by step; no clocks."""
    names = ("step", "loss", "terms") + (("lr", "grad_norm") if kind == "train" else ("rows",))
    return [tuple(line[name] for name in names) for line in metrics(run, kind)]


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("how", STEPS)
def test_uncut_knowledge_gives_the_live_teachers_losses_bit_by_bit(
    folder: Path, how: str, student: str
) -> None:
    live, stored = (folder / f"{what}-{how}" / "students" / student for what in ("live", "stored"))
    for kind, number in (("train", STEPS[how]), ("validation", STEPS[how] // 20)):
        ours, theirs = lines(stored, kind), lines(live, kind)
        assert ours == theirs and len(ours) >= number
        assert len({line[1] for line in ours}) == len(ours), "a loss that never changes"
    ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (stored, live))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_the_runs_see_more_than_one_epoch_and_every_copy() -> None:
    assert STEPS["one"] * 4 > 3 * ROWS and STEPS["two"] * 8 > ROWS


def test_a_student_is_trained_and_validated_without_a_teacher(folder: Path) -> None:
    run = folder / "lone-two"
    assert len(lines(run, "train")) == STEPS["two"]
    held_out = [line[1] for line in lines(run, "validation")]
    assert len(held_out) >= 2 and held_out[-1] < 0.9 * held_out[0]
    assert {line["rows"] for line in metrics(run, "validation")} == {19}


def test_two_ranks_store_the_bytes_of_one(folder: Path) -> None:
    one, two = (files_of(folder / name) for name in ("again", "two"))
    assert one == two and len(one) > 40


def test_a_fault_of_any_rank_ends_all_and_is_told_in_one_line(folder: Path) -> None:
    """A folder stands in the place of the second rank's first file; rank 0 wrote its own."""
    errors = [line for line in (folder / "errors").read_text().splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert "train-00002-of-00045.bin" in errors[0] and "Traceback" not in errors[0]
    blocked, whole = files_of(folder / "blocked"), files_of(folder / "two")
    assert blocked.keys() == whole.keys() - {"knowledge.json", "train-00002-of-00045.bin"}
    assert all(content == whole[name] for name, content in blocked.items())


def files_of(knowledge: Path) -> dict[str, bytes]:
    """All that was stored; the lock names a process."""
    return {p.name: p.read_bytes() for p in knowledge.glob("[!.]*") if p.is_file()}
