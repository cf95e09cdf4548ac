"""`benchmarks/knowledge_search.py`: the flags that it gives, and the report that it makes."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import knowledge_search
import pytest

from finetune.search.points import points_of
from finetune.search.settings import parse
from tests.launch import Materials
from tests.launch import materials_fixture as materials_fixture


def test_the_report_holds_what_the_search_found_and_what_it_depends_on(
    materials: Materials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def execute(command: Sequence[str | Path]) -> None:
        started.append([str(word) for word in command])
        found = tmp_path / "runs" / "search"
        found.mkdir(parents=True)
        (found / "search.json").write_text(json.dumps({"settings": {"steps": 160}}))
        (found / "results.json").write_text(json.dumps({"points": ["p"], "failed": []}))
        (found / "summary.md").write_text("| cut |\n")
        (found / "curve.svg").write_text("<svg/>")

    monkeypatch.setattr(knowledge_search, "execute", execute)
    monkeypatch.setattr(knowledge_search, "shards", lambda output: materials.shards)
    monkeypatch.setattr(knowledge_search, "packaged_teacher", lambda: materials.teacher)
    flags = ["--output", tmp_path / "runs", "--results", tmp_path, "--images", tmp_path]
    monkeypatch.setattr(sys, "argv", ["knowledge_search.py", *map(str, flags)])
    knowledge_search.main()

    ((_, program, *words),) = started
    assert program == "finetune/search_cuts.py"
    assert len(points_of(parse(words), teacher_layers=6, tokens=128)) == 8 + 2
    report = json.loads((tmp_path / "knowledge-search.json").read_text())
    assert report["points"] == ["p"] and report["settings"] == {"steps": 160}
    assert report["ds_config"]["train_micro_batch_size_per_gpu"] == 32
    assert report["ds_config"]["gradient_accumulation_steps"] == 1
    assert report["data"]["train_rows"] > report["data"]["validation_rows"] > 0
    assert (tmp_path / "knowledge-search.md").read_text() == "| cut |\n"
    assert (tmp_path / "knowledge-curve.svg").read_text() == "<svg/>"
