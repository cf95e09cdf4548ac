"""What a model costs: counted by hand, timed, exported, and kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, BertConfig, BertForMaskedLM, DistilBertConfig

import finetune.reporting.costs
import finetune.reporting.latency
from finetune.classifier import load_classifier
from finetune.reporting.costs import STORE, costs, positions, row_flops, static_costs
from finetune.reporting.latency import LENGTH, case_names, exported, inputs, latencies
from potstill.errors import InputError, TrainingError
from tests.finetune.conftest import SHAPE, byte_level, wordpiece


@pytest.fixture(scope="module")
def long_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT that takes 128 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("long"), wordpiece()
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **SHAPE)
    BertForMaskedLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa that takes 128 tokens."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    folder, tokenizer = tmp_path_factory.mktemp("long-roberta"), byte_level()
    torch.manual_seed(0)
    shape = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=LENGTH + 2, type_vocab_size=1, **SHAPE
    )
    RobertaForMaskedLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time everything twice only."""
    monkeypatch.setattr(finetune.reporting.latency, "REPEATS", 2)


def test_parameters_bytes_and_flops_are_those_counted_by_hand(long_bert: Path) -> None:
    found, vocab = static_costs(long_bert), len(wordpiece())
    embeddings = (vocab + LENGTH + 2) * 32 + 2 * 32
    layer = 4 * (32 * 32 + 32) + (32 * 64 + 64) + (64 * 32 + 32) + 4 * 32
    head = (32 * 32 + 32) + (32 * 2 + 2)  # pooler and two classes
    assert found["parameters"] == embeddings + 2 * layer + head
    assert found["parameters_without_embeddings"] == 2 * layer + head
    assert found["size_bytes"] == (long_bert / "model.safetensors").stat().st_size
    projections, products, ffn = 4 * 32 * 32, 2 * LENGTH * 32, 2 * 32 * 64
    assert found["flops_per_row"] == LENGTH * 2 * 2 * (projections + products + ffn)


def test_flops_equal_those_that_torch_counts(long_bert: Path) -> None:
    model = AutoModel.from_pretrained(
        long_bert, attn_implementation="eager", add_pooling_layer=False
    )
    with FlopCounterMode(display=False) as counter:
        model(**inputs(model, 1))
    assert counter.get_total_flops() == static_costs(long_bert)["flops_per_row"]


def test_an_architecture_that_is_not_ours_has_no_flops() -> None:
    assert row_flops(DistilBertConfig()) is None


@pytest.mark.parametrize("name", ["long_bert", "long_roberta"])
def test_an_exported_model_answers_as_in_torch_for_any_batch_and_padding(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra `report`")
    folder = request.getfixturevalue(name)
    model = load_classifier(folder, ("0", "1"), LENGTH, seed=0).model.eval()
    answer = exported(model, tmp_path, threads=1)
    rows = inputs(model, 5, lengths=(LENGTH, 1, 50, 99, 127))
    with torch.inference_mode():
        expected = model(**rows).logits
    assert torch.allclose(torch.from_numpy(answer(rows)), expected, atol=1e-4)
    rows["input_ids"] = rows["input_ids"].flip(0)
    assert not torch.allclose(torch.from_numpy(answer(rows)), expected, atol=1e-4)


def test_an_export_that_answers_otherwise_is_refused(
    long_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra `report`")
    export = finetune.reporting.latency._export

    def wrong(model: Any, path: Path) -> None:
        with torch.no_grad():
            model.classifier.bias += 1
            export(model, path)
            model.classifier.bias -= 1

    monkeypatch.setattr(finetune.reporting.latency, "_export", wrong)
    model = load_classifier(long_bert, ("0", "1"), LENGTH, seed=0).model.eval()
    with pytest.raises(TrainingError, match="logits differ from torch's by 1"):
        exported(model, tmp_path, threads=1)


def test_every_case_is_timed_and_a_second_report_takes_what_is_kept(
    long_bert: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra `report`")
    first = costs({"a": long_bert}, tmp_path, threads=1, with_latency=True)["a"]["latency_ms"]
    assert list(first) == case_names()
    assert all(value > 0 for value in first.values())

    def never(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(finetune.reporting.costs, "latencies", never)
    renamed = costs({"b": long_bert}, tmp_path, threads=1, with_latency=True)["b"]["latency_ms"]
    assert renamed == first
    with pytest.raises(AssertionError, match="measured again"):
        costs(
            {"a": long_bert}, tmp_path, threads=2, with_latency=True
        )  # another machine, so to say


def test_a_model_that_was_not_timed_yet_is_timed_in_turn_with_all_others(
    long_bert: Path, long_roberta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def note(models: dict[str, Path], threads: int) -> dict[str, dict[str, float]]:
        timed.append(set(models.values()))
        return {key: {} for key in models}

    monkeypatch.setattr(finetune.reporting.costs, "latencies", note)
    costs({"a": long_bert}, tmp_path, threads=1, with_latency=True)
    costs({"a": long_bert, "b": long_roberta}, tmp_path, threads=1, with_latency=True)
    assert timed == [{long_bert}, {long_bert, long_roberta}]


def test_without_onnxruntime_its_cases_are_left_empty(
    long_bert: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (finetune.reporting.latency, finetune.reporting.costs):
        monkeypatch.setattr(module, "has_onnx", lambda: False)
    found = costs({"a": long_bert}, tmp_path, threads=1, with_latency=True)["a"]["latency_ms"]
    assert {case for case, value in found.items() if value is None} == {
        case for case in case_names() if case.startswith("onnxruntime")
    }


def test_a_model_with_fewer_positions_is_not_timed(bert: Path, tmp_path: Path) -> None:
    assert positions(bert) == 64
    found = costs({"a": bert}, tmp_path, threads=1, with_latency=True)["a"]
    assert set(found["latency_ms"].values()) == {None}
    assert found["flops_per_row"] > 0


def test_threads_are_as_before_when_the_timing_is_over(
    long_bert: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune.reporting.latency, "has_onnx", lambda: False)
    before = torch.get_num_threads()
    latencies({"a": long_bert}, threads=before + 1)
    assert torch.get_num_threads() == before


def test_damaged_costs_and_models_are_refused_by_name(long_bert: Path, tmp_path: Path) -> None:
    (tmp_path / STORE).write_text('{"machine": {}}')
    with pytest.raises(InputError, match=f"{STORE}: cannot be read"):
        costs({"a": long_bert}, tmp_path, threads=1, with_latency=True)
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((long_bert / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))
    (broken / "model.safetensors").write_bytes((long_bert / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=f"--models {broken}"):
        static_costs(broken)


@pytest.mark.gpu
def test_a_gpu_is_timed_in_both_precisions(long_bert: Path, quick: None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    found = latencies({"a": long_bert}, threads=1)["a"]
    assert {"torch fp32 on GPU, batch 32", "torch bf16 on GPU, batch 1"} <= set(found)
