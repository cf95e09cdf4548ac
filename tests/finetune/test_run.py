"""The whole program on small models: what it learns, what it writes, what it leaves alone."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from finetune.classifier import load_classifier, save_classifier
from finetune.results import claim, write_result, writing
from finetune.training import has_bf16
from potstill.errors import InputError, TrainingError
from tests.finetune.conftest import QUICK, mnli_rows, write_parquet

NAMES = ["entailment", "neutral", "contradiction"]
FineTune = Callable[..., dict[str, Any]]


def mnli(folder: Path, names: list[str], rows: int = 48) -> Path:
    """A folder of MNLI's shape whose labels are numbered in the order of `names`."""
    for split in ("train", "validation_matched"):
        write_parquet(folder / f"mnli/{split}.parquet", mnli_rows(rows, names), names)
    return folder


def csv(path: Path, rows: list[tuple[str, Any]]) -> Path:
    """A user's file of one sentence and a label."""
    path.write_text("sentence,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def test_a_model_keeps_its_order_of_labels_on_data_in_another_order(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    theirs = ["contradiction", "entailment", "neutral"]
    first = fine_tune(
        "--model",
        bert,
        "--task",
        "mnli",
        "--data",
        mnli(tmp_path / "a", theirs),
        "--epochs",
        "12",
        *QUICK,
        output=tmp_path / "first",
    )
    assert first["last"]["scores"]["validation_matched"]["accuracy"] > 0.95
    model = tmp_path / "first/model"

    ours = mnli(tmp_path / "b", NAMES, rows=30)
    again = fine_tune(
        "--model",
        model,
        "--task",
        "mnli",
        "--data",
        ours,
        "--epochs",
        "0",
        *QUICK,
        output=tmp_path / "again",
    )
    assert again["label_names"] == theirs
    assert again["last"]["scores"]["validation_matched"]["accuracy"] > 0.95
    assert again["fresh_parameters"] == []

    # without the names the orders cannot be matched: every answer is then another's number
    config = json.loads((model / "config.json").read_text())
    config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}
    config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
    (model / "config.json").write_text(json.dumps(config))
    wrong = fine_tune(
        "--model",
        model,
        "--task",
        "mnli",
        "--data",
        ours,
        "--epochs",
        "0",
        *QUICK,
        output=tmp_path / "wrong",
    )
    assert wrong["last"]["scores"]["validation_matched"]["accuracy"] < 0.05


