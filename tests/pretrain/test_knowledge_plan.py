"""`cache_knowledge.py --plan`: what it measures, and what it makes of that."""

import random
from pathlib import Path

import pytest
import torch

from data_prep.shard_format import TRAIN, VALIDATION
from potstill.errors import InputError
from pretrain import config
from pretrain.knowledge import plan, sample, stopwatch
from pretrain.knowledge.entries import row_bytes
from pretrain.knowledge.format import Part, file_image
from pretrain.knowledge.job import Job, make_job
from pretrain.knowledge.plan import Estimate, duration_of, show_estimate, size_of
from pretrain.knowledge.sample import Sample, take_sample
from pretrain.knowledge.settings import parse_config
from pretrain.knowledge.trial_student import make_student
from pretrain.knowledge.writer import live_teacher, records_of, rows_of
from tests.launch import LENGTH, Materials, flags, materials_fixture, write_ds_config

__all__ = ["materials_fixture"]  # pytest finds it by this name in the module

CPU = torch.device("cpu")
KINDS = {
    "att-mse": {"objective": "att-mse", "dtype": "fp32"},
    "cut scores": {"objective": "att-kl+val-kl", "keep": "4t", "keep_length": "attention"},
    "cut": {"objective": "hid-seq", "keep": "1l_3t_0.25h", "dtype": "int8"},
    "importance": {"objective": "hid-seq", "keep": "0.25h", "keep_width": "importance"},
    "first token": {"objective": "hid-cls", "copies": 3, "compression": "zstd"},
    "contrast": {"objective": "hid-cls-contrast", "student_hidden": 16},
    "predictions": {"objective": "kd+mlm", "logits_top_k": 5, "compression": "zstd"},
    "relations": {"objective": "minilmv2", "student_layers": 1},
}


@pytest.fixture(autouse=True)
def short_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the least number of micro-batches."""
    monkeypatch.setattr(stopwatch, "SECONDS", 0.0)


def planned(materials: Materials, folder: Path, **more: object) -> Job:
    """A checked job with `--plan`."""
    given: dict[str, object] = {
        "ds_config": write_ds_config(folder / "ds.json", accumulation=2),
        "teacher": materials.teacher,
        "data": materials.ragged,
        "plan": True,
    }
    return make_job(parse_config(flags(**given | more)))


def estimated(draw: random.Random, **changes: float) -> Estimate:
    """An estimate of random numbers."""
    names = ("file_bytes", "teacher", "storing", "writing", "reading", "decoding", "student")
    values = {name: draw.uniform(0.1, 10) for name in names} | changes
    numbers = {name: draw.randint(1, 50) for name in ("rows", "epochs", "ranks")}
    slots = draw.randint(1, 500)
    return Estimate(Sample(**values), length=128, slots=slots, **numbers)


def test_storing_pays_from_the_first_number_of_runs_that_is_cheaper() -> None:
    draw = random.Random()
    for _ in range(200):
        found = estimated(draw, reading=0.01, decoding=0.01)
        one = found.sample
        store = found.slots * (one.storing + one.writing) / found.ranks
        passes = found.rows * found.epochs / found.ranks
        stored = [
            store + n * passes * (one.student + one.reading + one.decoding) for n in range(400)
        ]
        live = [n * passes * (one.student + one.teacher) for n in range(400)]
        cheaper = [n for n in range(400) if stored[n] < live[n]]
        runs = found.pays_from
        assert runs is not None
        if runs < 400:
            assert runs == cheaper[0]
        else:
            assert not cheaper


def test_storing_never_pays_where_reading_takes_longer_than_the_teacher() -> None:
    draw = random.Random()
    slow = estimated(draw, teacher=0.5, reading=0.4, decoding=0.2)
    assert slow.pays_from is None and slow.saved_seconds < 0 and slow.speedup < 1
    assert estimated(draw, teacher=0.5, reading=0.2, decoding=0.2).pays_from is not None


def test_ranks_share_the_hours_and_add_up_the_rates() -> None:
    one, three = (
        Estimate(Sample(600, 1, 2, 1, 0.25, 0.25, 3), 128, rows=60, slots=90, epochs=2, ranks=n)
        for n in (1, 3)
    )
    assert (one.store_seconds, one.live_seconds, one.stored_seconds) == (270, 60, 30)
    assert (one.saved_seconds, one.student_seconds, one.total_bytes) == (60, 180, 54_000)
    assert one.speedup == pytest.approx(240 / 210)
    assert (three.store_seconds, three.saved_seconds, three.total_bytes) == (90, 20, 54_000)
    assert (one.write_rate, three.write_rate) == (300, 900)
    assert one.read_rate == pytest.approx(600 / 3.25)
    assert one.pays_from == three.pays_from == 5  # 270 / 60 = 4.5


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_any_knowledge_is_stored_read_and_learned_from(
    kind: str, materials: Materials, tmp_path: Path
) -> None:
    job = planned(materials, tmp_path, **KINDS[kind])
    found = take_sample(job, make_student(job), CPU)
    assert min(vars(found).values()) > 0
    if job.contents.compression == "none":  # the file's 32 bytes of checksum are shared by its rows
        assert row_bytes(job.entries) <= found.file_bytes <= row_bytes(job.entries) + 32


@pytest.mark.usefixtures("one_rank")
def test_the_student_computes_its_losses_as_in_a_run(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else logits that a run takes in chunks would not fit into the memory of a plan."""
    asked = []

    def three(form: str, logits: float) -> int:
        asked.append(logits)
        return 3

    monkeypatch.setattr(config, "count_chunks", three)
    job = planned(materials, tmp_path, objective="kd", kd_temperature=2, kd_positions="all")
    student = make_student(job)
    (term,) = student.objective.objectives
    told = term.settings
    assert asked == [job.contents.micro_batch * LENGTH * job.manifest.vocab_size]
    assert (told.logit_chunks, told.temperature, told.positions) == (3, 2, "all") and told.stored
    assert take_sample(job, student, CPU).student > 0


