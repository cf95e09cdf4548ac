"""Every objective equals a slow independent reference, whatever the padding and the cut."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.batches import NO_LABEL, Batch, make_batch
from pretrain.features import Feature
from pretrain.models import Shape
from pretrain.objectives import (
    OBJECTIVES,
    LayerPair,
    Settings,
    build_objective,
    check_models,
)
from pretrain.objectives.composite import Weight, WeightedSum, parse_expression
from pretrain.objectives.contrast import ContrastSpace
from tests import reference
from tests.pretrain.tiny import ragged_batch, ragged_ids, tiny_masking

PAIRS = (LayerPair(1, 2), LayerPair(3, 5))
HEADS, OWN_SIZE, OTHER_SIZE, VOCAB = 3, 4, 5, 11
OWN = Shape(3, HEADS * OWN_SIZE, HEADS, 16, VOCAB, 40, HEADS * OWN_SIZE)
OTHER = Shape(5, HEADS * OTHER_SIZE, HEADS, 16, VOCAB, 40, HEADS * OTHER_SIZE)
RAGGED, FULL = (7, 3, 1, 5), (6, 6, 6)
REMEMBERED = 5
SMALL = {"relation_heads": 3, "negatives": 4, "contrast_width": 6}
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SIDES = {"q": "query", "k": "key", "v": "value"}


@pytest.fixture(params=["fixed", "fresh"])
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that stays and one that is new in every test; printed where a test fails."""
    chosen = 1 if request.param == "fixed" else int.from_bytes(os.urandom(4), "little")
    print(f"seed {chosen}")
    return chosen


@dataclass
class Case:
    """Random features of both models for one batch."""

    batch: Batch
    lengths: tuple[int, ...]
    student: dict[Feature, Tensor]
    teacher: dict[Feature, Tensor]
    settings: Settings
    projections: nn.ModuleDict

    def weight(self, name: str, pair: LayerPair) -> Tensor | None:
        """W (student width, teacher width) of a pair, None where there is none."""
        key = f"{name}_{pair.student}_{pair.teacher}"
        linear = dict(self.projections.items()).get(key)
        return None if linear is None else linear.weight.T  # type: ignore[return-value]


