"""Shards of other scripts: unmasked to the token, each row once, bad ones refused by name."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from data_prep.legacy_shards import Converter, find_legacy, row_digests, unmask
from data_prep.shard import main
from data_prep.shard_format import TRAIN, VALIDATION, ShardReader, read_manifest
from data_prep.tokenization import load_tokenizer, special_ids
from potstill.errors import InputError

LENGTH, MOST = 32, 5
VOCAB = 2000
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def ids(tokenizer_folder: Path) -> dict[str, int]:
    return special_ids(load_tokenizer(tokenizer_folder))


def plain_rows(count: int, ids: dict[str, int], seed: int = 0) -> np.ndarray:
    """Rows `[CLS] a [SEP] b [SEP]`, every tenth of them short and padded; int32 (count, LENGTH)."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(10, VOCAB, (count, LENGTH), dtype=np.int32)
    rows[:, 0], rows[:, LENGTH // 2], rows[:, -1] = ids["cls"], ids["sep"], ids["sep"]
    for row in rows[::10]:
        length = int(draw.integers(20, LENGTH))
        row[length - 1], row[length:] = ids["sep"], ids["pad"]
    return rows


def masked_by_the_scripts(rows: np.ndarray, ids: dict[str, int], seed: int) -> dict[str, Any]:
    """The datasets that those scripts write: 80/10/10 masks, unused entries 0."""
    draw = np.random.default_rng(seed)
    seen = rows.copy()
    positions = np.zeros((len(rows), MOST), np.int32)
    labels = np.zeros((len(rows), MOST), np.int32)
    for number, row in enumerate(rows):
        ordinary = np.flatnonzero(~np.isin(row, list(ids.values())))
        chosen = np.sort(draw.choice(ordinary, int(draw.integers(1, MOST + 1)), replace=False))
        positions[number, : len(chosen)], labels[number, : len(chosen)] = chosen, row[chosen]
        for place in chosen:
            fate = draw.random()
            if fate < 0.8:
                seen[number, place] = ids["mask"]
            elif fate < 0.9:
                seen[number, place] = draw.integers(10, VOCAB)
    return {
        "input_ids": seen,
        "input_mask": (rows != ids["pad"]).astype(np.int8),
        "masked_lm_positions": positions,
        "masked_lm_ids": labels,
    }


def write(path: Path, datasets: dict[str, Any], nvidia: bool = False) -> Path:
    """As NVIDIA's or academic-budget BERT's script writes them: gzip, automatic chunks."""
    rows = len(datasets["input_ids"])
    if nvidia:
        datasets = datasets | {
            "segment_ids": np.zeros((rows, LENGTH), np.int8),
            "next_sentence_labels": np.zeros(rows, np.int8),
        }
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file.create_dataset(name, data=values, compression="gzip")
    return path


def all_rows(folder: Path) -> np.ndarray:
    readers = [ShardReader(folder, split) for split in (TRAIN, VALIDATION)]
    return np.concatenate([reader.read(np.arange(reader.rows)) for reader in readers])


FLAGS = f"--workers 1 --seq_length {LENGTH} --rows_per_shard 400 --validation_fraction 0.1"


@pytest.fixture(scope="module")
def converted(
    run_here: Run, ids: dict[str, int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, np.ndarray, Path]:
    """1,000 rows, each twice with other masks, in files of both scripts."""
    folder = tmp_path_factory.mktemp("older")
    rows = plain_rows(1000, ids)
    write(folder / "one.hdf5", masked_by_the_scripts(rows, ids, 1))
    again = masked_by_the_scripts(rows[::-1], ids, 2)
    write(folder / "two.hdf5", again, nvidia=True)
    return run_here(folder.parent / "converted", folder, flags=FLAGS), rows, folder


def test_rows_come_back_as_they_were_each_once(converted: tuple[Path, np.ndarray, Path]) -> None:
    output, rows, _ = converted
    found = all_rows(output)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, rows.tolist()))


def test_the_split_is_by_row_and_of_the_wanted_size(
    converted: tuple[Path, np.ndarray, Path], ids: dict[str, int]
) -> None:
    output, rows, _ = converted
    manifest = read_manifest(output)
    train, validation = manifest.splits[TRAIN], manifest.splits[VALIDATION]
    assert train.rows + validation.rows == 1000 == manifest.documents
    assert abs(validation.rows - 100) < 5 * (1000 * 0.1 * 0.9) ** 0.5
    assert train.padding + validation.padding == (rows == ids["pad"]).sum()
    assert train.tokens + validation.tokens == (rows != ids["pad"]).sum()
    assert [file.rows for file in manifest.of_split(TRAIN)][:2] == [400, 400]
    assert [source["documents"] for source in manifest.sources] == [1000, 0]
    # In the order of the files, as long documents stand in them.
    order = {tuple(row): number for number, row in enumerate(rows.tolist())}
    reader = ShardReader(output, TRAIN)
    numbers = [order[tuple(row)] for row in reader.read(np.arange(reader.rows)).tolist()]
    assert numbers == sorted(numbers)


