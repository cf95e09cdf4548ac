"""`benchmarks/shards.py`: each pipeline reads the same text, what it keeps is counted right."""

import itertools
import json
import pydoc_data.topics
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import shards
import text_pipelines

from data_prep.tokenization import load_tokenizer, train_tokenizer
from potstill.errors import PotstillError


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text of some documents, and a tokenizer learned from it."""
    folder = tmp_path_factory.mktemp("materials")
    topics = pydoc_data.topics.topics.values()
    texts = ["\n".join(filter(str.strip, topic.splitlines())) for topic in topics]
    (folder / "corpus.txt").write_text("\n\n".join(texts), encoding="utf-8")
    train_tokenizer(lambda: iter(texts), 2000, folder / "tokenizer")
    return shards.sample([str(folder / "corpus.txt")], 60_000, folder / "text.txt"), folder


@pytest.mark.parametrize("name", ["ours", "run_mlm", "static_mask", "python_tokenizer"])
def test_only_the_sharder_keeps_every_token(
    name: str, materials: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, folder = materials
    tokenizer = load_tokenizer(folder / "tokenizer")
    whole = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    assert text_pipelines.count_body_tokens(text, tokenizer) == len(whole)
    if name == "python_tokenizer":
        tokenizer = text_pipelines.python_tokenizer(tokenizer, tmp_path / "vocab.txt")
    output = tmp_path / "out"
    kept = text_pipelines.run(name, text, tokenizer, output, workers=1)()
    assert kept == len(whole) if name == "ours" else 0.7 * len(whole) < kept < len(whole)
    assert text_pipelines.bytes_on_disk(output) > 0


def test_masks_of_the_static_pipeline_are_berts(materials: tuple[Path, Path]) -> None:
    draw = text_pipelines.random.Random(0)
    row = ["[CLS]", *(f"w{i}" for i in range(126)), "[SEP]"]
    drawn = [text_pipelines.mask_tokens(row, ["x"], draw) for _ in range(200)]
    for masked, places, labels in drawn:
        assert labels == [row[place] for place in places] and len(places) == 19
        assert [m for i, m in enumerate(masked) if i not in places] == [
            word for i, word in enumerate(row) if i not in places
        ]
    tokens = [masked[place] for masked, places, _ in drawn for place in places]
    assert np.mean([token == "[MASK]" for token in tokens]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([token == "x" for token in tokens]) == pytest.approx(0.1, abs=0.02)


@pytest.mark.slow
def test_the_program_fills_its_tables_and_watches_real_processes(
    materials: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, folder = materials
    tokenizer = load_tokenizer(folder / "tokenizer")
    outputs = (tmp_path / str(number) for number in itertools.count())

    watched: list[dict[str, float]] = []
    watch = shards.Runner.memory

    def once(runner: shards.Runner, path: Path, workers: int) -> dict[str, float]:
        watched[:] = watched or [watch(runner, path, workers)]
        return watched[0]

    def here(runner: object, name: str, path: Path, workers: int = 1) -> dict[str, float]:
        return text_pipelines.measure(name, path, tokenizer, next(outputs), workers)

    monkeypatch.setattr(shards.Runner, "figures", here)  # a process each takes long to import
    monkeypatch.setattr(shards.Runner, "memory", once)
    names = ("ours", shards.RELEASED)
    monkeypatch.setattr(shards, "PIPELINES", {name: shards.PIPELINES[name] for name in names})
    flags = f"--input {text} --tokenizer {folder}/tokenizer --characters 60000 --turns 2"
    flags += f" --larger 1 --line_megabytes 1 --json {tmp_path}/shards.json"
    monkeypatch.setattr(sys, "argv", ["shards.py", *flags.split()])
    shards.main()
    report = json.loads((tmp_path / "shards.json").read_text())
    assert [row["pipeline"] for row in report["rows"]] == list(names)
    assert report["rows"][0]["dropped"] == 0 and report["rows"][0]["time"]["median"] == 1
    assert report["rows"][1]["dropped"] > 0 and report["rows"][1]["bytes_per_token"] > 1
    assert 0 < report["scale"]["share_outside_tokenizer"]["median"] < 1
    assert all(
        10 < mib < 1024 for kind in ("text", "JSON") for mib in report["memory"][kind].values()
    )
    table = (tmp_path / "shards.md").read_text()
    assert "| the sharder |" in table and "a text line of 1 MB" in table
    spread = r"\| \d+\.\d+%? \(\d+\.\d+%?-\d+\.\d+%?\) \|"
    for line in ("scripts as released", "1 -> 2 workers", "outside the tokenizer"):
        assert re.search(f"{line}.*{spread}", table), table


def test_one_turn_is_refused_because_it_has_no_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shards.py", "--turns", "1"])
    with pytest.raises(SystemExit):
        shards.main()
    assert "--turns is 1, and one turn has no spread" in capsys.readouterr().err


def test_a_pipeline_that_fails_says_why(tmp_path: Path) -> None:
    runner = shards.Runner(str(tmp_path / "no tokenizer"), tmp_path)
    with pytest.raises(PotstillError, match="status 1: (?s:.*)no tokenizer does not exist"):
        runner.figures("count", tmp_path / "text.txt")
