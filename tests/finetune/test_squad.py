"""SQuAD through the whole program: what it learns, writes and refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertConfig, BertForMaskedLM

from data_prep.tokenization import load_tokenizer, train_tokenizer
from finetune.settings import DataSettings
from finetune.squad.answers import exact_match, word_f1
from finetune.squad.task import load_squad, read_questions
from finetune.squad.windows import WindowSettings, check_room
from finetune.tasks import load
from potstill.errors import InputError
from tests.finetune.conftest import SHAPE

FineTune = Callable[..., dict[str, Any]]
Refusal = Callable[..., str]
SHORT = ["--max_length", "64", "--doc_stride", "8"]  # what the tiny models have positions for


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A question whose answer is a word of its context."""
    word = ("module", "list", "object")[number % 3]
    context = f"a {word} is what line {number} says"
    answers = {"text": [word, "yes"], "answer_start": [2, context.index(" is")]}
    answers["text"][1] = context[answers["answer_start"][1] :][:3]
    named = {"id": f"id{number}", "title": "", "context": context, "question": "what is it?"}
    return named | {"answers": answers} | changes


def write(folder: Path, rows: list[dict[str, Any]], **splits: list[dict[str, Any]]) -> Path:
    """DATA/squad with these rows for training, and the same or others for validation."""
    (folder / "squad").mkdir(parents=True, exist_ok=True)
    for split, table in {"train": rows, "validation": rows, **splits}.items():
        pq.write_table(pa.Table.from_pylist(table), folder / f"squad/{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> tuple[Path, Path]:
    """Some real rows, and a tiny BERT with their words and room for their questions."""
    folder = tmp_path_factory.mktemp("reader")
    rows = pq.read_table(real_data / "squad/train.parquet").slice(0, 400).to_pylist()[::50]
    texts = [text for one in rows for text in (one["context"], one["question"])]
    tokenizer = train_tokenizer(lambda: iter(texts), 1200, folder / "model")
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SHAPE)
    BertForMaskedLM(shape).save_pretrained(folder / "model")
    return folder / "model", write(folder / "data", rows)


