"""`benchmarks/loader.py`: it measures every case, in small, on a corpus that every Python has."""

import json
import pydoc_data.topics
import sys
from pathlib import Path

import loader
import pytest
import torch

from data_prep.tokenization import train_tokenizer


def test_every_case_is_measured_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = pydoc_data.topics.topics.values()
    texts = ["\n".join(filter(str.strip, topic.splitlines())) for topic in topics]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts), encoding="utf-8")
    train_tokenizer(lambda: iter(texts), 2000, tmp_path / "tokenizer")
    out = tmp_path / "loader.json"
    flags = f"--corpus {tmp_path}/corpus.txt --tokenizer {tmp_path}/tokenizer --rows 3000"
    flags += f" --batches 16 --turns 2 --seconds 0.01 --json {out}"
    monkeypatch.setattr(sys, "argv", ["loader.py", *flags.split()])
    threads = torch.get_num_threads()
    try:
        loader.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(out.read_text())
    cases = {(row["loader"], row["where"], row["masks"]) for row in report["rows"]}
    assert len(cases) == len(report["rows"]) == 8
    assert all(row["rows_per_second"] > 0 for row in report["rows"])
    assert 2 < report["bytes_per_token"] < 2.1  # 2 bytes a token, and the manifest
    assert [row["order"][:6] for row in report["cold"]] == ["blocks", "single"]
    assert out.with_suffix(".md").read_text().strip() in capsys.readouterr().out


def test_the_spread_is_median_and_quartiles() -> None:
    assert loader.spread([1.0, 2.0, 3.0]) == {
        "rows_per_second": 2.0,
        "quartile_1": 1.5,
        "quartile_3": 2.5,
    }
