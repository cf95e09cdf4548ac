"""`benchmarks/loader.py`: it measures every case, in small, on a corpus that every Python has."""

import itertools
import json
import pydoc_data.topics
import sys
from pathlib import Path

import loader
import numpy as np
import pytest
import torch

from data_prep.shard import parse, shard
from data_prep.shard_format import TRAIN, ShardReader
from data_prep.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, corpus.txt, and a tokenizer learned from it."""
    folder = tmp_path_factory.mktemp("materials")
    topics = pydoc_data.topics.topics.values()
    texts = ["\n".join(filter(str.strip, topic.splitlines())) for topic in topics]
    (folder / "corpus.txt").write_text("\n\n".join(texts), encoding="utf-8")
    train_tokenizer(lambda: iter(texts), 2000, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def folder(materials: Path) -> Path:
    """Shards of 3,000 rows."""
    command = f"--input {materials}/corpus.txt --tokenizer {materials}/tokenizer --workers 1"
    shard(parse([*command.split(), "--output", str(materials / "source")]))
    return loader.repeated(materials / "source", materials / "rows", 3000)


def test_every_case_is_measured_and_told(
    materials: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "loader.json"
    flags = f"--corpus {materials}/corpus.txt --tokenizer {materials}/tokenizer --rows 3000"
    flags += f" --batches 16 --turns 2 --seconds 0.01 --json {out}"
    monkeypatch.setattr(sys, "argv", ["loader.py", *flags.split()])
    threads = torch.get_num_threads()
    try:
        loader.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    cases = {(row["loader"], row["where"], row["masks"]) for row in report["rows"]}
    assert len(cases) == len(report["rows"]) == 10
    assert all(row["rows_per_second"]["low"] > 0 for row in report["rows"])
    assert 2 < report["bytes_per_token"] < 2.1  # 2 bytes a token, and the manifest
    assert [row["order"][:6] for row in report["cold"]] == ["blocks", "single"]
    assert out.with_suffix(".md").read_text().strip() in capsys.readouterr().out
    marked = loader.table(report | {"cold": [row | {"from_disk": False} for row in report["cold"]]})
    assert marked.count("(NOT cold: the rows came from memory)") == 2


def test_one_turn_is_refused_because_it_has_no_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loader.py", "--turns", "1"])
    with pytest.raises(SystemExit):
        loader.main()
    assert "--turns is 1, and one turn has no spread" in capsys.readouterr().err


@pytest.mark.parametrize(("half_of_a_row", "from_disk"), [(127, False), (128, True)])
def test_rows_that_did_not_come_from_the_disk_are_marked(
    half_of_a_row: int, from_disk: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 128 tokens are 256 bytes: what counts is half of them, here 3,000 rows."""
    counts = itertools.cycle([0, half_of_a_row * 3000])
    monkeypatch.setattr(loader, "disk_bytes", lambda: next(counts))
    found = loader.cold(folder)
    assert [row["from_disk"] for row in found] == [from_disk, from_disk]
    assert found[0]["bytes_read_per_row"]["median"] == half_of_a_row
    assert {row["rows"] for row in found} == {3000}


def test_a_whole_older_file_gives_every_row_with_its_labels(folder: Path, tmp_path: Path) -> None:
    """The labels put back over the masks are the rows before they were masked."""
    path = loader.older_file(folder, tmp_path / "older.hdf5", 500)
    items = loader.WholeFile(path)
    ids, _, _, labels = (torch.stack(column) for column in zip(*items, strict=True))
    rows = torch.from_numpy(ShardReader(folder, TRAIN).read(np.arange(500)))
    assert torch.equal(torch.where(labels == -1, ids, labels), rows)
    assert 0.1 < (labels != -1).float().mean() < 0.2
    assert loader.loaded_file(path, 32)() == 500
    taken = loader.whole_file(path, 32)
    assert sum(taken() for _ in range(32)) == 1000  # two passes of 15 full batches and a rest
