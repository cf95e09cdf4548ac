"""What `--keep` means, which tokens and neurons it chooses, and how they come back from bytes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from potstill.errors import InputError
from pretrain.features import Feature
from pretrain.knowledge.choices import Neurons
from pretrain.knowledge.cuts import Cut, kept_counts, mapped_layers, parse_cut
from pretrain.knowledge.hidden import CutScores, Whole
from tests import reference
from tests.pretrain.cut_cases import (
    HEADS,
    LENGTHS,
    OTHER,
    SEP,
    cut_hidden,
    cut_scores,
    features,
    fresh_seed,
    numbered_batch,
    places,
    rows_of,
    there_and_back,
    tokens_of,
)

ATTENTION = ("attention", "attention_no_sep")
CHOICES = ("left_first", *ATTENTION)
NEURONS = ("uniform_mask", "rand_mask", "importance")


@pytest.mark.parametrize(
    ("keep", "cut"),
    [
        (None, Cut()),
        ("1l_10t_0.1h", Cut(1, 10, 0.1)),
        ("2l", Cut(layers=2)),
        ("50t", Cut(tokens=50)),
        (".5h", Cut(width=0.5)),
        ("3l_1h", Cut(layers=3, width=1.0)),
    ],
)
def test_keep_says_how_much_in_any_of_three_parts(keep: str | None, cut: Cut) -> None:
    assert parse_cut(keep) == cut
    assert cut.whole == (cut.tokens is None and cut.width is None)


def test_choices_say_which_layers_tokens_and_neurons() -> None:
    cut = parse_cut("1l_10t_0.1h", "t_top8", "attention_no_sep", "importance")
    assert cut == Cut(1, 10, 0.1, 8, "attention_no_sep", "importance")


@pytest.mark.parametrize(
    "keep",
    ["", "10", "t", "1.5l", "10t_1l", "1l_2l", "1l_", "0.1.1h", "-1t", "1e3t", "nanh", "1l-1t"],
)
def test_a_malformed_keep_is_refused(keep: str) -> None:
    with pytest.raises(InputError, match=r"--keep .* is not layers, tokens and a share"):
        parse_cut(keep)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ("0l", "0l must be at least 1"),
        ("2l_0t", "0t must be at least 1"),
        ("0h", "0h must be above 0, up to 1"),
        ("1t_1.01h", "1.01h must be above 0, up to 1"),
    ],
)
def test_a_number_out_of_range_is_refused(keep: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_cut(keep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "t_top8"), "--keep_depth t_top8 .*--keep is missing"),
        (("1l", None, "attention"), "--keep_length attention .*--keep 1l has no part in t"),
        (("1l_2t", None, None, "rand_mask"), "--keep_width rand_mask .*no part in h"),
        (("1l", "top8"), "--keep_depth 'top8' is not t_top"),
        (("1l", "t_top0"), "--keep_depth 't_top0' is not t_top"),
        (("1t", None, "right"), "--keep_length 'right' is none of left_first"),
        (("1h", None, None, "none"), "--keep_width 'none' is none of uniform_mask"),
    ],
)
def test_a_choice_of_nothing_or_unknown_is_refused(
    arguments: tuple[str | None, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_cut(*arguments)


@pytest.mark.parametrize(
    ("keep", "depth", "layers"),
    [
        ("1l", None, "last"),
        ("1l", "t_top12", "last"),
        ("1l", "t_top8", "6:8"),
        ("2l", None, "5:10,6:12"),
        ("6l", "t_top8", "1:1,2:2,3:4,4:5,5:6,6:8"),
        ("10t", None, None),
    ],
)
def test_depth_keeps_the_top_of_a_uniform_mapping_that_ends_at_its_layer(
    keep: str, depth: str | None, layers: str | None
) -> None:
    assert mapped_layers(parse_cut(keep, depth), 6, 12) == layers


def test_the_last_pair_is_for_students_of_any_depth_and_others_are_not() -> None:
    assert mapped_layers(Cut(layers=1), None, 12) == "last"
    with pytest.raises(InputError, match="--keep 2l .*--student_layers"):
        mapped_layers(Cut(layers=2), None, 12)
    with pytest.raises(InputError, match="--keep 1l up to teacher layer 8 .*--student_layers"):
        mapped_layers(Cut(layers=1, depth=8), None, 12)


def test_a_depth_that_a_model_has_not_is_refused() -> None:
    with pytest.raises(InputError, match="--keep 4l: a student of 3 layers"):
        mapped_layers(Cut(layers=4), 3, 12)
    with pytest.raises(InputError, match="--keep_depth t_top12: the teacher has only 6 layers"):
        mapped_layers(Cut(layers=1, depth=12), 3, 6)


@pytest.mark.parametrize(
    ("cut", "tokens", "pairs"),
    [
        (Cut(tokens=4), 4 + 3 + 1 + 4 + 2, 4 * 7 + 3 * 3 + 1 + 4 * 6 + 2 * 2),
        (Cut(tokens=4, length="attention_no_sep"), 4 + 2 + 0 + 4 + 1, 28 + 2 * 3 + 24 + 2),
        (Cut(tokens=99), sum(LENGTHS), sum(n * n for n in LENGTHS)),
        (Cut(width=0.5), sum(LENGTHS), sum(n * n for n in LENGTHS)),
    ],
)
def test_counts_are_of_what_a_row_really_has(cut: Cut, tokens: int, pairs: int) -> None:
    batch = numbered_batch(LENGTHS, fresh_seed(), length=9)
    assert kept_counts(batch, cut, SEP) == (tokens, pairs)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_kept_tokens_are_those_of_the_highest_attention_from_the_first(
    choice: str, slots: int
) -> None:
    seed = fresh_seed()
    batch = numbered_batch(LENGTHS, seed, length=9)
    teacher = features(batch, OTHER, seed, (2,))
    kept = there_and_back(cut_hidden(tokens_of(batch, choice, slots), None), teacher, batch)
    for row, (length, found) in enumerate(
        zip(LENGTHS, places(kept.tokens, kept.used), strict=True)
    ):
        attention = torch.zeros(length, dtype=torch.float64)
        for head in range(HEADS):
            query, key = (teacher[Feature(kind, 2)][row, head] for kind in ("query", "key"))
            first = reference.scores(query, key, length)[0]
            attention += torch.exp(torch.stack(reference.log_softmax(first)))
        allowed = [i for i in range(length) if choice != "attention_no_sep" or i != length - 1]
        if choice != "left_first":
            allowed.sort(key=lambda i: -float(attention[i]))  # noqa: B023 (used at once)
        assert found == sorted(allowed[:slots])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("neurons", [None, *NEURONS])
def test_what_comes_back_is_what_the_teacher_had_there(choice: str, neurons: str | None) -> None:
    seed = fresh_seed()
    batch = numbered_batch(LENGTHS, seed, length=9)
    teacher = features(batch, OTHER, seed, (2,))
    kind = Neurons(4, neurons, OTHER.hidden, 7) if neurons else None  # type: ignore[arg-type]
    kept = there_and_back(cut_hidden(tokens_of(batch, choice, 3), kind), teacher, batch)
    everything = torch.arange(OTHER.hidden)
    of_slots = (everything if kept.neurons is None else kept.neurons).expand(kept.values.shape)
    assert kept.used.any()
    for row, slot in kept.used.nonzero().tolist():
        hidden = teacher[Feature("hidden", 2)][row, kept.tokens[row, slot]]
        assert torch.equal(kept.values[row, slot], hidden[of_slots[row, slot]])
    assert not kept.values[~kept.used].any()


@pytest.mark.parametrize("hidden", [10, 16, 33])
@pytest.mark.parametrize("kept", [1, 5, 10])
def test_importance_keeps_the_largest_of_each_token(hidden: int, kept: int) -> None:
    """As numbers or as bits, whichever is smaller: both occur here."""
    batch = numbered_batch(LENGTHS, fresh_seed())
    values = torch.randn(len(LENGTHS), 3, hidden)
    choice = Neurons(kept, "importance", hidden, 0)
    (field,) = choice.fields("n", 3)
    used = torch.ones(values.shape[:2], dtype=torch.bool)
    used[1, 2] = False
    stored = choice.encode("n", choice.choose(values, batch), used)
    assert stored["n"][0].nbytes == 3 * min(2 * kept, math.ceil(hidden / 8))
    assert stored["n"].dtype == np.dtype(field.dtype) and not stored["n"][1, 2].any()
    found = choice.decode("n", {"n": torch.from_numpy(stored["n"])}, batch)
    for row, slot in used.nonzero().tolist():
        sizes = values[row, slot].abs().tolist()
        largest = sorted(range(hidden), key=lambda i: -sizes[i])[:kept]
        assert found[row, slot].tolist() == sorted(largest)


def test_uniform_neurons_stand_at_equal_distances() -> None:
    batch = numbered_batch((2,), 0)
    choice = Neurons(3, "uniform_mask", 10, 0)
    assert choice.choose(torch.zeros(1, 1, 10), batch).tolist() == [0, 3, 6]
    assert Cut(width=0.25).kept_neurons(10) == 2 and Cut(width=0.01).kept_neurons(10) == 1


def test_random_neurons_go_by_seed_copy_and_row_alone() -> None:
    seed = fresh_seed()
    batch = numbered_batch((5,) * 40, seed)
    choice = Neurons(20, "rand_mask", 60, seed)
    chosen = choice.choose(torch.zeros(40, 1, 60), batch)
    assert chosen.shape == (40, 1, 20) and bool((chosen.diff(dim=-1) > 0).all())
    part = rows_of(batch, slice(7, 9))
    assert torch.equal(choice.decode("n", {}, part), chosen[7:9])
    assert batch.epochs is not None
    others = [
        choice.choose(torch.zeros(1), replace(batch, epochs=batch.epochs + 1)),
        replace(choice, seed=seed + 1).choose(torch.zeros(1), batch),
        chosen.roll(1, 0),
    ]
    assert not any((chosen == other).all(dim=-1).any() for other in others)


def test_every_neuron_is_drawn_equally_often() -> None:
    """800 rows, a quarter of 32 neurons: 200 expected of each, with a deviation of 12."""
    batch = numbered_batch((2,) * 800, 0)
    drawn = Neurons(8, "rand_mask", 32, fresh_seed()).choose(torch.zeros(1), batch)
    times = torch.bincount(drawn.flatten(), minlength=32)
    assert times.min() > 200 - 6 * 13 and times.max() < 200 + 6 * 13


@pytest.mark.parametrize("choice", CHOICES)
def test_bytes_depend_on_the_row_alone(choice: str) -> None:
    """Not on the rows beside it, nor on what stands behind its end."""
    seed = fresh_seed()
    batch = numbered_batch(LENGTHS, seed, length=9)
    teacher = features(batch, OTHER, seed, (2,))
    poisoned = {}
    for name, value in teacher.items():
        padding = (
            ~batch.valid[:, :, None] if name.kind == "hidden" else ~batch.valid[:, None, :, None]
        )
        poisoned[name] = value.masked_fill(padding, torch.nan)
    tokens = tokens_of(batch, choice, 4)
    entries = [cut_hidden(tokens, Neurons(3, n, OTHER.hidden, 7)) for n in NEURONS]  # type: ignore[arg-type]
    entries += [cut_scores(kind, tokens) for kind in ("query-key", "value-value")]  # type: ignore[list-item]
    entries += [  # type: ignore[list-item]
        Whole(Feature("hidden", 2), "int8", 9, OTHER.hidden),
        Whole(Feature("key", 2), "fp16", 9, OTHER.hidden, HEADS),
    ]
    for entry in entries:
        together = entry.encode(poisoned, batch)
        for row in range(len(LENGTHS)):
            alone = slice(row, row + 1)
            own = entry.encode({n: v[alone] for n, v in teacher.items()}, rows_of(batch, alone))
            assert all(np.array_equal(together[name][alone], own[name]) for name in own)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["query-key", "value-value"])
def test_stored_scores_are_those_of_the_kept_queries(choice: str, kind: str) -> None:
    seed = fresh_seed()
    batch = numbered_batch(LENGTHS, seed, length=9)
    teacher = features(batch, OTHER, seed, (2,))
    entry: CutScores = cut_scores(kind, tokens_of(batch, choice, 3))
    kept = there_and_back(entry, teacher, batch)
    left, right = kind.split("-")
    for row, length in enumerate(LENGTHS):
        for head in range(HEADS):
            sides = (teacher[Feature(side, 2)][row, head] for side in (left, right))  # type: ignore[arg-type]
            whole = reference.scores(*sides, length)
            for slot, query in enumerate(kept.tokens[row].tolist()):
                used = bool(kept.used[row, slot])
                expected = torch.zeros(9, dtype=torch.float64)
                expected[:length] = torch.stack(whole[query]) if used else 0.0
                found = kept.values[row, head, slot]
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_scores_are_never_read_in_half_precision() -> None:
    batch = numbered_batch(LENGTHS, 0)
    entry = cut_scores("query-key", tokens_of(batch, "left_first", 2))
    arrays = entry.encode(features(batch, OTHER, 0, (2,)), batch)
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert entry.decode(stored, batch, torch.bfloat16).values.dtype == torch.float32


@pytest.mark.parametrize("kind", ["hidden", "query", "key", "value"])
def test_whole_features_come_back_bit_by_bit_and_lie_as_the_teacher_s_do(kind: str) -> None:
    seed = fresh_seed()
    batch = numbered_batch(LENGTHS, seed, length=9)
    feature = Feature(kind, 2)  # type: ignore[arg-type]
    live = features(batch, OTHER, seed, (2,))[feature]
    found = there_and_back(
        Whole(feature, "fp32", 9, OTHER.hidden, 1 if kind == "hidden" else HEADS),
        {feature: live},
        batch,
    )
    by_token = (lambda t: t) if kind == "hidden" else (lambda t: t.transpose(1, 2))
    assert found.stride() == live.stride()
    assert torch.equal(by_token(found)[batch.valid], by_token(live)[batch.valid])
    assert not by_token(found)[~batch.valid].any()
