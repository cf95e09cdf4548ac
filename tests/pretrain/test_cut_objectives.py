"""Objectives on cut knowledge: only what is kept counts, in the form that was asked for."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features
from pretrain.flops import Work
from pretrain.knowledge.choices import Neurons
from pretrain.knowledge.cuts import Cut, kept_counts
from pretrain.knowledge.hidden import Whole
from pretrain.objectives import OBJECTIVES, LayerPair, Settings, build_objective
from pretrain.objectives.base import Objective
from pretrain.objectives.composite import WeightedSum
from pretrain.objectives.contrast import ContrastSpace
from tests import reference
from tests.pretrain.cut_cases import (
    HEADS,
    LENGTHS,
    OTHER,
    OWN,
    SEP,
    cut_hidden,
    cut_scores,
    features,
    fresh_seed,
    numbered_batch,
    places,
    there_and_back,
    tokens_of,
)

PAIR = LayerPair(1, 2)
CHOICES = ("left_first", "attention", "attention_no_sep")
NEURONS = (None, "uniform_mask", "rand_mask", "importance")
FORMS = ("kept", "masked")
ON_HIDDEN = ("hid-seq", "emb", "cos")
ON_SCORES = {"att-mse": ("query", "key"), "att-kl": ("query", "key"), "val-kl": ("value", "value")}
SLOTS, KEPT_NEURONS = 3, 4


class Case:
    """Both models' features of one ragged batch, an objective, and the gradient of its loss."""

    def __init__(
        self, name: str, cut_form: str = "kept", cut: Cut | None = None, **settings: Any
    ) -> None:
        self.seed = fresh_seed()
        self.batch = numbered_batch(LENGTHS, self.seed, length=9)
        self.student = features(self.batch, OWN, self.seed, (0, 1))
        self.teacher = features(self.batch, OTHER, self.seed + 1, (0, 1, 2))
        chosen: dict[str, Any] = {"negatives": 4, "contrast_width": 6, "relation_heads": HEADS}
        self.settings = Settings((PAIR,), cut=cut_form, **(chosen | settings))  # type: ignore[arg-type]
        self.objective = build_objective(name, self.settings)
        torch.manual_seed(self.seed)
        self.maps = dict(self.objective.projections(OWN, OTHER).double().items())
        self.teacher_layer = 0 if name == "emb" else PAIR.teacher
        if cut is not None:
            counts = kept_counts(self.batch, cut, SEP)._asdict()
            self.batch = replace(self.batch, counts={**self.batch.counts, **counts})

    @property
    def weight(self) -> Tensor | None:
        """W of the pair, (D_S, D_T), if there is one."""
        for projection in self.maps.values():
            return projection.weight.T  # type: ignore[union-attr, operator, return-value]
        return None

    def hidden(self, choice: str, neurons: str | None) -> Features:
        """The teacher's hidden states as a cut leaves them."""
        kind = neurons and Neurons(KEPT_NEURONS, neurons, OTHER.hidden, 5)  # type: ignore[arg-type]
        tokens = tokens_of(self.batch, choice, SLOTS, self.teacher_layer)
        entry = cut_hidden(tokens, kind or None, self.teacher_layer)
        return {entry.feature: there_and_back(entry, self.teacher, self.batch)}

    def scores(self, name: str, choice: str, slots: int = SLOTS) -> Features:
        """The teacher's scores of the kept queries."""
        kind: Any = "-".join(ON_SCORES[name])
        entry = cut_scores(kind, tokens_of(self.batch, choice, slots))
        return {entry.feature: there_and_back(entry, self.teacher, self.batch)}

    def loss(
        self, teacher: Features, student: Mapping[Feature, Tensor] | None = None
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """The term over its units, and its gradient to what it reaches of the student."""
        given = student or self.student
        wanted = {name: given[name] for name in self.objective.student_features()}
        leaves = {name: value.detach().requires_grad_() for name, value in wanted.items()}
        total = self.objective.totals(leaves, teacher, self.batch, self.maps)[0]
        value = total / self.objective.counts(self.batch)[0]
        return value, gradients(value, leaves | self.learned)

    @property
    def learned(self) -> dict[str, Tensor]:
        """The weights of all maps."""
        maps = self.maps.items()
        return {f"{key}.{n}": p for key, part in maps for n, p in part.named_parameters()}

    def whole_loss(self) -> tuple[Tensor, dict[Any, Tensor]]:
        """The same of a live teacher."""
        return self.loss(self.teacher)


def gradients(value: Tensor, leaves: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def assert_like(
    found: tuple[Tensor, Any], expected: tuple[Tensor, Any], **tolerance: float
) -> None:
    torch.testing.assert_close(found, expected, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


def cut_of(choice: str, neurons: str | None = None) -> Cut:
    width = KEPT_NEURONS / OTHER.hidden if neurons else None
    return Cut(tokens=SLOTS, width=width, length=choice)  # type: ignore[arg-type]


def kept_places(kept: Any, batch: Batch) -> Tensor:
    """Bool (B, L, D): what is stored of the hidden states."""
    found = torch.zeros(*batch.valid.shape, OTHER.hidden, dtype=torch.bool)
    numbers = torch.arange(OTHER.hidden) if kept.neurons is None else kept.neurons
    numbers = numbers.expand(kept.values.shape)
    for row, slot in kept.used.nonzero().tolist():
        found[row, kept.tokens[row, slot], numbers[row, slot]] = True
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("neurons", NEURONS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ON_HIDDEN)
def test_cut_hidden_states_equal_the_reference(
    name: str, choice: str, neurons: str | None, form: str
) -> None:
    case = Case(name, form, cut_of(choice, neurons))
    teacher = case.hidden(choice, neurons)
    (kept,) = teacher.values()
    stored = kept_places(kept, case.batch)
    (feature,) = case.objective.student_features()
    own = case.student[feature].clone().requires_grad_()
    other = case.teacher[Feature("hidden", case.teacher_layer)]
    if name == "cos":
        expected = reference.cos(own, other, LENGTHS, case.weight, stored)
        if form == "masked":  # a token that is cut adds nothing
            expected = expected * int(kept.used.sum()) / sum(LENGTHS)
    elif form == "kept":
        expected = reference.hid_seq(own, other, LENGTHS, case.weight, stored)
    else:  # the paper's form to the letter: zeros in both models
        mapped = torch.stack(
            [torch.stack([reference.mapped(t, case.weight) for t in r]) for r in own]
        )
        expected = reference.hid_seq(mapped * stored, other * stored, LENGTHS)
    assert_like(case.loss(teacher), (expected, gradients(expected, {feature: own} | case.learned)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("neurons", NEURONS)
def test_first_tokens_equal_the_reference(neurons: str | None, form: str) -> None:
    case = Case("hid-cls", form, cut_of("left_first", neurons))
    teacher = case.hidden("left_first", neurons)
    (kept,) = teacher.values()
    stored = kept_places(kept, case.batch)
    stored[:, 1:] = False
    feature = Feature("hidden", 1)
    own = case.student[feature].clone().requires_grad_()
    other = case.teacher[Feature("hidden", 2)]
    expected = reference.hid_seq(own, other, [1] * len(LENGTHS), case.weight, stored)
    if form == "masked":
        share = (KEPT_NEURONS if neurons else OTHER.hidden) / OTHER.hidden
        expected = expected * share
    assert_like(case.loss(teacher), (expected, gradients(expected, {feature: own} | case.learned)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ON_SCORES)
def test_cut_scores_equal_the_reference(name: str, choice: str, form: str) -> None:
    case = Case(name, form, cut_of(choice))
    teacher = case.scores(name, choice)
    (kept,) = teacher.values()
    queries = places(kept.tokens, kept.used)
    leaves = {
        Feature(kind, 1): case.student[Feature(kind, 1)].clone().requires_grad_()  # type: ignore[arg-type]
        for kind in dict.fromkeys(ON_SCORES[name])
    }
    own, other = (
        tuple(model[Feature(kind, layer)] for kind in ON_SCORES[name])  # type: ignore[arg-type]
        for model, layer in ((leaves, 1), (case.teacher, 2))
    )
    expected = (reference.att_mse if name == "att-mse" else reference.relation_kl)(
        own,
        other,
        LENGTHS,
        queries,  # type: ignore[arg-type]
    )
    if form == "masked":  # equal scores, 0, wherever they are cut
        kept_units = [
            len(q) * (n if name == "att-mse" else 1) for q, n in zip(queries, LENGTHS, strict=True)
        ]
        units = [n * (n if name == "att-mse" else 1) for n in LENGTHS]
        expected = expected * sum(kept_units) / sum(units)
    found, expectations = case.loss(teacher), (expected, gradients(expected, leaves))
    assert_like(found, expectations, rtol=1e-5, atol=1e-6)  # stored in float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*ON_HIDDEN, *ON_SCORES])
def test_a_cut_that_keeps_everything_changes_nothing(name: str, form: str) -> None:
    cut = Cut(tokens=9, width=1.0)
    case = Case(name, form, cut)
    tokens = tokens_of(case.batch, "attention", 9, case.teacher_layer)
    if name in ON_SCORES:
        kept = case.scores(name, "attention", 9)
        assert_like(case.loss(kept), case.whole_loss(), rtol=1e-5, atol=1e-6)
        return
    all_of_them = Neurons(OTHER.hidden, "importance", OTHER.hidden, 0)
    entry = cut_hidden(tokens, all_of_them, case.teacher_layer)
    kept = {entry.feature: there_and_back(entry, case.teacher, case.batch)}
    assert_like(case.loss(kept), case.whole_loss())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ON_HIDDEN)
def test_a_student_s_cut_tokens_never_enter(name: str, choice: str, form: str) -> None:
    """Whatever they are: NaN, which 0 times would still be NaN."""
    case = Case(name, form, cut_of(choice, "rand_mask"))
    teacher = case.hidden(choice, "rand_mask")
    (kept,) = teacher.values()
    used = torch.zeros_like(case.batch.valid).scatter(1, kept.tokens, True)
    (feature,) = case.objective.student_features()
    spoiled = {feature: case.student[feature].masked_fill(~used[..., None], torch.nan)}
    assert_same(case.loss(teacher), case.loss(teacher, spoiled))


@pytest.mark.parametrize("neurons", NEURONS[1:])
@pytest.mark.parametrize("name", [*ON_HIDDEN, "hid-cls"])
def test_a_student_s_cut_neurons_never_enter(name: str, neurons: str) -> None:
    """Of a student as wide as its teacher, without a map between them."""
    case = Case(name, "kept", cut_of("left_first", neurons), projection="none")
    case.student = features(case.batch, OTHER, case.seed, (0, 1))
    teacher = case.hidden("left_first", neurons)
    (kept,) = teacher.values()
    (feature,) = case.objective.student_features()
    stored = kept_places(kept, case.batch)
    for row, slot in (~kept.used).nonzero().tolist():  # looked at, and left out
        stored[row, kept.tokens[row, slot]] = True
    spoiled = {feature: case.student[feature].masked_fill(~stored, torch.nan)}
    assert_same(case.loss(teacher), case.loss(teacher, spoiled))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["att-mse", "att-kl"])
def test_a_student_s_cut_queries_never_enter(name: str, choice: str) -> None:
    case = Case(name, "kept", cut_of(choice))
    teacher = case.scores(name, choice)
    (kept,) = teacher.values()
    used = torch.zeros_like(case.batch.valid).scatter(1, kept.tokens, True)[:, None, :, None]
    query = Feature("query", 1)
    spoiled = case.student | {query: case.student[query].masked_fill(~used, torch.nan)}
    assert_same(case.loss(teacher), case.loss(teacher, spoiled))


def test_unused_slots_never_count_whatever_stands_in_them() -> None:
    for name in (*ON_HIDDEN, *ON_SCORES):
        case = Case(name, "kept", cut_of("attention"))
        teacher = (
            case.scores(name, "attention") if name in ON_SCORES else case.hidden("attention", None)
        )
        (feature,), (kept,) = teacher, teacher.values()
        shape = (len(LENGTHS), *([1] if name in ON_SCORES else []), SLOTS, 1)
        noise = kept.values.masked_fill(~kept.used.view(shape), 1e4)
        moved = kept.tokens.masked_fill(~kept.used, 8)
        assert not kept.used.all()
        assert_same(
            case.loss(teacher), case.loss({feature: kept._replace(values=noise, tokens=moved)})
        )


def assert_same(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> None:
    """Bit by bit, gradients too; none of them NaN."""
    assert torch.isfinite(one[0]) and bool(one[0] > 0)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.mark.parametrize("name", ["hid-cls", "hid-cls-contrast"])
def test_one_stored_token_is_all_that_an_objective_on_first_tokens_needs(name: str) -> None:
    case = Case(name, "none")
    for space in case.maps.values():
        if isinstance(space, ContrastSpace):
            space.remember(torch.randn(5, OTHER.hidden, dtype=torch.float64))
    entry = cut_hidden(tokens_of(case.batch, "left_first", 1), None)
    kept = {entry.feature: there_and_back(entry, case.teacher, case.batch)}
    assert_same(case.whole_loss(), case.loss(kept))
    live, stored = case.objective.note(case.teacher), case.objective.note(kept)
    assert live.keys() == stored.keys()
    assert all(torch.equal(live[key], stored[key]) for key in live)


@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"mlm", "kd"}))
def test_whole_knowledge_gives_the_very_loss_and_gradient_of_a_live_teacher(
    name: str, form: str
) -> None:
    """In float32, bit by bit; the live teacher has numbers at padding, the stored one zeros."""
    case = Case(name, "none", form=form)
    single = {f: v.float() for f, v in case.teacher.items()}
    case.student = {f: v.float() for f, v in case.student.items()}
    case.maps = {key: part.float() for key, part in case.maps.items()}
    for space in case.maps.values():
        if isinstance(space, ContrastSpace):
            space.remember(torch.randn(5, OTHER.hidden))
    stored: dict[Feature, Any] = {}
    for feature in case.objective.teacher_features():
        heads = 1 if feature.kind == "hidden" else HEADS
        entry = Whole(feature, "fp32", 9, OTHER.hidden, heads)
        arrays = entry.encode(single, case.batch)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        stored[feature] = entry.decode(tensors, case.batch, torch.float32)
    assert_same(case.loss(single), case.loss(stored))


@pytest.mark.parametrize(
    ("name", "whole", "kept"),
    [
        ("hid-seq", "tokens", "kept_tokens"),
        ("emb", "tokens", "kept_tokens"),
        ("cos", "tokens", "kept_tokens"),
        ("hid-cls", "sequences", "sequences"),
        ("hid-cls-contrast", "sequences", "sequences"),
        ("att-mse", "pairs", "kept_pairs"),
        ("att-kl", "tokens", "kept_tokens"),
        ("val-kl", "tokens", "kept_tokens"),
        ("minilmv2", "tokens", "tokens"),
        ("mlm", "masked", "masked"),
    ],
)
def test_means_run_over_what_the_form_says(name: str, whole: str, kept: str) -> None:
    units = {form: one(name, cut=form).counted for form in ("none", "masked", "kept")}
    assert units == {"none": whole, "masked": whole, "kept": kept}


def one(name: str, **settings: Any) -> Objective:
    return OBJECTIVES[name](Settings((PAIR,), **settings))


@pytest.mark.parametrize("name", ["minilmv2", "pearson-keys", "pearson-queries", "pearson-heads"])
def test_objectives_on_whole_rows_refuse_a_cut_in_length_only(name: str) -> None:
    with pytest.raises(InputError, match=f"--keep 5t: --objective {name} compares whole rows"):
        one(name).check_cut(name, Cut(tokens=5))
    one(name).check_cut(name, Cut(layers=1, width=0.5))


@pytest.mark.parametrize("name", ["hid-cls", "hid-cls-contrast"])
def test_objectives_on_first_tokens_refuse_a_choice_that_may_drop_it(name: str) -> None:
    for choice in ("attention", "attention_no_sep"):
        with pytest.raises(InputError, match=f"--keep_length {choice} .*--objective {name}"):
            one(name).check_cut(name, Cut(tokens=5, length=choice))  # type: ignore[arg-type]
    one(name).check_cut(name, Cut(tokens=5))


def test_contrast_refuses_a_cut_in_width_and_others_take_it() -> None:
    with pytest.raises(InputError, match=r"--keep 0.1h: --objective hid-cls-contrast"):
        one("hid-cls-contrast").check_cut("hid-cls-contrast", Cut(width=0.1))
    for name in (*ON_HIDDEN, *ON_SCORES, "hid-cls", "mlm", "kd"):
        choice = "left_first" if name == "hid-cls" else "attention"
        one(name).check_cut(name, Cut(1, 5, 0.1, length=choice))  # type: ignore[arg-type]


def test_a_user_s_objective_that_knows_no_cut_is_refused_by_name() -> None:
    class Mine(OBJECTIVES["hid-seq"]):  # type: ignore[misc, name-defined]
        takes_cut = False

    for cut, part in ((Cut(tokens=5), "5t"), (Cut(width=0.5), "0.5h")):
        with pytest.raises(InputError, match=f"--keep {part}: --objective my:Mine"):
            Mine(Settings((PAIR,))).check_cut("my:Mine", cut)
    Mine(Settings((PAIR,))).check_cut("my:Mine", Cut(layers=1))


@pytest.mark.parametrize("name", ["hid-seq", "att-mse", "att-kl"])
def test_flops_are_those_of_what_is_compared(name: str) -> None:
    """A quarter of the tokens: of the projection, and of the student's scores; no teacher's.

    There is no lean form of stored scores.
    """
    work = Work(4, 40, 0.15)
    whole = one(name, form="plain").flops(OWN, OTHER, work)
    cut = one(name, form="lean", kept_tokens=10).flops(OWN, OTHER, work)
    assert cut.backward == whole.backward / 4
    theirs = 0 if name == "hid-seq" else 2 * work.length * OTHER.hidden
    assert cut.forward == (whole.forward - theirs) / 4


def test_sums_over_parts_of_a_batch_add_up() -> None:
    """As on ranks or in micro-batches: counts of the parts are those of the whole."""
    batch = numbered_batch(LENGTHS, fresh_seed())
    cut = Cut(tokens=2, length="attention_no_sep")
    parts = [
        kept_counts(replace(batch, input_ids=ids[None], valid=valid[None]), cut, SEP)
        for ids, valid in zip(batch.input_ids, batch.valid, strict=True)
    ]
    added = tuple(sum(units) for units in zip(*parts, strict=True))
    assert added == kept_counts(batch, cut, SEP)


def test_terms_of_a_sum_read_the_same_knowledge() -> None:
    """`att-mse+hid-seq`: scores and hidden states side by side, each term by its own units."""
    case = Case("att-mse+hid-seq", "kept", cut_of("attention", "importance"))
    teacher = {**case.hidden("attention", "importance"), **case.scores("att-mse", "attention")}
    together = totals(case.objective, case, teacher)
    alone = [totals(build_objective(n, case.settings), case, teacher) for n in case.objective.names]
    assert torch.equal(together, torch.cat(alone))
    counts = kept_counts(case.batch, cut_of("attention"), SEP)
    assert case.objective.counts(case.batch) == [counts.kept_pairs, counts.kept_tokens]


def totals(objective: WeightedSum, case: Case, teacher: Features) -> Tensor:
    return objective.totals(case.student, teacher, case.batch, case.maps)


def test_layers_may_keep_other_tokens_of_the_same_row() -> None:
    """Two mapped layers, each by its own attention, add up."""
    pairs = (LayerPair(0, 1), LayerPair(1, 2))
    case = Case("hid-seq", "kept", cut_of("attention"), projection="none")
    case.student = features(case.batch, OTHER, case.seed, (0, 1))
    entries = [cut_hidden(tokens_of(case.batch, "attention", 2, at), None, at) for at in (1, 2)]
    teacher = {e.feature: there_and_back(e, case.teacher, case.batch) for e in entries}
    one_layer, two_layers = teacher.values()
    assert not torch.equal(one_layer.tokens, two_layers.tokens)
    each = [
        totals(build_objective("hid-seq", replace(case.settings, pairs=(p,))), case, teacher)
        for p in pairs
    ]
    both = totals(build_objective("hid-seq", replace(case.settings, pairs=pairs)), case, teacher)
    torch.testing.assert_close(both, sum(each))