def test_the_same_files_give_the_same_bytes_and_a_finished_folder_stays(
    run_here: Run, converted: tuple[Path, np.ndarray, Path], digests: Run, tmp_path: Path
) -> None:
    output, _, folder = converted
    before = digests(output)
    run_here(output, folder, flags=FLAGS)
    assert digests(output) == before
    assert digests(run_here(tmp_path / "again", folder, flags=FLAGS)) == before


def test_a_run_stopped_behind_its_last_row_is_completed(
    run_here: Run,
    converted: tuple[Path, np.ndarray, Path],
    digests: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, _, folder = converted
    with monkeypatch.context() as broken:
        broken.setattr("data_prep.sharding.write_manifest", _stop)
        with pytest.raises(KeyboardInterrupt):
            run_here(tmp_path / "stopped", folder, flags=FLAGS)
    assert digests(run_here(tmp_path / "stopped", folder, flags=FLAGS)) == digests(output)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_real_program_converts_and_says_what_it_left_out(
    run_program: Run, tokenizer_folder: Path, ids: dict[str, int], tmp_path: Path
) -> None:
    rows = plain_rows(300, ids)
    path = write(tmp_path / "old.h5", masked_by_the_scripts(np.r_[rows, rows[:50]], ids, 3))
    command = ["--input", path, "--tokenizer", tokenizer_folder, "--output", tmp_path / "new"]
    done = run_program(*command, "--seq_length", LENGTH)
    assert done.returncode == 0, done.stderr
    assert "350 rows read by one process" in done.stdout
    assert "50 were equal to others" in done.stdout
    assert run_program("--verify", tmp_path / "new").returncode == 0


Change = Callable[[dict[str, Any]], dict[str, Any]]


def _only(*names: str) -> Change:
    return lambda datasets: {name: datasets[name] for name in names}


def _with(**changes: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda datasets: datasets | {n: act(datasets[n].copy()) for n, act in changes.items()}


def _put(place: tuple[Any, ...], value: int) -> Callable[[np.ndarray], np.ndarray]:
    def act(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return act


BAD: dict[str, tuple[Change, tuple[str, ...]]] = {
    "our own": (_only("input_ids"), ("no dataset input_mask",)),
    "length": (_with(input_ids=lambda v: v[:, :16]), ("rows of 16", "--seq_length 16")),
    "fewer rows": (_with(masked_lm_ids=lambda v: v[1:]), ("masked_lm_ids is int32", "each of")),
    "floats": (_with(input_ids=lambda v: v.astype(float)), ("input_ids is float64",)),
    "slots": (_with(masked_lm_ids=lambda v: v[:, 1:]), ("differ in shape",)),
    "vocabulary": (_with(input_ids=_put((3, 2), 5000)), ("to 5000", "--tokenizer")),
    "negative": (_with(input_ids=_put((3, 2), -1)), ("from -1",)),
    "mask": (_with(input_ids=lambda v: np.where(v == 4, 9, v)), ("mask id 4 at 0%", "--tokenizer")),
    "cls": (_with(input_ids=_put((5, 0), 9)), ("begin with 9",)),
    "padding": (_with(input_mask=_put((7, -1), 0)), ("padding that input_mask does not tell",)),
    "outside": (_with(masked_lm_positions=_put((2, 0), LENGTH)), ("outside the row",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name_and_leave_no_shards(
    case: str, run_here: Run, ids: dict[str, int], tmp_path: Path
) -> None:
    assert ids["mask"] == 4
    change, words = BAD[case]
    datasets = change(masked_by_the_scripts(plain_rows(100, ids), ids, 1))
    path = write(tmp_path / "bad.hdf5", datasets)
    with pytest.raises(InputError) as caught:
        run_here(tmp_path / "out", path, flags=f"--workers 1 --seq_length {LENGTH}")
    for word in ("bad.hdf5", *words):
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_hdf5_or_mixed_with_text_is_refused(
    run_here: Run, ids: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "no.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n but no more")
    with pytest.raises(InputError, match=r"no\.hdf5 is no whole HDF5 file"):
        run_here(tmp_path / "out", tmp_path / "no.hdf5")
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = write(folder / "good.hdf5", masked_by_the_scripts(plain_rows(9, ids), ids, 1))
    (folder / "text.txt").write_text("words\n")
    for inputs in ((good, folder / "text.txt"), (folder,)):
        with pytest.raises(InputError, match=r"good\.hdf5 is HDF5 and .*text\.txt is not"):
            run_here(tmp_path / "out", *inputs)
    with pytest.raises(InputError, match="does not exist"):
        run_here(tmp_path / "out", tmp_path / "missing.hdf5")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("missing.hdf5", "missing.hdf5 does not exist"),
        ("missing.txt", "missing.txt does not exist"),
        ("no folder", "no folder does not exist"),
        ("empty", "empty is not HDF5 and holds none"),
        ("notes.md", "notes.md is not HDF5 and holds none"),
    ],
)
def test_no_input_beside_older_shards_is_left_out_silently(
    other: str, message: str, ids: dict[str, int], tmp_path: Path
) -> None:
    good = write(tmp_path / "good.hdf5", masked_by_the_scripts(plain_rows(9, ids), ids, 1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("neither")
    for inputs in ([str(good), str(tmp_path / other)], [str(tmp_path / other), str(good)]):
        with pytest.raises(InputError, match=message):
            find_legacy(inputs)


def test_hidden_files_make_no_folder_one_of_older_shards(
    run_here: Run, corpus: Path, ids: dict[str, int], tmp_path: Path
) -> None:
    datasets = masked_by_the_scripts(plain_rows(9, ids), ids, 1)
    for name in ("text", "older"):
        (tmp_path / name / ".cache").mkdir(parents=True)
        write(tmp_path / name / ".cache" / "x.h5", datasets)
    with pytest.raises(InputError, match="older has no file of a kind that is read"):
        run_here(tmp_path / "out", tmp_path / "older")
    (tmp_path / "text" / "corpus.txt").write_bytes(corpus.read_bytes())
    assert read_manifest(run_here(tmp_path / "out", tmp_path / "text")).documents > 9
    visible = write(tmp_path / "older" / "y.h5", datasets)
    assert [source.path for source in find_legacy([str(tmp_path / "older")])] == [visible]
    hidden = tmp_path / "older" / ".cache" / "x.h5"
    assert [source.path for source in find_legacy([str(hidden)])] == [hidden]  # named itself


@pytest.mark.parametrize(
    "flag", ["--text_column body", "--document_per_file", "--on_bad_text skip", "--engine tokie"]
)
def test_flags_for_text_are_refused(
    flag: str, run_here: Run, ids: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.shard.check_installed", lambda engine: None)
    path = write(tmp_path / "old.hdf5", masked_by_the_scripts(plain_rows(9, ids), ids, 1))
    with pytest.raises(InputError, match=f"{flag.split()[0]} is for text, and --input .*old.hdf5"):
        run_here(tmp_path / "out", path, flags=f"--seq_length {LENGTH} {flag}")
    assert not (tmp_path / "out").exists()


def test_a_stopped_conversion_says_that_nothing_is_kept(
    converted: tuple[Path, np.ndarray, Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"--input {converted[2]} --tokenizer {tokenizer_folder} --output {tmp_path}/out"
    monkeypatch.setattr(sys, "argv", ["shard.py", *command.split(), *FLAGS.split()])
    monkeypatch.setattr(Converter, "_keep", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    printed = capsys.readouterr()
    assert ended.value.code == 143
    assert "SIGTERM; a conversion is all or nothing, nothing is kept: run" in printed.err
    assert "finished shards are kept" not in printed.err + printed.out


def test_every_seed_that_is_allowed_has_digests_of_its_own() -> None:
    rows = np.arange(8, dtype=np.uint16).reshape(2, 4)
    digests = [row_digests(rows, seed) for seed in (0, 1, 2**64 - 1)]
    assert len(set(np.concatenate(digests).tolist())) == 6


def test_a_tokenizer_cannot_be_learned_from_tokens(
    run_program: Run, ids: dict[str, int], tmp_path: Path
) -> None:
    path = write(tmp_path / "old.hdf5", masked_by_the_scripts(plain_rows(9, ids), ids, 1))
    done = run_program("--input", path, "--train_tokenizer", 500, "--output", tmp_path / "out")
    assert done.returncode == 2 and "--train_tokenizer cannot learn" in done.stderr


def test_unused_entries_change_nothing_and_the_slab_stays_as_it_was(ids: dict[str, int]) -> None:
    """By hand: [CLS] 7 [MASK] [SEP], token 11 hidden at 2, two entries unused."""
    row = np.array([[ids["cls"], 7, ids["mask"], ids["sep"]]], np.int32)
    slab = {
        "input_ids": row,
        "input_mask": np.ones((1, 4), np.int8),
        "masked_lm_positions": np.array([[2, 0, 0]], np.int32),
        "masked_lm_ids": np.array([[11, 0, 0]], np.int32),
    }
    assert unmask(slab, "", ids, VOCAB).tolist() == [[ids["cls"], 7, 11, ids["sep"]]]
    assert row[0, 2] == ids["mask"]