@pytest.mark.usefixtures("one_rank")
def test_the_compressed_bytes_of_a_row_are_those_that_storing_writes(
    materials: Materials, tmp_path: Path
) -> None:
    given = {**KINDS["att-mse"], "compression": "zstd", "rows_per_file": 4096}
    job = planned(materials, tmp_path, **given)
    found, teacher = take_sample(job, make_student(job), CPU), live_teacher(job, CPU)
    part = Part("sample", TRAIN, range(4 * stopwatch.LEAST))
    images = [
        file_image(records_of(job.entries, teacher, batch, CPU), "zstd")
        for batch in rows_of(job).batches(part)
    ]
    written = sample.FILE_BYTES // row_bytes(job.entries)
    around = 8 + 32  # the end of the last record and the checksum, once in a file
    a_row = sum(len(image) - around for image in images) / len(part.slots)
    assert found.file_bytes == pytest.approx(a_row + around / written, rel=1e-3)
    assert found.file_bytes < 0.9 * row_bytes(job.entries)  # zeros where padding was


@pytest.mark.usefixtures("one_rank")
def test_the_plan_is_printed_and_leaves_nothing(
    materials: Materials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"objective": "hid-seq", "copies": 2, "epochs": 3, "output": tmp_path / "deep" / "down"}
    job = planned(materials, tmp_path, **more)
    before = sorted(tmp_path.rglob("*"))
    show_estimate(job, CPU)
    assert sorted(tmp_path.rglob("*")) == before
    told = capsys.readouterr().out
    rows = job.contents.rows
    slots = 2 * rows[TRAIN] + rows[VALIDATION]
    assert f"{slots:,} rows" in told and f"over {rows[TRAIN]:,} rows" in told
    assert f"on disk    {row_bytes(job.entries) / LENGTH:,.1f} bytes a token" in told
    assert "a student  of 3 passes" in told and "\npays " in told and "DOES NOT FIT" not in told


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("reading", "epochs", "told"),
    [
        (9.0, 1, "pays       never"),
        (1.0, 1, "pays       from 2 stu"),
        (1.0, 9, "pays       for one"),
    ],
)
def test_the_plan_says_from_when_on_storing_pays(
    reading: float,
    epochs: int,
    told: str,
    materials: Materials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Sample(1e18, teacher=8, storing=9, writing=1, reading=reading, decoding=0.1, student=9)
    monkeypatch.setattr(plan, "take_sample", lambda *given: found)
    more = {"objective": "hid-cls", "epochs": epochs, "output": tmp_path / "knowledge"}
    show_estimate(planned(materials, tmp_path, **more), CPU)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("free")][0].endswith(": IT DOES NOT FIT")
    assert [line for line in lines if line.startswith("pays")][0].startswith(told)


@pytest.mark.usefixtures("one_rank")
def test_a_student_that_cannot_be_or_cannot_learn_is_refused(
    materials: Materials, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--student_hidden 30 is not a multiple"):
        make_student(planned(materials, tmp_path, objective="hid-seq", student_hidden=30))


def test_flags_of_a_plan_are_refused_without_it() -> None:
    given = {"ds_config": "d", "teacher": "t", "data": "s", "objective": "kd", "output": "o"}
    for name in ("student_hidden", "epochs"):
        with pytest.raises(InputError, match=f"--{name} 8 is for --plan"):
            parse_config(flags(**given, **{name: 8}))
        with pytest.raises(InputError, match=f"--{name} 0 must be positive"):
            parse_config(flags(**given, plan=True, **{name: 0}))


def test_sizes_and_times_are_told_in_units_for_people() -> None:
    sizes = (5, 999.4, 999.6, 40.2e12, 3.1e19)
    assert [size_of(n) for n in sizes] == ["5 bytes", "999 bytes", "1 kB", "40.2 TB", "3.1e+04 PB"]
    times = (0.0421, 59.9, 60, 5400, 4_000_000)
    told = ["0.0421 s", "59.9 s", "1.00 min", "1.50 hours", "1,111.11 hours"]
    assert [duration_of(s) for s in times] == told
