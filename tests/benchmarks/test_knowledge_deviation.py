"""`benchmarks/knowledge_deviation.py`: in small, what is finer must deviate less."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import knowledge_deviation
import pytest
import torch
from knowledge_study import through

from pretrain.features import Feature
from pretrain.knowledge.hidden import Whole
from tests.launch import HEADS, Materials
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain.tiny import ragged_batch

CHOSEN = ("hid-seq", "att-mse", "kd")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The program sets the number of threads of its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_float32_comes_back_as_it_was_but_for_padding() -> None:
    batch, feature = ragged_batch([5, 8]), Feature("query", 1)
    query = torch.randn(2, HEADS, 8, 8)
    entry = Whole(feature, "fp32", 8, HEADS * 8, HEADS)
    found = through([entry], knowledge_deviation.Taught(batch, {feature: query}))[feature]
    assert torch.equal(found, query * batch.valid[:, None, :, None])


def test_finer_storage_deviates_less_and_trains_nearer(
    materials: Materials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, teacher = tmp_path / "deviation.json", materials.teacher
    flags = f"--data {materials.shards} --teacher {teacher} --head_teacher {teacher} --steps 3"
    flags += f" --batch 2 --held_out 2 --json {out} --trained hid-seq --objectives"
    monkeypatch.setattr(sys, "argv", ["knowledge_deviation.py", *flags.split(), *CHOSEN])
    knowledge_deviation.main()
    rows = {row["objective"]: row for row in json.loads(out.read_text())["rows"]}
    assert tuple(rows) == CHOSEN
    for row in rows.values():
        for where in ("at_the_start", "after_steps"):
            off = {way: own["gradient"] for way, own in row[where].items()}
            assert 0 < off["fp16"] < off["bf16"] < off["fp8"] < 0.3
            assert off["fp16"] < off["int8"] < 0.3
            for own in row[where].values():
                angle = max(0.0, 1 - own["cosine"] ** 2) ** 0.5
                assert angle <= own["gradient"] * (1 + 1e-6) + 1e-7
    tops = [rows["kd"]["after_steps"][f"top {k}"]["gradient"] for k in (16, 50, 128)]
    assert tops == sorted(tops, reverse=True)
    losses = rows["hid-seq"]["held_out"]
    assert losses["fp32"] < rows["hid-seq"]["held_out_before"]
    assert abs(losses["fp16"] / losses["fp32"] - 1) < 1e-3
    assert list(rows["att-mse"]["held_out"]) == ["fp32"]
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    _, trained = text.split("\n\n")  # the second table is of what was trained on each precision
    assert "| hid-seq | fp32 |" in trained and "att-mse" not in trained