def test_a_tiny_model_learns_a_few_real_questions(
    fine_tune: FineTune, reader: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = reader
    flags = ["--task", "squad", "--data", data, "--max_length", "128", "--doc_stride", "32"]
    learning = ["--epochs", "40", "--lr", "3e-3", "--batch_size", "8"]
    result = fine_tune("--model", model, *flags, *learning, "--tokenised", tmp_path / "kept")
    scores = result["last"]["scores"]["validation"]
    assert list(scores) == ["f1", "em"]
    assert scores["f1"] > 0.8 > 0.4 > result["epochs"][0]["scores"]["validation"]["f1"]
    assert result["main"] == {"split": "validation", "metric": "f1"}
    assert result["majority"] == {"validation": {"f1": None, "em": None}}
    assert result["rows"] == {"train": 8, "validation": 8}
    assert result["fresh_parameters"] == ["qa_outputs.bias", "qa_outputs.weight"]

    run = tmp_path / "run"
    predicted = json.loads((run / "predictions.json").read_text())
    nbest = json.loads((run / "nbest.json").read_text())
    questions = load_squad(DataSettings(task="squad", data=str(data))).splits["validation"]
    assert list(predicted) == [question.id for question in questions]
    for metric, name in ((word_f1, "f1"), (exact_match, "em")):
        each = [max(metric(predicted[q.id], text) for text in q.answers) for q in questions]
        assert scores[name] == pytest.approx(sum(each) / len(each))
    for question in questions:
        best = nbest[question.id]
        assert best[0]["text"] == predicted[question.id] and 1 < len(best) <= 20
        assert all(answer["text"] in question.context for answer in best)
        assert sum(answer["probability"] for answer in best) == pytest.approx(1, abs=1e-4)

    again = fine_tune("--model", run / "model", *flags, "--epochs", "0", output=tmp_path / "again")
    assert again["last"]["scores"] == result["last"]["scores"]
    assert again["fresh_parameters"] == []
    kept = AutoModelForQuestionAnswering.from_pretrained(run / "model")
    assert kept.config.num_labels == 2


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_each_shape_of_model_answers_questions(
    fine_tune: FineTune, request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    data = write(tmp_path / "data", [row(number) for number in range(12)])
    parts = ["--batch_size", "4", "--accumulation", "2", "--max_train_rows", "9"]
    result = fine_tune(
        *("--model", request.getfixturevalue(kind), "--task", "squad", "--data", data),
        *("--max_validation_rows", "5", "--epochs", "1", "--no_save_model", *SHORT, *parts),
    )
    assert result["rows"] == {"train": 9, "validation": 5}
    assert 0 <= result["last"]["scores"]["validation"]["f1"] <= 1
    assert (tmp_path / "run/predictions.json").exists()
    assert not (tmp_path / "run/nbest.json").exists()  # large, so kept only beside the model


def test_a_model_of_three_classes_gets_the_two_outputs_of_spans(
    fine_tune: FineTune, bert: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in bert.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    config["id2label"] = {str(index): f"class{index}" for index in range(3)}
    (model / "config.json").write_text(json.dumps(config))
    data = write(tmp_path / "data", [row(0)])
    result = fine_tune("--model", model, "--task", "squad", "--data", data, "--epochs", "1", *SHORT)
    assert result["rows"] == {"train": 1, "validation": 1}


def test_windows_and_answers_are_384_128_and_30_tokens_unless_told() -> None:
    spans, labels = DataSettings(task="squad"), DataSettings(task="rte")
    assert (spans.max_length, spans.doc_stride, spans.max_answer_length) == (384, 128, 30)
    assert (labels.max_length, labels.doc_stride, labels.max_answer_length) == (128, None, None)
    with pytest.raises(InputError, match="--doc_stride is for --task squad"):
        DataSettings(task="rte", doc_stride=8)
    with pytest.raises(InputError, match="--n_best 0: give a number from 1"):
        DataSettings(task="squad", n_best=0)


def answers(*texts: Any, starts: list[Any]) -> dict[str, Any]:
    """The column `answers` of one row."""
    return {"answers": {"text": list(texts), "answer_start": starts}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (answers(starts=[]), "row 1 has no answer"),
        (answers("list", starts=[3]), "row 1: its context has 'ist ' at 3 where the answer 'list'"),
        (answers("list", starts=[900]), "has '' at 900 where"),
        (answers("list", starts=[-2]), "row 1 has the answer 'list' at -2"),
        (answers("list", starts=[2, 3]), "give as many texts as answer_starts"),
        (answers("  ", starts=[1]), "row 1 has the answer '  ' at 1"),
        (answers(None, starts=[1]), "row 1 has the answer 'None' at 1"),
        ({"answers": None}, "row 1 has answers None"),
        ({"question": " "}, "row 1 has an empty question"),
        ({"context": None}, "row 1 has ('id1', 'what is it?', None) where a text belongs"),
        ({"id": "id0"}, "row 1 has the id 'id0' of an earlier row"),
        ({"question": "yes " * 40}, "doc_stride"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    refusal: Refusal, bert: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    data = write(tmp_path / "data", [row(0)], validation=[row(0), row(1, **changes)])
    line = refusal("--model", bert, "--task", "squad", "--data", data, *SHORT)
    assert said in line and "validation" in line
    assert not (tmp_path / "refused").exists()


def test_a_missing_column_file_or_folder_is_named(
    refusal: Refusal, bert: Path, tmp_path: Path
) -> None:
    flags = ["--model", bert, "--task", "squad", *SHORT]
    assert "no folder squad/" in refusal(*flags, "--data", tmp_path)
    bare = [{"id": "a", "question": "b", "context": "c"}]
    data = write(tmp_path, bare)
    assert "no column 'answers'" in refusal(*flags, "--data", data)
    (tmp_path / "squad/validation.parquet").write_bytes(b"PAR1")
    assert "validation.parquet: not a whole Parquet file" in refusal(*flags, "--data", data)
    (tmp_path / "squad/validation.parquet").unlink()
    assert "validation.parquet: no such file" in refusal(*flags, "--data", data)
    write(tmp_path, [row(0)])
    line = refusal("--model", bert, "--task", "squad", "--data", data)
    assert "--max_length 384: the model has 64 positions" in line


def test_rows_to_be_answered_need_no_answers() -> None:
    asked = {"id": "a", "question": "b"}
    with pytest.raises(
        InputError, match="'context'; the task has the columns id, question, context$"
    ):
        read_questions([asked], "here", answered=False)
    (question,) = read_questions([asked | {"context": "c"}], "here", answered=False)
    assert question.answers == ()


def test_a_question_behind_thousands_of_blanks_leaves_room_for_its_context(roberta: Path) -> None:
    (question,) = read_questions([row(0, question=" " * 25_000 + "what is it?\n")], "here")
    assert question.question == "what is it?"
    assert question.span() == (2, 8)  # a context keeps its blanks: answers are places in it
    check_room(load_tokenizer(roberta), [question], WindowSettings(64, 8), "here")


def test_glue_and_squad_may_share_a_folder(real_data: Path) -> None:
    assert len(load(DataSettings(task="rte", data=str(real_data))).splits["validation"]) == 277
    assert len(load(DataSettings(task="wnli", data=str(real_data / "glue"))).splits["train"]) == 635
