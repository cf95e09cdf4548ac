"""`benchmarks/knowledge_speed.py`: in small, from shards to tables, on the real trainer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from knowledge_cases import WAYS, WHOLE
from knowledge_store import few_rows

from data_prep.shard_format import TRAIN, VALIDATION, ShardReader
from potstill.errors import InputError
from pretrain.knowledge.format import SEAL_BYTES
from tests.launch import LENGTH, START_LIMIT, Materials, environment
from tests.launch import materials_fixture as materials_fixture

PROGRAM = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "knowledge_speed.py"


def test_steps_and_the_reader_are_measured_on_whole_and_cut_knowledge(
    materials: Materials, tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    flags = f"--data {materials.shards} --tiny --rows 12 --batch 4 --accumulation 2 --turns 2"
    flags += f" --read_seconds 0.01 --json {out} --only"
    words = [*flags.split(), "hid-seq 12x768-4x312"]
    ended = subprocess.run(
        [sys.executable, PROGRAM, *words],
        env=environment(materials.folder),
        timeout=START_LIMIT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    report, names = json.loads(out.read_text()), [way.name for way in WAYS["hid-seq"]]
    assert [row["accumulation"] for row in report["rows"]] == [2, 1]
    for row in report["rows"]:
        assert [way["way"] for way in row["ways"]] == names
        assert all(way["ratio"]["low"] > 0 for way in row["ways"])
        whole, cut = row["ways"]
        seal = SEAL_BYTES / (12 * LENGTH)  # of 12 rows in a file
        assert whole["way"] == WHOLE.name and whole["bytes_per_token"] == 2 * 48 + seal
        assert cut["bytes_per_token"] == 10 * (5 + 2) / LENGTH + seal  # 5 of 48, and a scale
    assert [own["compression"] for own in report["reader"]] == ["none", "zstd"] * 2
    assert all(own["times"] > 0 for own in report["reader"])
    assert out.with_suffix(".md").read_text().strip() in ended.stdout


def test_few_rows_are_the_first_ones(materials: Materials, tmp_path: Path) -> None:
    few = few_rows(materials.shards, tmp_path / "few", {TRAIN: 7, VALIDATION: 2})
    for split, count in ((TRAIN, 7), (VALIDATION, 2)):
        reader, source = ShardReader(few, split), ShardReader(materials.shards, split)
        rows = np.arange(count)
        assert reader.rows == count
        np.testing.assert_array_equal(reader.read(rows), source.read(rows))


def test_more_rows_than_there_are_are_refused(materials: Materials, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="full train rows, 99999 are needed"):
        few_rows(materials.shards, tmp_path / "few", {TRAIN: 99_999, VALIDATION: 1})
