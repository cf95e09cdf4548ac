"""Shards and manifests on disk: read back as written, and refused when they are not."""

import json
import multiprocessing
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.shard_format import (
    ShardReader,
    read_manifest,
    shard_image,
    token_dtype,
    verify_files,
)
from potstill.errors import InputError


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, run_here: Callable[..., Path], corpus: Path
) -> Path:
    output = tmp_path_factory.mktemp("shards") / "made"
    return run_here(output, corpus, flags="--workers 1 --rows_per_shard 100")


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "copy")


def first_row(reader: ShardReader) -> list[int]:
    return reader.read(np.array([0]))[0].tolist()


def test_reader_gives_in_any_order_what_hdf5_gives(shards: Path) -> None:
    reader = ShardReader(shards, "train")
    whole = np.concatenate(
        [h5py.File(shards / file.name)["input_ids"][:] for file in reader._files]
    )
    assert len(whole) == reader.rows > 500
    order = np.random.default_rng(0).permutation(reader.rows)
    found = reader.read(order)
    assert found.dtype == np.int64
    assert (found == whole[order]).all()


def test_layout_is_contiguous_uint16_and_the_same_bytes_each_time() -> None:
    rows = np.arange(60, dtype=np.uint16).reshape(5, 12)
    image = shard_image(rows)
    assert image == shard_image(rows.copy())
    assert image.count(rows.tobytes()) == 1  # in one uncompressed run


@pytest.mark.parametrize(("size", "dtype"), [(30_522, "uint16"), (65_535, "uint16")])
def test_small_vocabularies_take_two_bytes(size: int, dtype: str) -> None:
    assert token_dtype(size) == np.dtype(dtype)


def test_large_vocabularies_take_four_bytes() -> None:
    assert token_dtype(65_536) == np.dtype("uint32")


def test_an_opened_reader_survives_pickling_and_fork(shards: Path) -> None:
    reader = ShardReader(shards, "train")
    expected = first_row(reader)
    assert first_row(pickle.loads(pickle.dumps(reader))) == expected
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(first_row, (reader,)) == expected


def test_rows_outside_the_split_are_refused(shards: Path) -> None:
    reader = ShardReader(shards, "validation")
    for row in (-1, reader.rows):
        with pytest.raises(IndexError):
            reader.read(np.array([row]))


def test_manifest_counts_what_the_rows_hold(shards: Path) -> None:
    manifest = read_manifest(shards)
    for split, size in manifest.splits.items():
        reader = ShardReader(shards, split)
        rows = reader.read(np.arange(reader.rows))
        assert size.rows == len(rows)
        assert size.padding == (rows == manifest.special_ids["pad"]).sum()
        assert size.tokens + size.padding == rows.size
    total = sum(size.padding for size in manifest.splits.values())
    assert total < 0.01 * sum(size.tokens for size in manifest.splits.values())


def test_one_flipped_byte_is_found_and_named(copied: Path) -> None:
    manifest = read_manifest(copied)
    verify_files(copied, manifest, manifest.files + manifest.tokenizer_files)
    path = copied / manifest.files[1].name
    image = bytearray(path.read_bytes())
    image[len(image) // 2] ^= 1
    path.write_bytes(image)
    verify_files(copied, manifest, manifest.files[:1])
    with pytest.raises(InputError, match=f"{path.name} is corrupted"):
        verify_files(copied, manifest, manifest.files)


@pytest.mark.parametrize("damage", ["missing", "cut", "not_hdf5"])
def test_a_damaged_shard_is_named_by_the_reader(copied: Path, damage: str) -> None:
    path = copied / read_manifest(copied).of_split("train")[0].name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"no shard at all")
    with pytest.raises(InputError, match=path.name):
        ShardReader(copied, "train").read(np.array([0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"seq_length": "long"}, "malformed"),
        ({"unknown": 1}, "malformed"),
        ({"splits": {}}, "malformed"),
        (
            {
                "files": [{"name": "../x.h5", "split": "train", "rows": 1, "sha256": ""}],
                "splits": {
                    "train": {"rows": 1, "tokens": 128, "padding": 0},
                    "validation": {"rows": 0, "tokens": 0, "padding": 0},
                },
            },
            "outside",
        ),
        ({"tokenizer_files": [{"name": "../x", "split": "", "rows": 0, "sha256": ""}]}, "outside"),
        ({"tokenizer_files": [{"name": "/x", "split": "", "rows": 0, "sha256": ""}]}, "outside"),
    ],
)
def test_a_manifest_that_is_wrong_is_refused(
    copied: Path, change: dict[str, object], message: str
) -> None:
    path = copied / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_manifest(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(copied: Path, content: bytes) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="malformed"):
        read_manifest(copied)


def test_no_validation_rows_is_refused_with_the_remedy(
    tmp_path: Path, run_here: Callable[..., Path], corpus: Path
) -> None:
    output = run_here(tmp_path / "out", corpus, flags="--validation_fraction 0 --workers 1")
    assert ShardReader(output, "train").rows
    with pytest.raises(InputError, match="no validation rows.*--validation_fraction"):
        ShardReader(output, "validation")


def test_rows_that_are_expected_are_read_as_before(shards: Path) -> None:
    """Blocks of 64 rows: inside a shard of 100, over its end, at the end of the last one."""
    reader = ShardReader(shards, "train")
    numbers = np.arange(reader.rows)
    expected = ShardReader(shards, "train").read(numbers)
    reader.expect(np.array([0, 64, 192, reader.rows - 1]), 64)
    assert (reader.read(numbers) == expected).all()


def test_only_rows_that_follow_one_another_are_read_ahead(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 100 rows: a run over the end of one is told of each shard it touches."""
    reader = ShardReader(shards, "train")
    told: list[tuple[int, int]] = []

    def listen(firsts: np.ndarray, count: int) -> None:
        told.append((int(firsts[0]), count))

    monkeypatch.setattr(reader, "expect", listen)
    for rows in (np.array([7]), np.array([3, 9, 4]), np.array([99, 100])):
        reader.read(rows)
    assert not told
    reader.read(np.arange(90, 120))
    reader.read(np.array([12, 10, 11]))
    assert told == [(90, 10), (100, 20), (10, 3)]


def test_more_shards_than_open_files_are_allowed(
    run_here: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    """Each memory map holds its file open; the soft limit is raised, the hard one stays."""
    folder = run_here(tmp_path / "made", corpus, flags="--workers 1 --rows_per_shard 4")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
        reader = ShardReader(folder, "train")
        assert len(reader._files) > 128
        assert len(reader.read(np.arange(reader.rows))) == reader.rows
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
