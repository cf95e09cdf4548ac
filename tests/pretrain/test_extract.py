"""The program: a student folder that opens anywhere, a record of it, the same at any ranks."""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from pretrain import extract
from pretrain.models import has_untrained_head, load_encoder
from pretrain.student.extraction import RECORD
from pretrain.student.extraction_record import parameters_by_kind, ranges
from tests.launch import Materials, flags
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain.tiny import FAMILIES, tiny_encoder

ROWS = 50
Run = Callable[..., Path]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`start_ranks` without DeepSpeed: a process group of this process alone."""

    def start_alone() -> torch.device:
        store = dist.FileStore(str(tmp_path / "ranks"), 1)
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=limit)
        return torch.device("cpu")

    monkeypatch.setattr(extract, "start_ranks", start_alone)
    disable_progress_bar()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def run(materials: Materials, ranks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the program in this process; the folder that it wrote."""

    def call(name: str = "student", **given: Any) -> Path:
        arguments = flags(**(defaults(materials, tmp_path / name) | given))
        monkeypatch.setattr(sys, "argv", ["extract.py", *arguments])
        extract.main()
        return tmp_path / name

    return call


def defaults(materials: Materials, output: Path) -> dict[str, Any]:
    """An extraction that works."""
    return {
        "teacher": materials.teacher,
        "data": materials.ragged,
        "layers": 2,
        "hidden": 16,
        "method": "etd-impt",
        "rows": ROWS,
        "micro_batch": 8,
        "output": output,
    }


def record_of(folder: Path) -> dict[str, Any]:
    """What the program noted."""
    return json.loads((folder / RECORD).read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The student's weights."""
    return AutoModelForMaskedLM.from_pretrained(folder).state_dict()


def test_the_student_is_a_normal_checkpoint(run: Run, materials: Materials) -> None:
    folder = run(ffn=24)
    encoder = AutoModel.from_pretrained(folder)
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 16, 24)
    assert config.num_attention_heads == 4 and not has_untrained_head(config)
    words = AutoTokenizer.from_pretrained(folder)
    ids = words("one thing is another", return_tensors="pt")
    assert (
        ids["input_ids"].tolist()
        == (AutoTokenizer.from_pretrained(materials.teacher)(["one thing is another"])["input_ids"])
    )
    assert encoder(**ids).last_hidden_state.shape == (1, ids["input_ids"].shape[1], 16)
    assert model(**ids).logits.isfinite().all()
    assert load_encoder(str(folder), "--student").trained_head
    assert "etd-impt" in (folder / "README.md").read_text()


def test_the_record_and_the_output_say_what_was_kept_spent_and_lost(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    record, shown = record_of(run()), capsys.readouterr().out
    assert record["teacher_layers"] == [2, 4] and record["importance_rows"] == ROWS
    hidden = {layer["hidden"] for layer in record["kept"]}
    assert len(hidden) == 1  # hidden consistency
    assert all(len(layer["query_key"]) == len(layer["value"]) == 4 for layer in record["kept"])
    assert set(record["mlm_loss"]) == {"teacher", "student"}
    assert all(0 < loss < 50 for loss in record["mlm_loss"].values())
    parameters = record["parameters"]
    assert parameters["attention"]["student"] == 2 * 4 * (16 * 16 + 16)
    assert parameters["ffn"]["student"] == 2 * (2 * 16 * 32 + 16 + 32)
    assert parameters["norms"]["student"] == 5 * 2 * 16
    for kind, count in parameters.items():
        assert f"{count['student']:,}" in shown and kind in shown
    layer = 8 * 32**2 + 4 * 32 * 64 + 4 * 32 * 32
    head = 0.15 * (2 * 32 * 32 + 2 * 32 * 400)
    per_token = 2 * (4 * layer + head) + 4 * 4 * 32 * 32
    assert record["flops"] == pytest.approx(per_token * ROWS * 32, rel=1e-9)
    assert f"{record['flops']:.2e} FLOP" in shown
    assert f"{record['mlm_loss']['student']:.4f}" in shown


def test_all_neurons_and_layers_keep_the_teachers_loss(run: Run) -> None:
    folder = run(layers=4, hidden=32, ffn=64)
    loss = record_of(folder)["mlm_loss"]
    assert loss["student"] == pytest.approx(loss["teacher"], rel=1e-6)


def test_importance_uses_the_rows_that_there_are(run: Run) -> None:
    assert ROWS < record_of(run(rows=10_000))["importance_rows"] < 400


def test_random_extraction_needs_neither_data_nor_a_head(
    run: Run, materials: Materials, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"method": "etd-rand", "teacher": materials.headless}
    folder = run(data=None, **given)
    assert "not measured without --data" in capsys.readouterr().out
    assert has_untrained_head(AutoModel.from_pretrained(folder).config)
    assert not load_encoder(str(folder), "--student").trained_head
    assert record_of(folder)["flops"] == 0
    with_data = run("with-data", **given)
    assert "the teacher has no trained MLM head" in record_of(with_data)["mlm_loss"]


def test_the_same_command_gives_the_same_student_and_each_setting_another(run: Run) -> None:
    one, again = weights(run("one")), weights(run("again"))
    assert all(torch.equal(one[name], again[name]) for name in one)
    changes: list[dict[str, Any]] = [
        {"method": "etd-rand"},
        {"method": "etd-rand", "seed": 1},
        {"depth": "first"},
        {"depth": "4,1"},
        *({"ablation": f"rev-{kind}"} for kind in ("ffn", "head", "hidden", "all")),
        {"ablation": "no-hidden-consistency"},
    ]
    states = [one, *(weights(run(f"other-{n}", **c)) for n, c in enumerate(changes))]
    for n, state in enumerate(states):
        for earlier in states[:n]:
            assert any(not torch.equal(state[name], earlier[name]) for name in state), changes[
                n - 1
            ]


def test_the_same_command_again_is_finished_already(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    run(micro_batch=16)
    assert capsys.readouterr().out.startswith("finished already")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("family", FAMILIES)
def test_each_parameter_is_of_one_kind(family: str) -> None:
    """By hand: 3 layers of width 24, ffn 40, vocabulary 61, 40 positions."""
    model: Any = tiny_encoder(family, 1).model
    counts = parameters_by_kind(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["attention"] == 3 * 4 * (24 * 24 + 24)
    assert counts["ffn"] == 3 * (2 * 24 * 40 + 24 + 40)
    embedding = 16 if family == "electra" else 24
    assert counts["norms"] == 2 * embedding + 3 * 2 * 2 * 24
    types = model.config.type_vocab_size
    project = 16 * 24 + 24 if family == "electra" else 0
    assert counts["embeddings"] == (61 + 40 + types) * embedding + project
    assert counts["head"] == 24 * embedding + 3 * embedding + 61


@pytest.mark.parametrize(
    ("indices", "text"),
    [((), ""), ((4,), "4"), ((0, 1, 2, 5), "0-2,5"), ((1, 3, 4), "1,3-4"), ((7, 9), "7,9")],
)
def test_ranges(indices: tuple[int, ...], text: str) -> None:
    assert ranges(indices) == text
