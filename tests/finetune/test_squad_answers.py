"""EM and F1 on cases worked out by hand, and answers from logits written by hand."""

import numpy as np
import pytest
from datasets import Dataset

from finetune.squad.answers import (
    Answer,
    answer_questions,
    best_spans,
    exact_match,
    normalised,
    predictions_of,
    squad_scores,
    word_f1,
)
from finetune.squad.windows import OUTSIDE, Question

CONTEXT = "alpha beta gamma delta"
WORDS = [(0, 5), (6, 10), (11, 16), (17, 22)]
LOW = -9.0


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("The Cat", "cat"),
        ("an apple, a day", "apple day"),
        ("theatre and another", "theatre and another"),  # articles only as whole words
        ("A.B.C. (1990)", "abc 1990"),
        ("a-b", "ab"),  # punctuation goes before articles, so this "a" is none
        ("  two\u00a0 \n blanks\t", "two blanks"),
        ("24–10 “so”", "24–10 “so”"),  # only ASCII's punctuation
        ("ÉTÉ", "été"),
        ("The, a. AN!", ""),
    ],
)
def test_normalising_is_that_of_the_official_script(text: str, left: str) -> None:
    assert normalised(text) == left


@pytest.mark.parametrize(
    ("predicted", "answer", "em", "f1"),
    [
        ("the Denver Broncos!", "Denver Broncos", 1, 1),
        ("Denver", "Denver Broncos", 0, 2 * 1 / (1 + 2)),
        ("Broncos Denver", "Denver Broncos", 0, 1),  # F1 has no order
        ("Denver Denver", "Denver Broncos", 0, 2 * 1 / (2 + 2)),  # a word counts as often as common
        ("Seattle", "Denver Broncos", 0, 0),
        ("", "Denver Broncos", 0, 0),
        ("the", "an", 1, 0),  # nothing is left of both: equal, but without a common word
        ("İstanbul", "istanbul", 0, 0),  # lower case of İ is two characters
        ("naïve", "naive", 0, 0),
        ("$5.3 million", "5.3 million", 1, 1),
        ("5,3 million", "53 million", 1, 1),
    ],
)
def test_exact_match_and_f1_of_known_pitfalls(
    predicted: str, answer: str, em: float, f1: float
) -> None:
    assert exact_match(predicted, answer) == em
    assert word_f1(predicted, answer) == pytest.approx(f1)


def test_a_question_counts_the_answer_that_fits_best_and_scores_are_means() -> None:
    questions = [
        Question("1", "q", "c", ("Levi's Stadium", "in Santa Clara", "Santa Clara"), (0, 0, 0)),
        Question("2", "q", "c", ("red", "dark red"), (0, 0)),
        Question("3", "q", "c", ("no",), (0,)),
    ]
    got = squad_scores(questions, ["santa clara", "very dark red", "yes"])
    assert got["em"] == pytest.approx((1 + 0 + 0) / 3)
    assert got["f1"] == pytest.approx((1 + 2 * 2 / (3 + 2) + 0) / 3)


def spans(*places: tuple[int, int] | None) -> np.ndarray:
    """A window: None is a token of the question, or a special one."""
    return np.array([place or (OUTSIDE, OUTSIDE) for place in places], np.int32)


def logits(size: int, **high: float) -> np.ndarray:
    """LOW everywhere but at the places named `at3=2.0`."""
    values = np.full(size, LOW, np.float32)
    for name, value in high.items():
        values[int(name.removeprefix("at"))] = value
    return values


WINDOW = spans(None, None, None, *WORDS, None)  # [CLS] question [SEP] alpha … delta [SEP]


def test_the_best_span_may_have_neither_the_best_start_nor_the_best_end() -> None:
    start = logits(8, at6=5, at4=4)
    end = logits(8, at3=5, at5=4)  # the best end lies before the best start
    (best, score), *_ = best_spans(start, end, WINDOW, longest=30, n_best=5)
    assert (best, score) == ((6, 16), 8.0)