def random_features(batch: Batch, shape: Shape, layers: list[int], seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    rows, length = batch.input_ids.shape
    features = {
        Feature("logits", "masked"): draw(len(batch.masked), shape.vocab),
        Feature("logits", "all"): draw(batch.counts["tokens"], shape.vocab),
    }
    for layer in layers:
        features[Feature("hidden", layer)] = draw(rows, length, shape.hidden)
        for kind in ("query", "key", "value"):
            sizes = (rows, shape.heads, length, shape.head_size)
            features[Feature(kind, layer)] = draw(*sizes)
    return features


def with_small_labels(batch: Batch) -> Batch:
    """The tiny vocabulary is larger than the logits of these tests are wide."""
    labels = torch.where(batch.labels == NO_LABEL, NO_LABEL, batch.labels % VOCAB)
    return replace(batch, labels=labels)


def make_case(
    seed: int,
    expression: str,
    lengths: tuple[int, ...] = RAGGED,
    other: Shape = OTHER,
    pairs: tuple[LayerPair, ...] = PAIRS,
    own_shape: Shape = OWN,
    **settings: object,
) -> tuple[WeightedSum, Case]:
    batch = ragged_batch(lengths, seed=seed)
    batch = with_small_labels(batch)
    student = random_features(batch, own_shape, [0, *(pair.student for pair in pairs)], seed)
    teacher = random_features(batch, other, [0, *(pair.teacher for pair in pairs)], seed + 1)
    for feature in student.values():
        feature.requires_grad_()
    chosen = Settings(pairs, **(SMALL | settings))  # type: ignore[arg-type]
    objective = build_objective(expression, chosen)
    torch.manual_seed(seed)
    projections = objective.projections(own_shape, other).double()
    for space in projections.values():
        if isinstance(space, ContrastSpace):  # a memory that has gone round, and one that has not
            space.remember(torch.randn(REMEMBERED, other.hidden, dtype=torch.float64))
    return objective, Case(batch, lengths, student, teacher, chosen, projections)


def ours(objective: WeightedSum, case: Case) -> Tensor:
    """The weighted loss of the batch, each term divided by its units."""
    totals = objective.totals(case.student, case.teacher, case.batch, case.projections)
    counts = torch.tensor(objective.counts(case.batch), dtype=torch.float64)
    return (totals / counts * torch.tensor(objective.weights_at(0), dtype=torch.float64)).sum()


def own(case: Case, kind: str, pair: LayerPair) -> Tensor:
    return case.student[Feature(kind, pair.student)]  # type: ignore[arg-type]


def other(case: Case, kind: str, pair: LayerPair) -> Tensor:
    return case.teacher[Feature(kind, pair.teacher)]  # type: ignore[arg-type]


def qk(of: Callable, case: Case, pair: LayerPair) -> tuple[Tensor, Tensor]:
    return of(case, "query", pair), of(case, "key", pair)


def reference_of(name: str, case: Case) -> Tensor:
    """The reference's value of a term, summed over the layer pairs."""
    if name in ("mlm", "kd", "vanilla-kd"):
        at = Feature("logits", "masked" if name != "kd" else case.settings.positions)
        used = case.batch.counts["masked"] if at.at == "masked" else None  # the rest are slots
        student, teacher = case.student[at][:used], case.teacher[at][:used]
        labels = case.batch.labels[:used]
        if name == "mlm":
            return reference.mlm(student, labels)
        if name == "kd":
            return reference.kd(student, teacher, case.settings.temperature)
        return reference.vanilla_kd(student, teacher, labels)
    if name == "emb":
        embeddings = case.student[Feature("hidden", 0)], case.teacher[Feature("hidden", 0)]
        return reference.hid_seq(*embeddings, case.lengths, case.weight(name, LayerPair(0, 0)))
    if name in TERMS:
        parts = [(weight, reference_of(part, case)) for part, weight in TERMS[name].items()]
        return torch.stack([weight * part for weight, part in parts]).sum()
    one: dict[str, Callable[[LayerPair], Tensor]] = {
        "hid-cls": lambda pair: reference.hid_cls(
            own(case, "hidden", pair), other(case, "hidden", pair), case.weight(name, pair)
        ),
        "hid-seq": lambda pair: reference.hid_seq(
            own(case, "hidden", pair),
            other(case, "hidden", pair),
            case.lengths,
            case.weight(name, pair),
        ),
        "att-mse": lambda pair: reference.att_mse(
            qk(own, case, pair), qk(other, case, pair), case.lengths
        ),
        "att-kl": lambda pair: reference.att_kl(
            qk(own, case, pair), qk(other, case, pair), case.lengths
        ),
        "val-kl": lambda pair: reference.val_kl(
            own(case, "value", pair), other(case, "value", pair), case.lengths
        ),
        "cos": lambda pair: reference.cos(
            own(case, "hidden", pair),
            other(case, "hidden", pair),
            case.lengths,
            case.weight(name, pair),
        ),
        "hid-cls-contrast": lambda pair: contrast(case, pair),
        "minilmv2": lambda pair: reference.minilmv2(
            {kind: own(case, kind, pair) for kind in SIDES.values()},
            {kind: other(case, kind, pair) for kind in SIDES.values()},
            case.lengths,
            case.settings.relation_heads,
            case.settings.relations,
        ),
        **{
            f"pearson-{along}": lambda pair, along=along: reference.pearson(  # type: ignore[misc]
                qk(own, case, pair), qk(other, case, pair), case.lengths, along
            )
            for along in ("keys", "queries", "heads")
        },
    }
    return torch.stack([one[name](pair) for pair in case.settings.pairs]).sum()


def contrast(case: Case, pair: LayerPair) -> Tensor:
    space = case.projections[f"hid-cls-contrast_{pair.student}_{pair.teacher}"]
    assert isinstance(space, ContrastSpace)
    return reference.hid_cls_contrast(
        own(case, "hidden", pair),
        other(case, "hidden", pair),
        space.memory[: int(space.written)],
        space.student.weight.T,
        space.teacher.weight.T,
        case.settings.contrast_temperature,
    )


def gradients(loss: Tensor, case: Case) -> list[Tensor]:
    """Of all student features and projections, zeros where the loss does not reach."""
    inputs = [*case.student.values(), *case.projections.parameters()]
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


TERMS = {
    "distilbert": {"kd": 5.0, "mlm": 2.0, "cos": 1.0},
    "minilm": {"att-kl": 1.0, "val-kl": 1.0},
    "tinybert": {"att-mse": 1.0, "hid-seq": 1.0, "emb": 1.0},
    "etd": {"att-mse": 1.0, "hid-seq": 1.0},
    "pearson": {"pearson-keys": 1 / 3, "pearson-queries": 1 / 3, "pearson-heads": 1 / 3},
}
"""Sums, besides vanilla-kd, which the reference has by itself."""
NAMES = [*OBJECTIVES, "vanilla-kd", *TERMS]


@pytest.mark.parametrize("lengths", [RAGGED, FULL, (4,), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_equal_the_reference(
    name: str, lengths: tuple[int, ...], seed: int
) -> None:
    objective, case = make_case(seed, name, lengths)
    assert case.batch.full == (len(set(lengths)) == 1)
    value, expected = ours(objective, case), reference_of(name, case)
    torch.testing.assert_close(value, expected, **EXACT)
    found, wanted = gradients(value, case), gradients(expected, case)
    assert max(lengths) == 1 or any(g.abs().max() > 1e-4 for g in wanted)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, **EXACT)


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_kd_follows_temperature_and_positions(
    temperature: float, positions: str, seed: int
) -> None:
    objective, case = make_case(seed, "kd", temperature=temperature, positions=positions)
    value, expected = ours(objective, case), reference_of("kd", case)
    torch.testing.assert_close(value, expected, **EXACT)
    for one, two in zip(gradients(value, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(one, two, **EXACT)


@pytest.mark.parametrize("name", ["hid-cls", "hid-seq"])
@pytest.mark.parametrize(
    ("mode", "same_width", "maps"),
    [("auto", True, 0), ("auto", False, 2), ("always", True, 2), ("none", True, 0)],
)
def test_projection_stands_where_the_setting_says(
    name: str, mode: str, same_width: bool, maps: int, seed: int
) -> None:
    objective, case = make_case(seed, name, other=OWN if same_width else OTHER, projection=mode)
    assert len(case.projections) == maps  # one of its own for each of the two layer pairs
    value, expected = ours(objective, case), reference_of(name, case)
    torch.testing.assert_close(value, expected, **EXACT)
    for one, two in zip(gradients(value, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(one, two, **EXACT)


def test_weighted_sum_adds_the_weighted_terms(seed: int) -> None:
    names = ["kd", "mlm", "hid-seq", "att-kl", "val-kl"]
    objective, case = make_case(seed, "0.5*kd + mlm+3*hid-seq+0.25*att-kl+val-kl")
    parts = [reference_of(name, case) for name in names]
    weights = [0.5, 1.0, 3.0, 0.25, 1.0]
    expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    value = ours(objective, case)
    torch.testing.assert_close(value, expected, **EXACT)
    for one, two in zip(gradients(value, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(one, two, **EXACT)
    totals = objective.totals(case.student, case.teacher, case.batch, case.projections)
    for total, count, part in zip(totals, objective.counts(case.batch), parts, strict=True):
        torch.testing.assert_close(total / count, part, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_features_lose_only_their_own_rounding(name: str, seed: int) -> None:
    """Losses of half-precision features are computed in float32: 1e-5 of the float64 reference.

    A projection is the exception: its product is rounded to bfloat16 (8 bits), so 2e-2. So is
    a correlation: it divides by how much probabilities vary, which is less than they are, 1e-4.
    """
    objective, case = make_case(seed, name)
    for features in (case.student, case.teacher):
        for feature, value in features.items():
            features[feature] = value.detach().bfloat16()
    case.projections.bfloat16()
    value = ours(objective, case)
    assert value.dtype == torch.float64  # float32 totals over float64 counts
    totals = objective.totals(case.student, case.teacher, case.batch, case.projections)
    assert totals.dtype == torch.float32
    projected = case.projections or name.startswith("hid")
    tolerance = 2e-2 if projected else 1e-4 if "pearson" in name else 1e-5
    torch.testing.assert_close(value, reference_of(name, case), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_teacher_features_made_in_inference_mode_work_in_backward(name: str) -> None:
    objective, case = make_case(5, name)
    expected = gradients(ours(objective, case), case)
    with torch.inference_mode():
        case.teacher = {feature: value.clone() for feature, value in case.teacher.items()}
    assert all(value.is_inference() for value in case.teacher.values())
    for one, two in zip(gradients(ours(objective, case), case), expected, strict=True):
        assert torch.equal(one, two)


LOGITS = ("mlm", "kd", "vanilla-kd")


@pytest.mark.parametrize("form", ["plain", "lean"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOGITS])
def test_what_stands_in_padding_never_changes_value_or_gradient(
    name: str, form: str, seed: int
) -> None:
    objective, case = make_case(seed, name, form=form)
    value = ours(objective, case)
    before = gradients(value, case)
    padding = ~case.batch.valid
    changed = 0
    for features in (case.student, case.teacher):
        for feature, tensor in features.items():
            if feature.kind == "logits":
                continue
            tokens = tensor.detach() if tensor.ndim == 3 else tensor.detach().transpose(1, 2)
            tokens[padding] = torch.randn_like(tokens[padding]) * 1000  # in place, a view
            changed += 1
    assert changed == 24 and padding.sum() == 12
    again = ours(objective, case)
    assert torch.equal(again, value)
    inputs = [*case.student, *case.projections.parameters()]
    for feature, one, two in zip(inputs, gradients(again, case), before, strict=True):
        assert torch.equal(one, two)
        if isinstance(feature, Feature) and feature.kind != "logits":
            tokens = one if one.ndim == 3 else one.transpose(1, 2)
            assert not tokens[padding].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [[1, 2, 3], [2], [3]], ids=str)
def test_cutting_into_micro_batches_never_changes_the_loss(
    name: str, cuts: list[int], seed: int
) -> None:
    settings = {"positions": "all"} if name == "kd" else {}
    objective, case = make_case(seed, name, **settings)
    ids, masking = ragged_ids(RAGGED, max(RAGGED), 0, seed), tiny_masking(0.3, seed)
    rows = np.arange(len(RAGGED))
    totals, counts = torch.zeros(len(objective.names)), [0] * len(objective.names)
    first = {"masked": 0, "all": 0}
    for part in np.split(rows, cuts):
        batch = make_batch(ids[part], np.zeros_like(part), part, masking, 0)
        batch = with_small_labels(batch)
        slots = {"masked": len(batch.masked), "all": batch.counts["tokens"]}
        sizes = {"masked": batch.counts["masked"], "all": batch.counts["tokens"]}

        def part_of(
            features: dict[Feature, Tensor],
            part: np.ndarray = part,
            starts: dict[str, int] = dict(first),  # noqa: B006 (a copy of its own)
            sizes: dict[str, int] = sizes,
            slots: dict[str, int] = slots,
        ) -> dict[Feature, Tensor]:
            """Logits of the part's own positions, and of its unused slots something."""

            cut = {}
            for f, v in features.items():
                cut[f] = v[part] if f.kind != "logits" else v[starts[f.at] :][: sizes[f.at]]
                if f.kind == "logits":
                    unused = v.new_ones(slots[f.at] - sizes[f.at], v.shape[1])
                    cut[f] = torch.cat([cut[f], unused])
            return cut

        totals = totals + objective.totals(
            part_of(case.student), part_of(case.teacher), batch, case.projections
        )
        counts = [a + b for a, b in zip(counts, objective.counts(batch), strict=True)]
        first = {at: first[at] + sizes[at] for at in first}
    assert counts == objective.counts(case.batch)
    whole = objective.totals(case.student, case.teacher, case.batch, case.projections)
    torch.testing.assert_close(totals, whole, **EXACT)


@pytest.mark.parametrize("name", ["mlm", "kd", "vanilla-kd"])
def test_batch_without_masked_positions_costs_nothing(name: str) -> None:
    objective, case = make_case(3, name)
    case.batch = ragged_batch(RAGGED, seed=3, probability=0.0)
    empty = Feature("logits", "masked")
    case.student = {empty: torch.zeros(0, VOCAB, requires_grad=True)}
    case.teacher = {empty: torch.zeros(0, VOCAB)}
    totals = objective.totals(case.student, case.teacher, case.batch, case.projections)
    assert totals.tolist() == [0.0] * len(totals)
    assert objective.counts(case.batch) == [0] * len(totals)
    totals.sum().backward()  # nothing to learn, and no error


def test_equal_models_have_no_distance() -> None:
    """By hand: identical features give 0, and kd gives the teacher's entropy."""
    names = "kd+att-mse+att-kl+val-kl+hid-seq+hid-cls+emb+cos+minilmv2+pearson"
    objective, case = make_case(4, names, other=OWN)
    layers = {0: 0, **dict(PAIRS)}
    case.teacher = {
        Feature(kind, at if kind == "logits" else layers[at]): value.detach()  # type: ignore
        for (kind, at), value in case.student.items()
    }
    totals = objective.totals(case.student, case.teacher, case.batch, case.projections)
    assert totals[1:].abs().max() < 1e-12
    logits = case.student[Feature("logits", "masked")][: case.batch.counts["masked"]]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(totals[0], entropy.sum(), **EXACT)


def test_only_the_wanted_features_are_asked_for() -> None:
    settings = Settings((LayerPair(3, 6),))
    wanted = build_objective("att-mse+val-kl", settings)
    assert wanted.student_features() == {("query", 3), ("key", 3), ("value", 3)}
    assert wanted.teacher_features() == {("query", 6), ("key", 6), ("value", 6)}
    mlm = build_objective("mlm", settings)
    assert mlm.student_features() == {("logits", "masked")}
    assert mlm.teacher_features() == frozenset() and not mlm.uses_teacher
    kd = build_objective("kd", replace(settings, positions="all"))
    assert kd.teacher_features() == {("logits", "all")} == kd.student_features()


@pytest.mark.parametrize(
    ("expression", "terms"),
    [
        ("att-mse", {"att-mse": 1.0}),
        (" att-kl + val-kl ", {"att-kl": 1.0, "val-kl": 1.0}),
        ("0.5*kd+mlm+hid-seq", {"kd": 0.5, "mlm": 1.0, "hid-seq": 1.0}),
        ("2 * kd", {"kd": 2.0}),
        ("1e-3*kd", {"kd": 0.001}),
        (".5*mlm", {"mlm": 0.5}),
        ("mlm+0.5*mlm", {"mlm": 1.5}),
        ("vanilla-kd", {"kd": 1.0, "mlm": 1.0}),
        ("0.5*vanilla-kd+mlm", {"kd": 0.5, "mlm": 1.5}),
    ],
)
def test_expression_gives_names_and_weights(expression: str, terms: dict[str, float]) -> None:
    objective = build_objective(expression, Settings(PAIRS))
    assert dict(zip(objective.names, objective.weights_at(0.3), strict=True)) == terms


@pytest.mark.parametrize(
    ("expression", "share", "terms"),
    [
        ("1:0*kd+mlm", 0.0, {"kd": 1.0, "mlm": 1.0}),
        ("1:0*kd+mlm", 0.25, {"kd": 0.75, "mlm": 1.0}),
        ("1:0*kd+mlm", 1.0, {"kd": 0.0, "mlm": 1.0}),
        ("0.5:1.5 * hid-seq", 0.5, {"hid-seq": 1.0}),
        ("0:1*distilbert+1:0*mlm", 0.5, {"kd": 2.5, "mlm": 1.5, "cos": 0.5}),
        ("1:0*kd", 1.2, {"kd": 0.0}),  # a time budget may be overrun by a step
    ],
)
def test_weight_goes_linearly_over_the_run(
    expression: str, share: float, terms: dict[str, float]
) -> None:
    objective = build_objective(expression, Settings(PAIRS))
    found = dict(zip(objective.names, objective.weights_at(share), strict=True))
    assert found == pytest.approx(terms)


@pytest.mark.parametrize(
    "expression",
    ["", "+", "kd+", "kd++mlm", "kd*0.5", "-1*kd", "0*kd", "0.5kd", "1.2.3*kd", "kd-", "kd,mlm"]
    + ["*kd", "0.5*", "nan*kd", "1e999*kd", "KD", "(kd)", "0:0*kd", ":1*kd", "1:*kd", "1:2:3*kd"],
)
def test_malformed_expression_is_refused(expression: str) -> None:
    with pytest.raises(InputError, match="--objective") as refusal:
        build_objective(expression, Settings(PAIRS))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("att-mes", "att-mse"), ("hid-sec", "hid-seq"), ("vanila-kd", "vanilla-kd"), ("ml", "mlm")],
)
def test_unknown_objective_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=rf"unknown objective '{name}'; nearest: {nearest}"):
        build_objective(f"mlm+{name}", Settings(PAIRS))


def test_parse_expression_keeps_the_order() -> None:
    found = parse_expression("0.5*kd+mlm+1e+1*kd")
    assert found == [(Weight(0.5, 0.5), "kd"), (Weight(1, 1), "mlm"), (Weight(10, 10), "kd")]


@pytest.mark.parametrize("name", ["att-mse", "att-kl", "val-kl"])
def test_head_counts_that_differ_are_refused_with_a_remedy(name: str) -> None:
    objective = build_objective(f"mlm+{name}", Settings(PAIRS))
    with pytest.raises(InputError, match="student has 3 and the teacher 12.*minilmv2"):
        check_models(objective, OWN, replace(OTHER, heads=12))
    check_models(objective, OWN, OTHER)  # head sizes may differ


@pytest.mark.parametrize("name", ["att-mse", "att-kl", "val-kl"])
@pytest.mark.parametrize("pair", [(0, 0), (1, 0), (0, 2)])
def test_embeddings_have_no_attention_to_compare(name: str, pair: tuple[int, int]) -> None:
    """`--layers 0:0`, or `uniform` for a student that is deeper than its teacher."""
    objective = build_objective(name, Settings((LayerPair(*pair),)))
    with pytest.raises(InputError, match=f"--layers .*{name}|{name}.*--layers"):
        check_models(objective, OWN, OTHER)
    check_models(build_objective("hid-seq", objective.objectives[0].settings), OWN, OTHER)


def test_vocabularies_that_differ_are_refused_under_kd_only() -> None:
    wider = replace(OTHER, vocab=VOCAB + 1)
    with pytest.raises(InputError, match="student 11, teacher 12"):
        check_models(build_objective("kd", Settings(PAIRS)), OWN, wider)
    check_models(build_objective("mlm+hid-seq", Settings(PAIRS)), OWN, wider)


def test_widths_that_differ_are_refused_without_a_projection() -> None:
    objective = build_objective("hid-cls", Settings(PAIRS, projection="none"))
    with pytest.raises(InputError, match="student 12, teacher 15.*--projection none"):
        check_models(objective, OWN, OTHER)
    check_models(objective, OWN, OWN)
