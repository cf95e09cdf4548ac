"""Stored knowledge on disk: rows in any order, and nothing damaged is taken for whole."""

import copy
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zstandard import ZstdCompressor

from data_prep.shard_format import TRAIN, VALIDATION
from potstill.errors import InputError
from potstill.files import read_sealed_json, write_sealed_json
from pretrain.knowledge.format import (
    IDENTITY,
    MANIFEST,
    SEAL_BYTES,
    file_image,
    is_sealed,
    parts_of,
    read_knowledge_manifest,
)
from pretrain.knowledge.job import make_job
from pretrain.knowledge.settings import parse_config
from pretrain.knowledge.source import open_knowledge
from pretrain.knowledge.writer import live_teacher, records_of, rows_of
from tests.chaos.shard_flips import flip
from tests.launch import Materials, flags, write_ds_config
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain.stored import CPU, opened, store

pytestmark = pytest.mark.usefixtures("one_rank")

CUT = {"objective": "hid-seq", "keep": "1l_5t_0.4h", "keep_length": "attention", "dtype": "int8"}
COPIES, FILE_ROWS = 3, 20


@pytest.fixture(scope="module", params=["none", "zstd"])
def packed(
    request: pytest.FixtureRequest,
    materials: Materials,
    one_rank: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Knowledge of three copies in files of 20 rows, which end within a copy."""
    folder = tmp_path_factory.mktemp(request.param)
    many = dict(copies=COPIES, rows_per_file=FILE_ROWS, compression=request.param)
    return store(materials, folder, keep_width="importance", **CUT, **many)


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(packed, tmp_path / "copy")


def rows_at_once(materials: Materials, knowledge: Path, folder: Path) -> dict[str, np.ndarray]:
    """All records of each split in the order of their slots, straight from the teacher."""
    many = dict(copies=COPIES, rows_per_file=FILE_ROWS, keep_width="importance")
    given = dict(data=materials.ragged, teacher=materials.teacher, output=folder / "none")
    config = write_ds_config(folder / "ds.json")
    job = make_job(parse_config(flags(ds_config=config, **(given | CUT | many))))
    teacher, rows = live_teacher(job, CPU), rows_of(job)
    found: dict[str, list[np.ndarray]] = {TRAIN: [], VALIDATION: []}
    for part in parts_of(job.contents):
        for batch in rows.batches(part):
            found[part.split].append(records_of(job.entries, teacher, batch, CPU))
    return {split: np.concatenate(records) for split, records in found.items()}


def test_any_slots_in_any_order_give_what_the_teacher_gave(
    packed: Path, materials: Materials, tmp_path: Path
) -> None:
    knowledge = opened(packed)
    reader, written = knowledge.reader(), rows_at_once(materials, packed, tmp_path)
    assert len(knowledge.manifest.of_split(TRAIN)) > 2 * COPIES
    for split, records in written.items():
        total = knowledge.manifest.contents.slots(split)
        assert total == len(records)
        orders = [np.arange(total), np.random.default_rng().integers(0, total, 50)]
        orders += [np.array([total - 1]), np.array([FILE_ROWS, 0, FILE_ROWS - 1, 0]) % total]
        for slots in orders:
            assert reader.read(split, slots).tobytes() == records[slots].tobytes()


def test_a_reader_survives_pickling_with_its_files_open(packed: Path) -> None:
    reader = opened(packed).reader()
    before = reader.read(TRAIN, np.arange(30))
    again = copy.copy(reader)
    assert again.read(TRAIN, np.arange(30)).tobytes() == before.tobytes()
    assert len(pickle.dumps(reader)) < 50_000, "maps of files travelled too"


# --- files


def test_a_flipped_byte_in_any_file_is_noticed_at_the_start(copied: Path) -> None:
    names = [file.name for file in read_knowledge_manifest(copied).files]
    assert len(names) > 10
    for name in names:
        path = copied / name
        place = int.from_bytes(os.urandom(4), "little") % path.stat().st_size
        flip(path, place, 3)
        with pytest.raises(InputError, match=rf"{name} is corrupted: its SHA-256 is .*copy it"):
            opened(copied)
        assert not is_sealed(path)
        flip(path, place, 3)
        assert is_sealed(path)
    opened(copied)


@pytest.mark.parametrize("check_files", [True, False])
@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "empty", "folder"])
def test_a_file_that_is_missing_or_of_a_wrong_size_is_refused_by_name(
    harm: str, check_files: bool, copied: Path
) -> None:
    path = copied / read_knowledge_manifest(copied).of_split(TRAIN)[1].name
    content = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm != "missing":
        sizes = {"shorter": content[:100], "longer": content + b"x" * 100, "empty": b""}
        path.write_bytes(sizes[harm])
    if harm == "longer" and not check_files and b"zstd" in (copied / MANIFEST).read_bytes():
        pytest.skip("frames have sizes of their own: what stands behind them is never read")
    with pytest.raises(InputError, match=path.name):
        knowledge = open_knowledge(copied)
        if check_files:
            knowledge.check_files()
        knowledge.reader().check_sizes()


def test_zstd_notices_a_flipped_byte_of_a_record_when_it_is_read(copied: Path) -> None:
    if read_knowledge_manifest(copied).contents.compression != "zstd":
        pytest.skip("plain records have no checksum of their own")
    knowledge = opened(copied)
    file = knowledge.manifest.of_split(TRAIN)[0]
    head, end = 8 * (file.records + 1), (copied / file.name).stat().st_size - SEAL_BYTES
    noticed = 0
    for place in np.random.default_rng().integers(head, end, 40).tolist():
        flip(copied / file.name, place, 2)
        try:
            with pytest.raises(InputError, match=rf"{file.name}: record \d+ is damaged"):
                knowledge.reader().read(TRAIN, np.arange(file.records))
            noticed += 1
        finally:
            flip(copied / file.name, place, 2)
    assert noticed == 40


def test_a_frame_takes_no_more_memory_than_a_record(copied: Path) -> None:
    """1 GiB of zeros in a few bytes, in the place of the first record."""
    knowledge = opened(copied)
    if knowledge.manifest.contents.compression != "zstd":
        pytest.skip("plain records have no sizes of their own")
    file = knowledge.manifest.of_split(TRAIN)[0]
    bomb = ZstdCompressor(level=1).compress(bytes(2**26))
    offsets = 8 * (file.records + 1) + np.r_[0, np.full(file.records, len(bomb))]
    (copied / file.name).write_bytes(offsets.astype("<i8").tobytes() + bomb + bytes(SEAL_BYTES))
    with pytest.raises(InputError, match=rf"{file.name}: record 0 is damaged \(67108864 bytes"):
        knowledge.reader().read(TRAIN, np.array([0]))


@pytest.mark.parametrize("offset", [-(2**62), -1, 2**62])
def test_offsets_that_lead_elsewhere_are_refused(offset: int, copied: Path) -> None:
    knowledge = opened(copied)
    if knowledge.manifest.contents.compression != "zstd":
        pytest.skip("plain records need no offsets")
    path = copied / knowledge.manifest.of_split(TRAIN)[0].name
    content = path.read_bytes()
    path.write_bytes(offset.to_bytes(8, "little", signed=True) + content[8:])
    with pytest.raises(InputError, match=f"{path.name}: record 0 is damaged"):
        knowledge.reader().read(TRAIN, np.array([0]))


# --- the manifest


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as someone would who can seal it."""
    fields = read_sealed_json(folder / MANIFEST)
    change(fields)
    write_sealed_json(folder / MANIFEST, fields)


def test_a_manifest_that_is_not_as_it_was_written_is_refused(copied: Path) -> None:
    whole = (copied / MANIFEST).read_bytes()
    places = np.random.default_rng().integers(0, len(whole) - 2, 30).tolist()
    for harmed in [whole[: len(whole) // 2], b"", *(flipped(whole, place) for place in places)]:
        (copied / MANIFEST).write_bytes(harmed)
        with pytest.raises(InputError, match=f"{MANIFEST} is damaged or malformed"):
            read_knowledge_manifest(copied)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def set_(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """The change of one value, by its path."""

    def change(fields: dict[str, Any]) -> None:
        *outer, last = (int(p) if p.isdigit() else p for p in path.split("."))
        for name in outer:
            fields = fields[name]  # type: ignore[index]
        fields[last] = value  # type: ignore[index]

    return change


MALFORMED = {
    "no contents": (lambda f: f.pop("contents"), "'contents' is missing"),
    "unknown field": (set_("contents.colour", "red"), "'colour' unknown"),
    "text for a number": (set_("contents.copies", "3"), "contents.copies is '3'"),
    "no copies": (set_("contents.copies", 0), "must be positive"),
    "no rows": (set_("contents.rows", {"train": 0, "validation": 9}), "rows are"),
    "another split": (set_("contents.rows", {"train": 5, "test": 9}), "rows are"),
    "rows without number": (set_("contents.rows.train", 2**63), "its rows need"),
    "files of no rows": (set_("contents.rows_per_file", 1), "its rows need"),
    "a file elsewhere": (set_("files.0.name", "../../etc/passwd"), "not those of its rows"),
    "an absolute file": (set_("files.0.name", "/etc/passwd"), "not those of its rows"),
    "records": (set_("files.1.records", 7), "not those of its rows"),
    "a sum that is none": (set_("files.1.sha256", "0"), "sha256 of validation|sha256 of train"),
    "a file less": (lambda f: f["files"].pop(), "its rows need"),
    "compression": (set_("contents.compression", "rar"), "compression is 'rar'"),
    "version as text": (set_("format_version", "1"), "format_version is '1'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_refused_by_the_fields_name(case: str, copied: Path) -> None:
    change, told = MALFORMED[case]
    rewrite(copied, change)
    with pytest.raises(InputError, match=f"{MANIFEST} is damaged or malformed .*({told})"):
        read_knowledge_manifest(copied)


def test_another_version_of_the_format_is_refused(copied: Path) -> None:
    rewrite(copied, set_("format_version", 2))
    with pytest.raises(InputError, match="is of format version 2, and this Potstill reads 1"):
        read_knowledge_manifest(copied)


def test_knowledge_that_is_not_finished_is_told_from_no_knowledge(copied: Path) -> None:
    (copied / MANIFEST).unlink()
    with pytest.raises(InputError, match="is not finished: run the same cache_knowledge.py again"):
        read_knowledge_manifest(copied)
    (copied / IDENTITY).unlink()
    with pytest.raises(InputError, match="is no folder of pretrain/cache_knowledge.py"):
        read_knowledge_manifest(copied)


# --- what the manifest says of the teacher, and of what is stored


BAD_TEACHERS = {
    "code of its own": ({"auto_map": {"AutoModelForMaskedLM": "evil.Model"}}, "auto_map"),
    "another architecture": ({"model_type": "gpt2"}, "model type 'gpt2' is not supported"),
    "no architecture": ({"model_type": None}, "model type None is not supported"),
    "a wide one": ({"hidden_size": 2**40}, "hidden_size"),
    "many layers": ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
    "a decoder": ({"is_decoder": True}, "is_decoder"),
    "a kernel of its own": (
        {"attn_implementation": "evil/kernel"},
        "attn_implementation|attention",
    ),
    "text": ({"hidden_size": "wide"}, "hidden_size|unreadable"),
    "memory": ({"vocab_size": 2**24, "hidden_size": 2**16}, "GiB of weights"),
}


@pytest.mark.parametrize("case", BAD_TEACHERS)
def test_a_stored_config_can_neither_load_code_nor_fill_the_memory(
    case: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, told = BAD_TEACHERS[case]
    (copied / "evil.py").write_text("raise SystemExit('code of the knowledge ran')")
    monkeypatch.chdir(copied)
    rewrite(copied, lambda fields: fields["contents"]["teacher_config"].update(changes))
    with pytest.raises(InputError, match=f"(?s)--knowledge .*({told})"):
        _ = opened(copied).teacher


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("contents.dtype", "fp3"),
        ("contents.features.0.at", "top"),
        ("contents.features.0.at", None),
        ("contents.keep", "1l_9999t_7h"),
    ],
)
def test_features_that_cannot_be_are_refused(path: str, value: Any, copied: Path) -> None:
    rewrite(copied, set_(path, value))
    with pytest.raises(InputError, match="describes no features that can be|--keep 1l_9999t_7h"):
        opened(copied).reader().check_sizes()


def test_sizes_are_compared_before_memory_is_taken(copied: Path) -> None:
    """Records of ten million tokens: the files hold none, and none is allocated."""
    if read_knowledge_manifest(copied).contents.compression == "zstd":
        pytest.skip("frames are compared one by one")
    rewrite(copied, set_("contents.keep", "1l_9999999t_0.4h"))
    rewrite(copied, set_("contents.seq_length", 10**7))
    with pytest.raises(InputError, match=r"does not hold \d+ records of \d+ bytes"):
        opened(copied).reader().check_sizes()


# --- names and images


@pytest.mark.parametrize("rows", [1, 19, 20, 21, 60])
def test_parts_cover_every_slot_once_in_order(rows: int, packed: Path) -> None:
    contents = read_knowledge_manifest(packed).contents
    parts = parts_of(replace(contents, rows={TRAIN: rows, VALIDATION: 3}, rows_per_file=20))
    for split, total in ((TRAIN, rows * COPIES), (VALIDATION, 3)):
        slots = [slot for part in parts if part.split == split for slot in part.slots]
        assert slots == list(range(total))
    assert len({part.name for part in parts}) == len(parts)
    assert all(len(part.slots) <= 20 for part in parts)


def test_zstd_keeps_the_bytes_of_a_record(packed: Path) -> None:
    records = np.frombuffer(os.urandom(300) + bytes(300), np.dtype([("x", "<i2", (30,))]))
    image = file_image(records, "zstd")
    offsets = np.frombuffer(image[: 8 * 11], "<i8")
    assert offsets[0] == 88 and offsets[-1] == len(image) - SEAL_BYTES
    assert file_image(records, "none")[:-SEAL_BYTES] == records.tobytes()
