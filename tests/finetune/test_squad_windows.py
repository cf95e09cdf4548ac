"""Windows of long contexts, and where in them an answer lies."""

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, BertConfig

from data_prep.tokenization import load_tokenizer
from finetune.settings import DataSettings
from finetune.squad.answers import squad_scores
from finetune.squad.task import load_squad, span_head
from finetune.squad.windows import (
    OUTSIDE,
    Question,
    WindowSettings,
    answer_position,
    check_room,
    cut_into_windows,
)
from potstill.errors import InputError

CONTEXT = (
    "The list object has a method. " * 6 + "It is called sort, and it works in place. " + "End " * 9
)
START = CONTEXT.index("sort")
SETTINGS = WindowSettings(max_length=40, doc_stride=8)


class Configured:
    """As much of a model as cutting looks at."""

    def __init__(self, folder: Path | None) -> None:
        self.config = AutoConfig.from_pretrained(folder) if folder else BertConfig()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_windows_share_the_stride_and_cover_the_whole_context(
    request: pytest.FixtureRequest, kind: str
) -> None:
    folder = request.getfixturevalue(kind)
    tokenizer = load_tokenizer(folder)
    questions = [Question("a", "what sorts?", CONTEXT, ("sort",), (START,))]
    table = cut_into_windows(tokenizer, Configured(folder), questions, SETTINGS)
    whole = tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    question = tokenizer("what sorts?", add_special_tokens=False)["input_ids"]
    ids, held = {}, 0
    for window in table:
        context = [i for i, (first, _) in enumerate(window["spans"]) if first != OUTSIDE]
        assert len(window["input_ids"]) <= 40
        assert window["input_ids"][1 : len(question) + 1] == question
        ids[window["spans"][context[0]][0]] = [window["input_ids"][i] for i in context]
        first, last = window["start_positions"], window["end_positions"]
        if first:
            held += 1
            said = CONTEXT[window["spans"][first][0] : window["spans"][last][1]]
            assert said.strip() == "sort"
        else:
            assert last == 0
    assert held >= 1
    assert ("token_type_ids" in table.column_names) == (kind == "bert")
    parts = [ids[place] for place in sorted(ids)]
    joined = parts[0]
    for part in parts[1:]:
        assert joined[-8:] == part[:8]
        joined = joined + part[8:]
    assert joined == whole
    lengths = [len(row) for row in table["input_ids"]]
    assert lengths == sorted(lengths, reverse=True)


SPANS = np.array([(-1, -1), (-1, -1), (10, 14), (15, 18), (18, 20), (21, 25), (-1, -1)], np.int32)


@pytest.mark.parametrize(
    ("start", "end", "position"),
    [
        (15, 20, (3, 4)),
        (15, 18, (3, 3)),
        (16, 19, (3, 4)),  # begins and ends within tokens: those are taken whole
        (10, 25, (2, 5)),
        (9, 14, (0, 0)),  # begins before the window
        (21, 26, (0, 0)),  # ends behind it
        (30, 35, (0, 0)),
        (14, 15, (0, 0)),  # nothing but a blank
    ],
)
def test_an_answer_is_found_by_its_characters(
    start: int, end: int, position: tuple[int, int]
) -> None:
    assert answer_position(SPANS, start, end) == position


def test_blanks_around_an_answer_do_not_move_it() -> None:
    assert Question("a", "q", "say  yes now", (" yes ",), (4,)).span() == (5, 8)


def test_a_question_without_room_for_its_context_is_named(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    size = len(tokenizer("yes no " * 10, add_special_tokens=False)["input_ids"])
    long = Question("b", "yes no " * 10, "maybe")
    questions = [Question("a", "yes", "maybe"), long]
    check_room(tokenizer, questions, WindowSettings(size + 3 + 8 + 1, 8), "here")
    with pytest.raises(InputError, match=f"question 1 .here. has {size} .* needs {size + 12};"):
        check_room(tokenizer, questions, WindowSettings(size + 3 + 8, 8), "here")


def test_perfect_logits_reach_nearly_all_of_the_real_scores(real_data: Path) -> None:
    settings = DataSettings(
        task="squad", data=str(real_data), max_train_rows=1, max_validation_rows=400
    )
    head, folder = span_head(settings), real_data / "vocab/bert-base-uncased"
    questions = head.data.splits["validation"]
    table = cut_into_windows(load_tokenizer(folder), Configured(None), questions, head.windows)
    places = (len(table), max(map(len, table["input_ids"])))
    start, end = np.full(places, -9.0, np.float32), np.full(places, -9.0, np.float32)
    for logits, positions in ((start, "start_positions"), (end, "end_positions")):
        logits[np.arange(len(table)), table[positions]] = 9
    got = head.answer(table, questions, start, end)
    scores = squad_scores(questions, [best[0].text for best in got])
    assert scores["f1"] > 0.99 and scores["em"] > 0.98  # not 1: answers within a token


def test_the_real_rows_answers_are_where_their_windows_say(real_data: Path, bert: Path) -> None:
    settings = DataSettings(
        task="squad", data=str(real_data), max_train_rows=60, max_validation_rows=20
    )
    data = load_squad(settings)
    tokenizer, questions = load_tokenizer(bert), data.splits["train"]
    assert len(questions) == 60
    table = cut_into_windows(tokenizer, Configured(bert), questions, WindowSettings(384, 128))
    found = set()
    for window in table:
        question, first = questions[window["row"]], window["start_positions"]
        if first:
            start, end = window["spans"][first][0], window["spans"][window["end_positions"]][1]
            assert question.answers[0].strip() in question.context[start:end]
            found.add(window["row"])
    assert found == set(range(60))  # 30 tokens and the stride: some window holds each
