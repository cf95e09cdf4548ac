"""Test files in the GLUE server's format, from tiny models that the real program fine-tuned."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune.predict import main
from finetune.submissions import SUBMISSIONS
from tests.finetune.conftest import QUICK, mnli_rows, run_program, write_parquet
from tests.finetune.test_squad import SHORT, row, write

Predict = Callable[..., Path]
SHAPED = ["--batch_size", "7", "--max_length", "32"]
INFERENCE = ["entailment", "neutral", "contradiction"]
THEIRS = ["contradiction", "entailment", "neutral"]  # a model's order need not be GLUE's


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Run the program in this process; gives the folder of the files."""

    def run(*flags: Any, output: Path = tmp_path / "submission") -> Path:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        main([*map(str, flags), "--output", str(output)])
        return output

    return run


@pytest.fixture
def refused(predict: Predict, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line of a run that ends with status 2."""

    def run(*flags: Any, **places: Path) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            predict(*flags, **places)
        assert stop.value.code == 2
        (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
        return line

    return run


def lines(file: Path) -> list[list[str]]:
    """The cells of a file."""
    text = file.read_text()
    assert text.endswith("\n") and "\r" not in text
    return [line.split("\t") for line in text.splitlines()]


def without_label(path: Path, columns: dict[str, list[Any]], **more: list[Any]) -> None:
    """Test rows: the texts alone, and what else is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {name: values for name, values in columns.items() if name != "label"}
    pq.write_table(pa.table({**texts, **more}), path)


@pytest.fixture(scope="module")
def tuned(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A tiny BERT that learned MNLI in another order of labels, and rows to be answered."""
    folder = tmp_path_factory.mktemp("tuned")
    for split in ("train", "validation_matched"):
        write_parquet(folder / f"data/mnli/{split}.parquet", mnli_rows(48, THEIRS), THEIRS)
    flags = ("--model", bert, "--task", "mnli", "--data", folder / "data", "--epochs", "12", *QUICK)
    run_program(flags, folder / "run")
    rows = mnli_rows(48, INFERENCE)
    without_label(folder / "data/mnli/test_matched.parquet", rows)
    without_label(folder / "data/mnli/test_mismatched.parquet", rows, label=[-1] * 48)
    without_label(folder / "data/ax/test.parquet", rows, idx=list(range(100, 148)))
    yield folder / "run/model", folder / "data"


def test_mnlis_files_have_the_servers_names_words_and_places(
    predict: Predict, tuned: tuple[Path, Path]
) -> None:
    model, data = tuned
    flags = ["--model", model, "--data", data, "--max_length", "32"]
    output = predict("--task", "mnli", *flags)
    predict("--task", "ax", *flags)  # into the same folder
    assert sorted(path.name for path in output.iterdir()) == ["AX.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]
    for name, first in (("MNLI-m.tsv", 0), ("MNLI-mm.tsv", 0), ("AX.tsv", 100)):
        header, *rows = lines(output / name)
        assert header == ["index", "prediction"]
        assert [int(place) for place, _ in rows] == list(range(first, first + 48))
        right = [INFERENCE[label] for label in mnli_rows(48, INFERENCE)["label"]]
        assert np.mean([said == word for (_, said), word in zip(rows, right, strict=True)]) > 0.95


def test_predictions_are_those_of_the_model_asked_row_by_row(
    predict: Predict, tuned: tuple[Path, Path]
) -> None:
    model, data = tuned
    output = predict("--task", "ax", "--model", model, "--data", data, *SHAPED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForSequenceClassification.from_pretrained(model)
    rows = pq.read_table(data / "ax/test.parquet").to_pylist()
    for (_, said), one in zip(lines(output / "AX.tsv")[1:], rows, strict=True):
        with torch.no_grad():
            pair = tokenizer(one["premise"], one["hypothesis"], return_tensors="pt")
            best = int(plain(**pair).logits.argmax())
        assert said == plain.config.id2label[best]


def headed(bert: Path, folder: Path, names: list[str], bias: list[float]) -> Path:
    """A copy of the model with a head that always answers `bias`."""
    model = AutoModelForSequenceClassification.from_pretrained(
        bert, id2label=dict(enumerate(names))
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(bias))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bert).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("task", "names", "bias", "file", "said"),
    [
        ("cola", ["acceptable", "unacceptable"], [1, 0], "CoLA.tsv", "1"),
        ("sst2", ["NEGATIVE", "POSITIVE"], [1, 0], "SST-2.tsv", "0"),
        ("mrpc", ["not_equivalent", "equivalent"], [0, 1], "MRPC.tsv", "1"),
        ("qqp", ["duplicate", "not_duplicate"], [0, 1], "QQP.tsv", "0"),
        ("qnli", ["not_entailment", "entailment"], [0, 1], "QNLI.tsv", "entailment"),
        ("rte", ["LABEL_0", "LABEL_1"], [0, 1], "RTE.tsv", "not_entailment"),
        ("wnli", ["not_entailment", "entailment"], [0, 1], "WNLI.tsv", "1"),
        ("stsb", ["score"], [3.14159], "STS-B.tsv", "3.142"),
        ("stsb", ["score"], [5.2], "STS-B.tsv", "5.000"),
        ("stsb", ["score"], [-0.3], "STS-B.tsv", "0.000"),
    ],
)
def test_each_task_has_its_file_and_its_words(
    predict: Predict,
    bert: Path,
    tmp_path: Path,
    task: str,
    names: list[str],
    bias: list[float],
    file: str,
    said: str,
) -> None:
    model = headed(bert, tmp_path / "model", names, bias)
    texts = {name: ["yes", "no no", "maybe"] for name in SUBMISSIONS[task].task.texts}
    without_label(tmp_path / f"glue/{task}/test.parquet", texts)
    output = predict("--task", task, "--model", model, "--data", tmp_path, "--max_length", "16")
    assert [path.name for path in output.iterdir()] == [file]
    expected = [["index", "prediction"], *([str(place), said] for place in range(3))]
    assert lines(output / file) == expected


def test_real_validation_rows_without_labels_are_answered(
    predict: Predict, bert: Path, real_data: Path, tmp_path: Path
) -> None:
    rows = Dataset.from_parquet(
        str(real_data / "glue/mrpc/validation.parquet"), cache_dir=str(tmp_path)
    )
    texts = rows.select(range(40)).remove_columns(["label", "idx"])
    (tmp_path / "mrpc").mkdir()
    texts.to_parquet(tmp_path / "mrpc/test.parquet")
    model = headed(bert, tmp_path / "model", ["equivalent", "not_equivalent"], [2, 1])
    flags = ["--model", model, "--data", tmp_path, "--max_length", "64"]
    output = predict("--task", "mrpc", *flags)
    assert lines(output / "MRPC.tsv")[1:] == [[str(place), "1"] for place in range(40)]


def test_squads_questions_are_answered_in_the_official_format(
    predict: Predict, refused: Callable[..., str], bert: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "data", [row(number) for number in range(6)])
    flags = ["--task", "squad", "--data", data, *SHORT]
    run_program(("--model", bert, *flags, "--epochs", "1"), tmp_path / "run")
    asked = [{name: row(n)[name] for name in ("id", "question", "context")} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(asked), data / "squad/test.parquet")
    output = predict("--model", tmp_path / "run/model", *flags)
    for name in ("predictions.json", "nbest.json"):
        got, expected = (
            json.loads((folder / name).read_text()) for folder in (output, tmp_path / "run")
        )
        if name == "predictions.json":
            assert got == expected
        assert list(got) == [f"id{n}" for n in range(6)]
    assert "no trained qa_outputs" in refused("--model", bert, *flags, output=tmp_path / "other")


def test_a_model_of_another_task_is_refused(
    refused: Callable[..., str], tuned: tuple[Path, Path], bert: Path, tmp_path: Path
) -> None:
    model, data = tuned
    without_label(tmp_path / "rte/test.parquet", {"sentence1": ["a"], "sentence2": ["b"]})
    without_label(tmp_path / "stsb/test.parquet", {"sentence1": ["a"], "sentence2": ["b"]})
    assert "no fine-tuned head" in refused("--model", bert, "--task", "mnli", "--data", data)
    line = refused("--model", model, "--task", "rte", "--data", tmp_path)
    assert "has 3 outputs (contradiction, entailment, neutral)" in line
    line = refused("--model", model, "--task", "stsb", "--data", tmp_path)
    assert "has 3 outputs, stsb is a regression" in line
    paraphrase = headed(bert, tmp_path / "mrpc", ["not_equivalent", "equivalent"], [0, 1])
    line = refused("--model", paraphrase, "--task", "rte", "--data", tmp_path)
    assert "has the outputs not_equivalent, equivalent" in line
    assert not (tmp_path / "submission").exists()


def test_what_else_cannot_be_used_is_refused(
    refused: Callable[..., str], tuned: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = tuned
    flags = ["--model", model, "--data", data, "--max_length", "32"]
    assert "--task own: no test files" in refused("--task", "own", *flags)
    assert "no folder ax/" in refused("--task", "ax", "--model", model, "--data", tmp_path / "x")
    assert "no such folder" in refused("--task", "ax", "--data", data, "--model", tmp_path / "gone")
    mine = tmp_path / "submission"
    mine.mkdir()
    (mine / "AX.tsv").write_text("mine")
    assert "AX.tsv is there already" in refused("--task", "ax", *flags)
    assert (mine / "AX.tsv").read_text() == "mine"
    rows = {"premise": ["a", "b"], "hypothesis": ["a", "b"]}
    without_label(tmp_path / "ax/test.parquet", rows, idx=[3, 3])
    line = refused("--task", "ax", "--model", model, "--data", tmp_path, output=tmp_path / "new")
    assert "idx is no number, or twice the same" in line
    without_label(tmp_path / "ax/test.parquet", {"premise": ["a"]})
    line = refused("--task", "ax", "--model", model, "--data", tmp_path, output=tmp_path / "new")
    assert "no column 'hypothesis'" in line