def test_the_question_and_the_first_token_never_answer() -> None:
    start, end = logits(8, at0=9, at1=9, at5=1), logits(8, at0=9, at2=9, at7=9, at5=1)
    assert best_spans(start, end, WINDOW, 30, 1) == [((11, 16), 2.0)]


def test_a_span_that_is_too_long_is_left_out() -> None:
    start, end = logits(8, at3=5), logits(8, at6=5, at4=1)
    assert best_spans(start, end, WINDOW, 4, 1)[0][0] == (0, 22)
    assert best_spans(start, end, WINDOW, 3, 1)[0][0] == (0, 10)
    assert best_spans(start, end, WINDOW, 1, 1)[0][1] == 5 + LOW


def test_all_spans_are_found_and_none_twice() -> None:
    draw = np.random.default_rng(0)
    start, end = draw.normal(size=(2, 8)).astype(np.float32)
    got = best_spans(start, end, WINDOW, longest=3, n_best=100)
    by_hand = {
        (WORDS[i][0], WORDS[j][1]): float(start[i + 3]) + float(end[j + 3])
        for i in range(4)
        for j in range(i, min(i + 3, 4))
    }
    assert len(got) == len(by_hand) == 9
    assert dict(got) == pytest.approx(by_hand)
    assert [score for _, score in got] == sorted(by_hand.values(), reverse=True)
    assert best_spans(start, end, WINDOW, 3, 4) == got[:4]


def test_an_answer_may_be_longer_than_its_window() -> None:
    start, end = np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32)
    every = best_spans(start, end, WINDOW, 4, 20)
    assert len(every) == 4 + 3 + 2 + 1
    assert best_spans(start, end, WINDOW, 10_000, 20) == every


def test_a_window_of_no_context_has_no_spans() -> None:
    assert best_spans(logits(2), logits(2), spans(None, None), 30, 20) == []


def windows(*rows: tuple[int, np.ndarray]) -> Dataset:
    """Windows of the questions `rows`."""
    return Dataset.from_list([{"row": row, "spans": place.tolist()} for row, place in rows])


def test_answers_come_from_all_windows_of_a_question_and_shared_spans_count_once() -> None:
    first, second = spans(None, WORDS[0], WORDS[1], WORDS[2]), spans(None, WORDS[2], WORDS[3])
    other = spans(None, (0, 2))
    start = np.stack([logits(4, at3=1), logits(4, at1=2, at2=3), logits(4, at1=1)])
    end = np.stack([logits(4, at3=1), logits(4, at1=1, at2=3), logits(4, at1=1)])
    questions = [Question("a", "q", CONTEXT), Question("b", "q", "hi")]
    table = windows((0, second), (1, other), (0, first))
    got = answer_questions(table, questions, start[[1, 2, 0]], end[[1, 2, 0]], 30, n_best=3)
    assert predictions_of(questions, got) == {"a": "delta", "b": "hi"}
    assert [answer.text for answer in got[0]] == ["delta", "gamma delta", "gamma"]
    weights = np.exp([6, 5, 3])  # "gamma" of the second window, 3, not of the first, 2
    assert [answer.probability for answer in got[0]] == pytest.approx(list(weights / weights.sum()))
    assert [answer.probability for answer in got[1]] == [1.0]


def test_padding_behind_a_window_never_answers() -> None:
    window = spans(None, WORDS[0])
    start = end = np.array([[0, 1, 99, 99]], np.float32)
    (best,) = answer_questions(
        windows((0, window)), [Question("a", "q", CONTEXT)], start, end, 5, 5
    )
    assert [answer.text for answer in best] == ["alpha"]


def test_a_context_that_the_tokenizer_drops_is_answered_with_nothing() -> None:
    table = windows((0, spans(None)))
    got = answer_questions(
        table, [Question("a", "q", "\u200b")], logits(1)[None], logits(1)[None], 5, 5
    )
    assert got == [[Answer("", 1.0)]]
