"""Programs on one rank and on two, without the launcher: they find, choose and refuse as one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM

from data_prep.shard_format import TRAIN
from pretrain.student.extraction import RECORD
from tests.forked import Ended, Job, forked
from tests.launch import PROGRAM, REPOSITORY, Materials, environment, flags, losses, metrics
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain import test_bad_shard, test_extract, test_run_bad_input
from tests.pretrain.test_bad_shard import shards as shards

EXTRACT = REPOSITORY / "pretrain" / "extract.py"
REFUSED = {  # job: ranks, and what its one line says
    "unknown objective": (1, "nearest: att-mse"),
    "flipped byte": (2, "corrupted"),
    "headless teacher": (1, "--freeze encoder"),
}
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs write, each in a folder of its name."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(folder: Path, materials: Materials, shards: Path) -> dict[str, Ended]:
    """How each job ended: all in one start, since importing takes longer than any of them."""
    jobs = {}

    def job(name: str, program: Path, ranks: int, given: dict[str, Any]) -> None:
        jobs[name] = Job(str(program), ranks, flags(**given))

    for name in ("unknown objective", "flipped byte"):
        (folder / name).mkdir()
        change, _ = test_run_bad_input.CASES[name]
        given = change(materials, folder / name)
        given = test_run_bad_input.defaults(materials, folder / name) | given
        job(name, PROGRAM, REFUSED[name][0], given)
    extraction = test_extract.defaults(materials, folder / "alone")
    job("alone", EXTRACT, 1, extraction)
    job("two", EXTRACT, 2, extraction | {"output": folder / "two"})
    beheaded = {"teacher": materials.headless, "output": folder / "headless teacher" / "run"}
    job("headless teacher", EXTRACT, 1, extraction | beheaded)
    arguments = test_bad_shard.arguments(folder, damaged(folder, shards), on_bad_shard="skip")
    jobs["skipping"] = Job(str(PROGRAM), 2, arguments)
    done = forked(folder / "forked", list(jobs.values()), environment(materials.folder))
    return dict(zip(jobs, done, strict=True))


def damaged(folder: Path, shards: Path) -> Path:
    """A copy of the shards, two of them bad, and of the teacher beside them."""
    shutil.copytree(shards.parent / "teacher", folder / "teacher")
    copy = shutil.copytree(shards, folder / "copy")
    for number in (0, 1):
        test_bad_shard.damage(copy, TRAIN, number, "flipped")
    return copy


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_and_status_2_of_every_rank(
    name: str, ended: dict[str, Ended], folder: Path
) -> None:
    """Of two, one rank finds the flipped byte (they share the files); both stop, one speaks."""
    done, (ranks, fact) = ended[name], REFUSED[name]
    assert done.statuses == [2] * ranks
    lines = [line for line in done.errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and fact in lines[0]
    assert "Traceback" not in done.errors + done.output
    assert not (folder / name / "run").exists()


def test_two_ranks_agree_on_what_is_bad_and_train_on(
    ended: dict[str, Ended], folder: Path, shards: Path
) -> None:
    """Each looks at its share: the bad shards are found by different ranks."""
    done = ended["skipping"]
    assert done.statuses == [0, 0], done.errors[-3000:]
    bad = [folder / "copy" / f"train-{number:05d}-of-" for number in (0, 1)]
    assert all(done.output.count(f"left out: {path}") == 1 for path in bad)
    assert len(losses(folder / "run")) == 3 and metrics(folder / "run", "validation")


def test_two_ranks_extract_the_student_of_one(ended: dict[str, Ended], folder: Path) -> None:
    for name in ("alone", "two"):
        assert set(ended[name].statuses) == {0}, ended[name].errors[-3000:]
    one, two = (
        AutoModelForMaskedLM.from_pretrained(folder / name).state_dict()
        for name in ("alone", "two")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    theirs, ours = (json.loads((folder / name / RECORD).read_text()) for name in ("alone", "two"))
    assert ours["kept"] == theirs["kept"] and ours["flops"] == theirs["flops"]
    assert ours["mlm_loss"] == pytest.approx(theirs["mlm_loss"], rel=1e-6)
    assert ended["two"].output.count("written ") == 1
