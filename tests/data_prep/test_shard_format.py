"""Shards and manifests on disk: read back as written, and refused when they are not."""

import json
import multiprocessing
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shard_format import (
    ShardReader,
    read_manifest,
    shard_image,
    token_dtype,
    verify_files,
)
from potstill.errors import InputError
from potstill.files import read_sealed_json, write_sealed_json


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


DIGEST = "0" * 64


def resealed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest of a folder and seal it again, as someone with intent would."""
    fields = read_sealed_json(folder / "manifest.json")
    change(fields)
    write_sealed_json(folder / "manifest.json", fields)
    return folder


def one_shard(**changes: object) -> dict[str, object]:
    """A manifest's fields with a single shard, changed."""
    file = {"name": "x.h5", "split": "train", "rows": 1, "sha256": DIGEST} | changes
    train = {"rows": file["rows"], "tokens": 128, "padding": 0}
    return {
        "files": [file],
        "splits": {"train": train, "validation": {"rows": 0, "tokens": 0, "padding": 0}},
    }


def tokenizer_file(name: str) -> dict[str, object]:
    return {"tokenizer_files": [{"name": name, "split": "", "rows": 0, "sha256": DIGEST}]}


BAD_FIELDS = [
    ({"format_version": 99}, "of format version 99, .*no damage"),
    ({"seq_length": "long"}, "the manifest.seq_length is 'long'"),
    ({"seq_length": 2}, "seq_length is 2"),
    ({"seq_length": True}, "seq_length is True"),
    ({"validation_fraction": float("nan")}, "validation_fraction is nan"),
    ({"rows_per_shard": -1}, "rows_per_shard is -1"),
    ({"unknown": 1}, "'unknown' unknown"),
    ({"splits": {}}, "splits are"),
    ({"special_ids": {"pad": 0, "cls": 1, "sep": 2, "mask": 10**6}}, "special_ids are"),
    ({"sources": [{"name": 3, "documents": 1}]}, "name of a source is 3"),
    ({"sources": [{}]}, "documents of a source is None"),
    (one_shard(split="test"), "rows of 'test'"),
    (one_shard(rows=0), "has 0 rows of 'train'"),
    ({"splits": {"train": {}, "validation": {}}}, "'padding' is missing"),
    (one_shard(rows=2), "do not add up"),
    (one_shard(rows=2**60), "has 1152921504606846976 rows"),
    (one_shard(sha256="x"), "sha256 is 'x'"),
    *((one_shard(name=name), "files.0..name.*outside") for name in ("../x", "/x", "a/b", "..", "")),
    (one_shard(name="a\nb"), "outside"),
    *((tokenizer_file(name), "outside") for name in ("../x", "x", "tokenizer/../x", "tokenizer/")),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS)
def test_a_sealed_manifest_that_is_wrong_is_refused_by_field(
    copied: Path, change: dict[str, Any], message: str
) -> None:
    resealed(copied, lambda fields: fields.update(change))
    with pytest.raises(InputError, match=f"manifest.json is .*{message}"):
        read_manifest(copied)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (1, "of format version 1, and .* reads 2; that is no damage: keep .* another folder"),
        (2, "damaged or malformed .it holds no checksum.; copy it again"),
    ],
)
def test_a_manifest_without_a_seal_is_of_the_first_format_or_damaged(
    version: int, message: str, copied: Path
) -> None:
    path = copied / "manifest.json"
    path.write_text(json.dumps(read_sealed_json(path) | {"format_version": version}))
    with pytest.raises(InputError, match=message):
        read_manifest(copied)