def test_a_missing_mismatched_split_is_said(
    fine_tune: FineTune, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = fine_tune(
        "--model",
        bert,
        "--task",
        "mnli",
        "--data",
        mnli(tmp_path / "a", NAMES, 6),
        "--epochs",
        "1",
        *QUICK,
    )
    assert "validation_mismatched.parquet is missing" in capsys.readouterr().out
    assert list(result["last"]["scores"]) == ["validation_matched"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_each_shape_of_model_learns_a_pair_task(
    fine_tune: FineTune, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    model = request.getfixturevalue(kind)
    result = fine_tune(
        "--model",
        model,
        "--task",
        "mnli",
        "--data",
        mnli(tmp_path / "a", NAMES),
        "--epochs",
        "12",
        *QUICK,
    )
    assert result["majority"]["validation_matched"]["accuracy"] == pytest.approx(1 / 3)
    assert result["best"]["scores"]["validation_matched"]["accuracy"] > 0.9
    assert any("classifier" in name for name in result["fresh_parameters"])
    assert not any("encoder" in name for name in result["fresh_parameters"])


@pytest.mark.parametrize(
    "names", [["not_equivalent", "equivalent"], ["Equivalent", "Not_equivalent"]]
)
def test_f1_stays_that_of_the_named_class_when_the_model_reorders(
    fine_tune: FineTune, bert: Path, tmp_path: Path, names: list[str]
) -> None:
    same = next(index for index, name in enumerate(names) if name.casefold() == "equivalent")
    columns = {"sentence1": ["a"] * 4, "sentence2": ["b"] * 4, "label": [same] + [1 - same] * 3}
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"mrpc/{split}.parquet", columns, names)
    theirs = [name.casefold() for name in reversed(names)]
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(bert, id2label=dict(enumerate(theirs)))
    with torch.no_grad():  # a head that always says "equivalent"
        model.classifier.weight.zero_()
        model.classifier.bias.fill_(-1)[theirs.index("equivalent")] = 1
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((bert / name).read_bytes())
    result = fine_tune(
        "--model", tmp_path / "model", "--task", "mrpc", "--data", tmp_path, "--epochs", "0", *QUICK
    )
    assert result["label_names"] == names[::-1]
    # always "equivalent": 1 true positive, 3 false ones; the majority's answer: no positive at all
    assert result["last"]["scores"]["validation"] == {"f1": 2 / (2 + 3), "accuracy": 1 / 4}
    assert result["majority"]["validation"] == {"f1": 0.0, "accuracy": 3 / 4}


def test_a_csv_with_named_labels_is_learned_and_kept(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    rows = [("yes yes", "good"), ("no no", "bad")] * 16
    train, validation = csv(tmp_path / "a.csv", rows), csv(tmp_path / "b.csv", rows[:6])
    result = fine_tune(
        "--model",
        bert,
        "--train_file",
        train,
        "--validation_file",
        validation,
        "--epochs",
        "8",
        *QUICK,
    )
    assert result["last"]["scores"]["validation"]["accuracy"] == 1.0
    assert result["rows"] == {"train": 32, "validation": 6}
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    assert kept.config.id2label == {0: "bad", 1: "good"}


def test_a_blank_before_an_integer_leaves_it_a_class(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    file = csv(tmp_path / "a.csv", [("yes", " 1"), ("no", "0 ")] * 2)
    result = fine_tune(
        "--model", bert, "--train_file", file, "--validation_file", file, "--epochs", "1", *QUICK
    )
    assert result["label_names"] == ["0", "1"]


def test_emulated_bf16_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_a_v100(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", as_on_a_v100)
    assert not has_bf16()


def test_float_labels_make_a_regression(fine_tune: FineTune, bert: Path, tmp_path: Path) -> None:
    rows = [("yes", 2.5), ("maybe", 1.5), ("no", 0.5)] * 8
    file = csv(tmp_path / "a.csv", rows)
    result = fine_tune(
        "--model", bert, "--train_file", file, "--validation_file", file, "--epochs", "20", *QUICK
    )
    assert result["label_names"] == []
    assert result["majority"]["validation"] == {"pearson": None, "spearman": None}
    assert result["last"]["scores"]["validation"]["pearson"] > 0.9
    again = fine_tune(
        "--model",
        tmp_path / "run/model",
        "--train_file",
        file,
        "--validation_file",
        file,
        "--epochs",
        "0",
        *QUICK,
        output=tmp_path / "again",
    )
    assert again["last"]["scores"] == result["last"]["scores"]


def test_jsonl_pairs_with_integer_labels_are_read(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    lines = [
        json.dumps({"sentence1": "yes", "sentence2": "no", "label": row % 2, "note": None})
        for row in range(8)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    flags = ["--train_file", tmp_path / "a.jsonl", "--validation_file", tmp_path / "a.jsonl"]
    result = fine_tune("--model", bert, *flags, "--epochs", "1", *QUICK)
    assert result["label_names"] == ["0", "1"]
    assert set(result["last"]["scores"]["validation"]) == {"accuracy", "macro_f1"}


def test_the_same_run_again_is_finished_and_another_is_refused(
    fine_tune: FineTune,
    refusal: Callable[..., str],
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = csv(tmp_path / "a.csv", [("yes", 1), ("no", 0)] * 4)
    flags = [
        "--model",
        bert,
        "--train_file",
        file,
        "--validation_file",
        file,
        "--epochs",
        "1",
        "--no_save_model",
        *QUICK,
    ]
    run = tmp_path / "run"
    fine_tune(*flags)
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "config.json",
        "log.jsonl",
        "result.json",
    ]
    before = (run / "result.json").stat().st_mtime_ns

    fine_tune(*flags)
    assert "finished already" in capsys.readouterr().out
    assert (run / "result.json").stat().st_mtime_ns == before

    (run / "result.json").rename(tmp_path / "kept.json")
    assert "seed is 0 there and 1 here" in refusal(*flags, "--seed", "1", output=run)
    csv(file, [("yes", 1), ("no", 0)] * 5)
    assert "data_sha256" in refusal(*flags, output=run)


@pytest.mark.parametrize("claimed", [True, False])
def test_what_a_killed_run_left_is_cleared(tmp_path: Path, claimed: bool) -> None:
    run = tmp_path / "run"
    if claimed:
        claim(run, {"seed": 0})
    left = [".model.71.part", ".model.71.old"] if claimed else []
    for name in left:
        (run / name).mkdir(parents=True)
        (run / name / "model.safetensors").write_bytes(b"half")
    run.mkdir(exist_ok=True)
    (run / ".config.json.71.part").write_bytes(b"{")
    if claimed:
        with pytest.raises(InputError, match="another run's folder"):
            claim(run, {"seed": 1})
        assert all((run / name).exists() for name in left)  # the folder is not that run's
    claim(run, {"seed": 0})
    assert sorted(path.name for path in run.iterdir()) == [".lock", "config.json"]


def test_the_seed_alone_decides_the_scores(fine_tune: FineTune, bert: Path, tmp_path: Path) -> None:
    file = csv(tmp_path / "a.csv", [("yes or no", 1), ("maybe", 0), ("no", 1)] * 6)
    flags = [
        "--model",
        bert,
        "--train_file",
        file,
        "--validation_file",
        file,
        "--epochs",
        "2",
        *QUICK,
    ]
    losses = [
        fine_tune(*flags, "--seed", seed, output=tmp_path / name)["last"]["loss"]
        for name, seed in (("one", "3"), ("two", "3"), ("three", "4"))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_half_precision_file_is_trained_in_float32(bert: Path, tmp_path: Path) -> None:
    BertForMaskedLM.from_pretrained(bert).to(torch.bfloat16).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    assert load_file(tmp_path / "model.safetensors").popitem()[1].dtype == torch.bfloat16
    classifier = load_classifier(tmp_path, ("no", "yes"), max_length=32, seed=0)
    assert {weights.dtype for weights in classifier.model.parameters()} == {torch.float32}


def test_a_distilled_models_facts_reach_the_result_but_not_its_untrained_list(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    config = json.loads((bert / "config.json").read_text())
    student = tmp_path / "student"
    student.mkdir()
    for path in bert.iterdir():
        (student / path.name).write_bytes(path.read_bytes())
    config |= {"potstill_untrained": ["cls"]}
    (student / "potstill.json").write_text('{"objective": "att-mse", "untrained": ["cls"]}')
    (student / "config.json").write_text(json.dumps(config))
    file = csv(tmp_path / "a.csv", [("yes", 1), ("no", 0)] * 2)
    result = fine_tune(
        "--model", student, "--train_file", file, "--validation_file", file, "--epochs", "1", *QUICK
    )
    assert result["potstill"] == {"objective": "att-mse", "untrained": ["cls"]}
    kept = json.loads((tmp_path / "run/model/config.json").read_text())
    assert "potstill_untrained" not in kept


def test_fewer_rows_are_spread_over_the_file(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    # all of one class first, as in files sorted by source
    file = csv(tmp_path / "a.csv", [("yes", 1)] * 30 + [("no", 0)] * 10)
    result = fine_tune(
        "--model",
        bert,
        "--train_file",
        file,
        "--validation_file",
        file,
        "--max_train_rows",
        "8",
        "--max_validation_rows",
        "4",
        "--epochs",
        "1",
        *QUICK,
    )
    assert result["rows"] == {"train": 8, "validation": 4}
    assert result["majority"]["validation"]["accuracy"] == 0.75


def test_the_result_says_what_a_reader_needs(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    file = csv(tmp_path / "a.csv", [("a", 1), ("b", 0)] * 4)
    result = fine_tune(
        "--model", bert, "--train_file", file, "--validation_file", file, "--epochs", "2", *QUICK
    )
    assert [entry["epoch"] for entry in result["epochs"]] == [1, 2]
    assert result["last"] == result["epochs"][-1]
    assert result["best"] in result["epochs"]
    assert result["settings"]["lr"] == 5e-3
    assert result["train_tokens"] == 8 * 2 * 3  # [CLS] letter [SEP], two epochs
    assert result["cut_rows"] == {"train": 0, "validation": 0}
    assert result["environment"]["packages"]["transformers"] == transformers.__version__
    native = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    assert result["precision"] == ("bf16" if native else "fp32")
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert any("loss" in line for line in logged)


@pytest.mark.slow
def test_the_real_teacher_learns_sentiment_from_a_few_hundred_reviews(
    fine_tune: FineTune, real_teacher: Path, real_data: Path
) -> None:
    result = fine_tune(
        "--model",
        real_teacher,
        "--task",
        "sst2",
        "--data",
        real_data / "glue",
        "--max_train_rows",
        "512",
        "--max_validation_rows",
        "200",
        "--epochs",
        "2",
        "--batch_size",
        "16",
        "--lr",
        "2e-4",
        "--max_length",
        "64",
        "--no_save_model",
    )
    got = result["last"]["scores"]["validation"]["accuracy"]
    assert got > result["majority"]["validation"]["accuracy"] + 0.1


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_a_run_with_a_line_and_leaves_no_half_of_a_file(
    bert: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    classifier = load_classifier(bert, ["no", "yes"], max_length=16, seed=0)
    with pytest.raises(TrainingError, match="cannot be written.*start the same command again"):
        with room_for(1000):
            write_result(run, {"scores": "x" * 5000}, [])
    with pytest.raises(TrainingError, match="cannot be written"):
        with room_for(1000), writing(run):
            save_classifier(classifier, run / "model")
    assert [path.name for path in run.iterdir()] == ["log.jsonl"]
