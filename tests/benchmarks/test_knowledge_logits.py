"""`benchmarks/knowledge_logits.py`: divergences by hand, and all of it in small."""

import json
import sys
from pathlib import Path

import knowledge_logits
import pytest
import torch

from pretrain.features import TopLogits
from tests.launch import Materials
from tests.launch import materials_fixture as materials_fixture


def test_a_divergence_spreads_what_is_left_out_evenly() -> None:
    """Of p = 1/2, 1/4, 1/8, 1/8 one token is stored, as 1/2; the others weigh 1/6 each."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    ids, logs = torch.tensor([[0, 0]]), torch.tensor([[0.5, 0.0]]).log()  # the second is unused
    found = knowledge_logits.divergences(logits, TopLogits(ids, logs, torch.tensor([0.5])))
    by_hand = 0.25 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.75).log()
    assert found.item() == pytest.approx(by_hand.item())


def test_ours_is_the_least_that_is_as_faithful() -> None:
    kls = {"top 8": 0.3, "top 16": 0.1, "top 24": 0.05, "DistillKit, a": 0.2, "DistillKit, b": 0.01}
    found = knowledge_logits.equal_fidelity({name: {"kl": kl} for name, kl in kls.items()})
    assert list(found) == [("DistillKit, a", "top 16")]


def run(materials: Materials, out: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    flags = f"--teacher {materials.teacher} --data {materials.shards} --rows {rows} --results {out}"
    monkeypatch.setattr(sys, "argv", ["knowledge_logits.py", *flags.split()])
    monkeypatch.setattr(knowledge_logits, "TOKENS", (8, 32))
    knowledge_logits.main()


def test_more_tokens_take_more_bytes_and_lose_less(
    materials: Materials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(materials, tmp_path, monkeypatch, rows=4)
    cases = json.loads((tmp_path / "knowledge-logits.json").read_text())["cases"]
    assert [(case["positions"], case["factor"]) for case in cases] == [
        *(("masked", 1.0), ("masked", 3.0), ("all", 1.0), ("all", 3.0))
    ]
    for case in cases:
        few, many = (case["ways"][f"top {k}"] for k in (8, 32))
        assert 0 < few["bytes"] < many["bytes"]
        assert few["kl"] > many["kl"] > 0
        assert few["kl_p99"] > few["kl"]
    assert (tmp_path / "knowledge-logits.md").read_text() in capsys.readouterr().out


def test_more_rows_than_there_are_are_refused(
    materials: Materials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(materials, tmp_path, monkeypatch, rows=10**6)
    assert stop.value.code == 2
    assert "give --rows below that" in capsys.readouterr().err
