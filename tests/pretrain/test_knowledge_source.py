"""Knowledge in the place of a teacher: its features, and what is refused before training."""

import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from data_prep import shard
from data_prep.shard_format import TRAIN, VALIDATION
from potstill.errors import InputError
from potstill.files import read_sealed_json, write_sealed_json
from pretrain import cache_knowledge, run
from pretrain.attention import choose_attention
from pretrain.batches import Batch
from pretrain.config import parse_config
from pretrain.features import Kept
from pretrain.knowledge import job as job_module
from pretrain.knowledge.format import IDENTITY, MANIFEST, parts_of
from pretrain.knowledge.job import Job, make_job
from pretrain.knowledge.settings import parse_config as parse_storing
from pretrain.knowledge.writer import rows_of
from pretrain.models import load_encoder
from pretrain.plan import Plan, make_plan
from pretrain.run_data import RunData
from pretrain.teacher import Teacher
from tests.chaos.shard_flips import flip
from tests.launch import Materials, flags, shard_text, write_ds_config, write_teacher
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain.stored import CPU, EVERYTHING, contents_of, opened, store
from tests.test_lock import HOLDER

pytestmark = pytest.mark.usefixtures("one_rank")

Given = dict[str, Any]
COPIES = 2


@pytest.fixture(scope="module")
def whole(materials: Materials, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uncut fp32 knowledge of two copies, for everything in the last layer, of 6 held-out rows."""
    folder = tmp_path_factory.mktemp("whole")
    return store(materials, folder, copies=COPIES, validation_rows=6, seed=5, rows_per_file=100)


@pytest.fixture(scope="module")
def narrow(materials: Materials, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first token only, and the 5 likeliest tokens at temperature 2."""
    more = dict(objective="hid-cls+kd", kd_temperature=2.0, logits_top_k=5)
    return store(materials, tmp_path_factory.mktemp("narrow"), **more)


def trained(materials: Materials, folder: Path, knowledge: Path, **given: Any) -> Given:
    """The flags of a run that learns from knowledge as it was stored."""
    own = dict(data=materials.ragged, knowledge=knowledge, objective="hid-seq", student_layers=2)
    own |= dict(seed=5, validation_rows=6, max_steps=2, output=folder / "run")
    return own | {"ds_config": write_ds_config(folder / "ds.json")} | given


def planned(given: Given) -> Plan:
    return make_plan(parse_config(flags(**given)), CPU)


# --- features


def live(materials: Materials, plan: Plan, batch: Batch) -> Any:
    encoder = load_encoder(str(materials.teacher), "--teacher")
    wanted = plan.teacher_features
    attention = choose_attention("auto", CPU)
    return Teacher(encoder, wanted, attention, CPU, torch.float32).features(batch)


def assert_same_where_valid(ours: Tensor, theirs: Tensor, batch: Batch, at_logits: bool) -> None:
    if at_logits:
        used = batch.labels >= 0
        assert torch.equal(ours[used], theirs[used]) and used.any()
        return
    if ours.dim() == 4:
        ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
    assert torch.equal(ours[batch.valid], theirs[batch.valid])
    assert (ours[~batch.valid] == 0).all() and not batch.valid.all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_with_the_features_that_a_live_teacher_gives_them(
    workers: int, whole: Path, materials: Materials, tmp_path: Path
) -> None:
    """Over the border of an epoch and of a copy; at the same number of rows, bit by bit."""
    given = trained(materials, tmp_path, whole, objective=EVERYTHING, loader_workers=workers)
    plan = planned(given)
    rows = plan.manifest.splits[TRAIN].rows
    assert plan.knowledge is not None and plan.config.data.copies == COPIES
    source = plan.knowledge.source(plan.teacher_features, torch.float32)
    seen = set()
    for start in (0, rows // 4 - 1, 3 * rows // 4):  # the last: in the first copy again
        batches = RunData(plan).training(start)
        for batch, _ in zip(batches, range(3), strict=False):
            assert batch.epochs is not None
            seen |= set(batch.epochs.tolist())
            ours, theirs = source.features(batch), live(materials, plan, batch)
            assert ours.keys() == theirs.keys() and len(ours) == 5
            for feature, value in theirs.items():
                assert_same_where_valid(ours[feature], value, batch, feature.kind == "logits")
    assert seen == {0, 1}


def test_copies_are_masked_versions_that_come_again(
    whole: Path, materials: Materials, tmp_path: Path
) -> None:
    """The sample of any epoch is one of the stored copies of its row, epoch modulo copies."""
    plan = planned(trained(materials, tmp_path, whole))
    found: dict[tuple[int, int], Any] = {}
    batches = RunData(plan).training(0)
    for batch, _ in zip(batches, range(5 * plan.manifest.splits[TRAIN].rows // 4), strict=False):
        assert batch.epochs is not None and batch.rows is not None
        keys = zip(batch.rows.tolist(), batch.epochs.tolist(), strict=True)
        for key, ids in zip(keys, batch.input_ids.tolist(), strict=True):
            assert found.setdefault(key, ids) == ids
    rows = {row for row, _ in found}
    assert {copy for _, copy in found} == {0, 1}
    assert sum(found[row, 0] != found[row, 1] for row in rows if (row, 1) in found) > len(rows) / 2


def test_held_out_rows_come_with_theirs_whatever_the_slices(
    whole: Path, materials: Materials, tmp_path: Path
) -> None:
    plan = planned(trained(materials, tmp_path, whole))
    data, reader = RunData(plan), opened(whole).reader()
    every = reader.read(VALIDATION, np.arange(6))["hidden-4"]
    found = [batch.knowledge["hidden-4"] for batch, _ in data.validation() if batch.knowledge]
    assert np.array_equal(torch.cat(found).numpy(), every)
    probe = data.probe(8).knowledge  # fewer are stored
    assert probe is not None and np.array_equal(probe["hidden-4"].numpy(), every)


@pytest.mark.parametrize("mlm_probability", [0.15, 0])
def test_drawn_neurons_are_those_of_the_copy(
    mlm_probability: float, materials: Materials, tmp_path: Path
) -> None:
    """rand_mask is not stored but drawn again: what comes back stands where the teacher has it."""
    cut = dict(objective="hid-seq", keep="1l_6t_0.3h", keep_width="rand_mask", seed=5)
    copies = dict(copies=3 if mlm_probability else 1, mlm_probability=mlm_probability)
    knowledge = store(materials, tmp_path, **cut, **copies)
    plan = planned(trained(materials, tmp_path, knowledge, mlm_probability=mlm_probability))
    assert plan.knowledge is not None
    source = plan.knowledge.source(plan.teacher_features, torch.float32)
    (feature,) = plan.teacher_features
    rows, places = plan.manifest.splits[TRAIN].rows, set()
    for start in (0, rows // 4 + 1, 2 * rows // 4 + 1):
        batch = next(RunData(plan).training(start))
        kept, everything = source.features(batch)[feature], live(materials, plan, batch)[feature]
        assert isinstance(kept, Kept) and kept.neurons is not None
        at_tokens = everything.gather(1, kept.tokens[..., None].expand(-1, -1, 32))
        own = at_tokens.gather(2, kept.neurons.expand(*kept.tokens.shape, -1))
        assert torch.equal(own[kept.used], kept.values[kept.used]) and kept.used.any()
        places |= {tuple(row) for row in kept.neurons.flatten(0, 1).tolist()}
    assert len(places) == 12, "every row and copy has a draw of its own"


# --- what is refused by run.py


@pytest.fixture
def refused(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Given], str]:
    """Call run.py, which must refuse what is given before anything is built; its one line."""
    monkeypatch.setattr(run, "start_ranks", lambda: CPU)
    monkeypatch.setattr(run, "build_run", lambda *_: pytest.fail("the run was built"))
    disable_progress_bar()

    def call(given: Given) -> str:
        capsys.readouterr()  # bars of what was made before
        with pytest.raises(SystemExit) as stop:
            run.main(flags(**given))
        errors = [line for line in capsys.readouterr().err.splitlines() if line]
        assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ")
        assert not (Path(given["output"]) / "config.json").exists()
        return errors[0]

    return call


def other_teacher(materials: Materials, folder: Path) -> Given:
    tokenizer = materials.shards / "tokenizer"
    write_teacher(folder / "other", tokenizer, initializer_range=0.1)
    return {"teacher": folder / "other"}


def other_shards(materials: Materials, folder: Path) -> Given:
    return {"data": materials.shards}


def other_tokenizer(materials: Materials, folder: Path) -> Given:
    text = materials.folder / "manual.txt"
    (folder / "text.txt").write_text(text.read_text().replace("e", "x"))
    shard_text(folder / "text.txt", folder / "misspelt")
    return {"data": folder / "misspelt"}


def other_length(materials: Materials, folder: Path) -> Given:
    words = ["--tokenizer", str(materials.shards / "tokenizer"), "--seq_length", "16"]
    argv = ["--input", str(materials.folder / "manual.txt"), "--output", str(folder / "short")]
    shard.main([*argv, *words, "--workers", "1"])
    return {"data": folder / "short"}


def always(**given: Any) -> Callable[[Materials, Path], Given]:
    return lambda materials, folder: given


REFUSED: dict[str, tuple[Callable[[Materials, Path], Given], str]] = {
    "teacher": (other_teacher, "is not the teacher whose knowledge is in .*their weights differ"),
    "tokenizer": (other_tokenizer, "was stored with another tokenizer than that of --data"),
    "length": (other_length, "has rows of 32 tokens, --data of 16"),
    "shards": (other_shards, "was stored from other shards than --data"),
    "masks": (always(mlm_probability=0.2), "stored with --mlm_probability 0.15, not 0.2"),
    "words": (always(mask_whole_words=True), "stored with --mask_whole_words False, not True"),
    "copies": (always(copies=3), "stored with --copies 2, not 3"),
    "seed": (always(seed=6), "stored with --seed 5, not 6"),
    "unmasked": (always(mlm_probability=0), "stored with --mlm_probability 0.15, not 0"),
    "layer": (always(layers="2:3"), "has no hidden 3, .*it has: hidden 4, "),
    "kind": (always(objective="minilmv2", relation_heads=8, layers="1:2"), "has no key 2, "),
    "positions": (always(objective="kd", kd_positions="all"), "has no logits all, .*logits masked"),
    "start": (always(init="uniform"), "--init uniform copies teacher layers, .*give --teacher too"),
    "cut": (always(cut_form="masked"), "--cut_form masked: .* has all tokens and neurons"),
    "folder": (always(knowledge="nowhere"), "there is no such folder; make it: .*cache_knowledge"),
    "other folder": (always(knowledge="."), "is no folder of pretrain/cache_knowledge.py"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_run_than_was_stored_is_refused_by_name(
    case: str,
    whole: Path,
    materials: Materials,
    tmp_path: Path,
    refused: Callable[[Given], str],
) -> None:
    change, told = REFUSED[case]
    message = refused(trained(materials, tmp_path, whole) | change(materials, tmp_path))
    assert re.search(told, message), message


def test_more_held_out_rows_than_are_stored_are_refused(
    whole: Path, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    message = refused(trained(materials, tmp_path, whole, validation_rows=7))
    assert "has 6 validation rows: give --validation_rows 6 or less" in message
    assert "give --validation_rows 6" in refused(
        trained(materials, tmp_path, whole, validation_rows=None)
    )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"objective": "hid-seq"}, "hidden 4 of the first token only, as --objective hid-cls.kd"),
        ({"objective": "hid-cls+hid-seq"}, "hidden 4 of the first token only"),
        ({"objective": "kd"}, "--kd_temperature 1.0: .*likeliest tokens at temperature 2.0"),
        ({"objective": "kd", "kd_temperature": 3}, "give --kd_temperature 2.0, or store it again"),
    ],
)
def test_an_objective_that_needs_more_than_is_stored_is_refused(
    given: Given,
    told: str,
    narrow: Path,
    materials: Materials,
    tmp_path: Path,
    refused: Callable[[Given], str],
) -> None:
    more = dict(seed=0, validation_rows=None)
    message = refused(trained(materials, tmp_path, narrow, **(more | given)))
    assert re.search(told, message), message
    planned(trained(materials, tmp_path, narrow, **more, objective="kd", kd_temperature=2))
    planned(trained(materials, tmp_path, narrow, **more, objective="hid-cls"))


def test_whole_logits_serve_any_temperature(
    whole: Path, materials: Materials, tmp_path: Path
) -> None:
    planned(trained(materials, tmp_path, whole, objective="kd", kd_temperature=3))


@pytest.mark.parametrize("objective", ["minilmv2", "pearson"])
def test_an_objective_of_whole_rows_refuses_cut_knowledge(
    objective: str, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    knowledge = store(materials, tmp_path, objective="hid-seq+att-mse", keep="5t", seed=5)
    given = {"objective": objective, "relation_heads": 8, "validation_rows": 6}
    message = refused(trained(materials, tmp_path, knowledge, **given))
    assert re.search(f"--keep 5t: --objective {objective}.* compares whole rows", message), message


@pytest.mark.parametrize("flag", [True, False])
def test_damaged_knowledge_is_refused_before_training(
    flag: bool, whole: Path, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    """Without the checksums at least a file that is cut."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    path = sorted(copy.glob("train-*.bin"))[1]
    if flag:
        flip(path, 1000, 1)
    else:
        path.write_bytes(path.read_bytes()[:-1])
    assert path.name in refused(trained(materials, tmp_path, copy, check_shards=str(flag)))


def test_files_are_read_only_when_nothing_else_is_to_be_refused(
    whole: Path, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    """Reading terabytes to find a wrong flag would be long work."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    flip(min(copy.glob("train-*.bin")), 1000, 1)
    assert "has no hidden 3" in refused(trained(materials, tmp_path, copy, layers="2:3"))


def test_a_shard_that_another_rank_finds_damaged_stops_the_storing(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first rank can tell a person."""

    def gather(found: list[dict[str, str]], own: dict[str, str]) -> None:
        found[:] = [own, {"train-1": "train-1 is corrupted"}]

    monkeypatch.setattr(job_module.dist, "all_gather_object", gather)
    with pytest.raises(InputError, match="train-1 is corrupted"):
        store(materials, tmp_path, objective="hid-cls")


@pytest.mark.parametrize(
    "given",
    [
        {"objective": "att-mse", "layers": "1:0"},
        {"objective": "val-kl", "keep": "3l", "keep_depth": "t_top2", "student_layers": 3},
    ],
)
def test_attention_of_the_embeddings_cannot_be_stored(
    given: Given, materials: Materials, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="compares attention, which layer 0 .* has not"):
        store(materials, tmp_path, **given)


def test_unfinished_knowledge_is_refused(
    whole: Path, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / MANIFEST).unlink()
    assert "is not finished" in refused(trained(materials, tmp_path, copy))


def test_masks_of_an_older_program_are_refused(
    whole: Path, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    fields = read_sealed_json(copy / MANIFEST)
    fields["contents"]["batches_version"] -= 1
    write_sealed_json(copy / MANIFEST, fields)
    assert "masks as an older Potstill" in refused(trained(materials, tmp_path, copy))


def test_a_skipped_shard_and_knowledge_do_not_go_together(
    materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    """A good row that stands in for a bad one has other knowledge."""
    text = (materials.folder / "manual.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace(". ", ".\n\n"))
    words = ["--rows_per_shard", "30", "--validation_fraction", "0.2"]
    shard_text(tmp_path / "text.txt", tmp_path / "shards", *words)
    write_teacher(tmp_path / "teacher", tmp_path / "shards" / "tokenizer")
    own = dict(data=tmp_path / "shards", objective="hid-cls")
    knowledge = store(materials, tmp_path, teacher=tmp_path / "teacher", **own)
    bad = sorted((tmp_path / "shards").glob("train-*.h5"))[0]
    flip(bad, bad.stat().st_size // 2, 1)
    given = dict(on_bad_shard="skip", seed=0, validation_rows=None)
    message = refused(trained(materials, tmp_path, knowledge, **own, **given))
    assert "--on_bad_shard skip lets other rows stand in" in message and bad.name in message


def test_knowledge_of_the_right_teacher_lets_a_student_start_from_its_layers(
    whole: Path, materials: Materials, tmp_path: Path
) -> None:
    plan = planned(trained(materials, tmp_path, whole, teacher=materials.teacher, init="last"))
    assert plan.knowledge is not None and plan.flops_per_token > 0


# --- storing


def storing(materials: Materials, folder: Path, **given: Any) -> Given:
    own = dict(data=materials.ragged, teacher=materials.teacher, objective=EVERYTHING, seed=5)
    own |= dict(copies=COPIES, validation_rows=6, rows_per_file=100, dtype="fp32")
    return own | dict(ds_config=write_ds_config(folder / "ds.json")) | given


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("objective", "hid-seq"),
        ("seed", 6),
        ("dtype", "fp16"),
        ("copies", 1),
        ("mlm_probability", 0.3),
        ("mask_whole_words", True),
        ("validation_rows", 5),
        ("rows_per_file", 50),
        ("compression", "zstd"),
        ("keep", "4t"),
        ("teacher", "other"),
        ("data", "shards"),
    ],
)
def test_other_knowledge_is_never_mixed_into_a_folder(
    flag: str, value: Any, whole: Path, materials: Materials, tmp_path: Path
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    if flag == "teacher":
        write_teacher(tmp_path / value, materials.shards / "tokenizer", initializer_range=0.1)
        value = tmp_path / value
    if flag == "data":
        value = materials.shards
    before = contents_of(copy)
    named = {"data": "shards", "validation_rows": "rows"}.get(flag, flag)
    with pytest.raises(InputError, match=rf"holds another knowledge: .*\b{named}\b.* differ"):
        store(materials, tmp_path, **(storing(materials, tmp_path, output=copy) | {flag: value}))
    assert contents_of(copy) == before


def test_a_folder_of_something_else_is_refused(materials: Materials, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("important")
    with pytest.raises(InputError, match="is not empty and holds no knowledge"):
        store(materials, tmp_path, output=tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("lost", ["manifest", "files", "half", "identity only", "leftover"])
def test_an_interrupted_storing_goes_on_to_the_same_bytes(
    lost: str,
    whole: Path,
    materials: Materials,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, before = shutil.copytree(whole, tmp_path / "copy"), contents_of(whole)
    files = sorted(copy.glob("*.bin"))
    kept = {path: path.stat().st_mtime_ns for path in files}
    (copy / MANIFEST).unlink()
    gone = {"files": files[1:4], "half": files[2:3], "identity only": files}.get(lost, [])
    for path in gone:
        content = path.read_bytes()
        path.unlink()
        if lost == "half":
            path.write_bytes(content[: len(content) // 2])
    if lost == "leftover":
        (copy / f".{files[0].name}.4711.part").write_bytes(b"half")
    store(materials, tmp_path, **storing(materials, tmp_path, output=copy))
    assert contents_of(copy) == before
    whole_ones = len(files) - len(gone)
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items() if p not in gone)
    said = capsys.readouterr().out
    assert (f"resume     {whole_ones} of {len(files)} files" in said) == (lost != "identity only")


def test_a_full_disk_keeps_what_is_whole(
    whole: Path, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file may be larger than the held-out rows' own: those of training find no room."""
    output, given = tmp_path / "full", storing(materials, tmp_path)
    room = max(path.stat().st_size for path in whole.glob("validation-*.bin"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store(materials, tmp_path, **given, output=output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    names = {path.name for path in output.iterdir()}
    assert names == {IDENTITY, ".lock", *(path.name for path in whole.glob("validation-*.bin"))}
    store(materials, tmp_path, **given, output=output)
    assert contents_of(output) == contents_of(whole)


def test_finished_knowledge_is_not_stored_again(
    whole: Path, materials: Materials, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    store(materials, tmp_path, **storing(materials, tmp_path, output=copy))
    assert "finished already" in capsys.readouterr().out


def test_two_writers_at_once_are_one_too_many(
    whole: Path, materials: Materials, tmp_path: Path
) -> None:
    """POSIX locks are per process: the other one is another process."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / MANIFEST).unlink()
    words = [sys.executable, "-c", HOLDER, str(copy / ".lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        try:
            with pytest.raises(InputError, match=f"process {other.pid}"):
                store(materials, tmp_path, **storing(materials, tmp_path, output=copy))
        finally:
            other.kill()
    assert not (copy / MANIFEST).exists()


def test_a_folder_that_another_began_meanwhile_is_refused(
    whole: Path, materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at it and its lock: its files would pass for ours."""
    output = tmp_path / "late"

    def begin(job: Job) -> None:
        shutil.copytree(whole, output)
        (output / MANIFEST).unlink()

    monkeypatch.setattr(cache_knowledge, "describe", begin)
    given = storing(materials, tmp_path, output=output, seed=6)
    with pytest.raises(InputError, match=r"holds another knowledge: .*\bseed\b.* differ"):
        store(materials, tmp_path, **given)
    assert not (output / MANIFEST).exists()


def test_more_files_than_can_be_read_are_refused_with_rows_that_fit(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "MOST_FILES", 9)
    given = storing(materials, tmp_path, output=tmp_path / "k", objective="hid-cls")
    with pytest.raises(InputError, match="at most 9 can be read; give --rows_per_file") as refusal:
        store(materials, tmp_path, **(given | {"rows_per_file": 4}))
    rows = int(str(refusal.value).split("--rows_per_file ")[1].split()[0])
    for fits in (rows, rows + 4):
        job = make_job(parse_storing(flags(**(given | {"rows_per_file": fits}))))
        assert job.contents.rows_per_file == fits and job.contents.files <= 9


def test_values_that_a_precision_cannot_hold_stop_the_storing_by_name(
    materials: Materials, tmp_path: Path
) -> None:
    write_teacher(tmp_path / "loud", materials.shards / "tokenizer", initializer_range=1e5)
    given = dict(teacher=tmp_path / "loud", objective="att-mse", dtype="fp16")
    with pytest.raises(InputError, match="the teacher's key-4 reaches .* more than float16 holds"):
        store(materials, tmp_path, **given)
    assert not (tmp_path / "knowledge" / MANIFEST).exists()
    assert (tmp_path / "knowledge" / IDENTITY).exists()


def test_a_partial_batch_stands_only_at_the_end_of_a_split(
    materials: Materials, tmp_path: Path
) -> None:
    """A row's bits may depend on how many are computed together: files are whole batches."""
    own = dict(data=materials.ragged, teacher=materials.teacher, objective="hid-cls")
    config = write_ds_config(tmp_path / "ds.json")
    job = make_job(
        parse_storing(
            flags(ds_config=config, output=tmp_path / "k", rows_per_file=10, copies=2, **own)
        )
    )
    for part in parts_of(job.contents):
        sizes = [len(batch.input_ids) for batch in rows_of(job).batches(part)]
        last = part.slots.stop == job.contents.slots(part.split)
        assert set(sizes[:-1]) <= {4} and (sizes[-1] == 4 or last)
    assert job.contents.rows_per_file == 8