@pytest.mark.parametrize("linked", ["train", "tokenizer"])
def test_files_behind_links_are_taken_and_compared_like_others(
    copied: Path, linked: str, tmp_path: Path
) -> None:
    manifest = read_manifest(copied)
    name = manifest.files[0].name if linked == "train" else linked
    rows = ShardReader(copied, "train").read(np.arange(9))
    (copied / name).rename(tmp_path / "elsewhere")
    (copied / name).symlink_to(tmp_path / "elsewhere")  # as hub caches, DVC and git-annex have it
    files = manifest.files + manifest.tokenizer_files
    verify_files(copied, read_manifest(copied), files)
    assert (ShardReader(copied, "train").read(np.arange(9)) == rows).all()
    changed = copied / (name if linked == "train" else "tokenizer/tokenizer.json")
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(InputError, match=f"{changed.name} is corrupted"):
        verify_files(copied, manifest, files)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(value: object) -> list[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)  # type: ignore[call-overload]
    found = [(value, key) for key, _ in items]
    return found + [
        p for _, key in found if isinstance(value[key], dict | list) for p in places(value[key])
    ]  # type: ignore[index]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_value_in_any_field_is_refused_or_changes_only_what_may_differ(
    shards: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, good = tmp_path_factory.getbasetemp() / "sealed", read_manifest(shards)
    folder.mkdir(exist_ok=True)
    fields = read_sealed_json(shards / "manifest.json")
    container, key = data.draw(st.sampled_from(places(fields)))
    if data.draw(st.booleans()):
        del container[key]
    else:
        container[key] = data.draw(JSON)
    write_sealed_json(folder / "manifest.json", fields)
    try:
        found = read_manifest(folder)
    except InputError as error:
        assert "\n" not in str(error)
    else:  # other names, digests and counts may be right; what adds up still does
        assert found.splits.keys() == good.splits.keys()
        assert sum(file.rows for file in found.files) == sum(s.rows for s in found.splits.values())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff"])
def test_a_manifest_that_is_no_json_object_is_refused(copied: Path, content: bytes) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match="malformed"):
        read_manifest(copied)


def replace_dataset(path: Path, how: str) -> None:
    """The same rows of a shard, led to by way of another file."""
    with h5py.File(path, "r+") as file:
        rows = file["input_ids"][:]
        del file["input_ids"]
        raw, other = path.with_suffix(".raw"), path.with_suffix(".other")
        raw.write_bytes(rows.tobytes())
        if how == "external":
            place = [(str(raw), 0, rows.nbytes)]
            file.create_dataset("input_ids", rows.shape, rows.dtype, external=place)
            return
        with h5py.File(other, "w") as beside:
            beside["input_ids"] = rows
        if how == "link":
            file["input_ids"] = h5py.ExternalLink(str(other), "input_ids")
        else:
            layout = h5py.VirtualLayout(rows.shape, rows.dtype)
            layout[:] = h5py.VirtualSource(str(other), "input_ids", rows.shape)
            file.create_virtual_dataset("input_ids", layout)


@pytest.mark.parametrize("how", ["external", "link", "virtual"])
def test_a_shard_that_leads_to_other_files_is_refused(copied: Path, how: str) -> None:
    path = copied / read_manifest(copied).of_split("train")[0].name
    replace_dataset(path, how)
    with pytest.raises(InputError, match=f"{path.name}: input_ids .* leads elsewhere"):
        ShardReader(copied, "train").read(np.array([0]))


def test_good_rows_stand_in_for_those_of_bad_shards_and_the_others_keep_their_numbers(
    shards: Path,
) -> None:
    """Shards of 100 rows, the second and the last bad: row 100 + n becomes row n."""
    files = read_manifest(shards).of_split("train")
    plain = ShardReader(shards, "train")
    rows = plain.read(np.arange(plain.rows))
    reader = ShardReader(shards, "train", {files[1].name, files[-1].name})
    assert reader.rows == plain.rows
    found = reader.read(np.arange(plain.rows))
    last = 100 * (len(files) - 1)
    assert (found[:100] == rows[:100]).all()
    assert (found[200:last] == rows[200:last]).all()
    assert (found[100:200] == rows[:100]).all()
    assert (found[last:] == rows[200 : 200 + len(rows) - last]).all()  # behind those used already
    shuffled = np.random.default_rng(0).permutation(plain.rows)
    assert (reader.read(shuffled) == found[shuffled]).all()
    reader.expect(np.arange(0, plain.rows, 50), 50)


def test_one_good_shard_stands_in_for_all_others(shards: Path) -> None:
    files = read_manifest(shards).of_split("train")
    reader = ShardReader(shards, "train", {file.name for file in files[1:]})
    found = reader.read(np.arange(reader.rows))
    assert (found == np.resize(found[:100], found.shape)).all()


def test_validation_does_without_bad_shards(copied: Path, corpus: Path) -> None:
    manifest = read_manifest(copied)
    (file,) = manifest.of_split("validation")
    assert ShardReader(copied, "validation", {"train-x.h5"}).rows == file.rows
    with pytest.raises(InputError, match="every validation shard in .* is bad"):
        ShardReader(copied, "validation", {file.name})


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
