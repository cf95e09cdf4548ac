"""The two stages' losses against float64 loops over the library's own forward pass."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune.classifier import Classifier
from finetune.distillation.batches import TaskRows
from finetune.distillation.lessons import Intermediate, Prediction, label_loss
from finetune.distillation.models import Computing, LiveTeacher, cut_student, plan_student
from finetune.distillation.settings import RecipeSettings
from finetune.distillation.stages import Pace, train_stage
from pretrain.features import Feature
from pretrain.models import shape_of
from pretrain.objectives import Settings, build_objective
from pretrain.objectives.base import LayerPair
from tests import reference
from tests.finetune.distilled import tiny_classifier

EXACTLY = Computing(torch.device("cpu"), torch.float64)
LENGTHS = (9, 4, 7)
PAIRS = (LayerPair(1, 2), LayerPair(2, 4), LayerPair(3, 6))


def ragged(pad: int, types: bool, labels: Sequence[float] = (0, 1, 2)) -> TaskRows:
    """Rows of `LENGTHS` tokens, the second half of each of the second type."""
    random = np.random.default_rng(0)
    return TaskRows(
        ids=[random.integers(5, 300, length) for length in LENGTHS],
        types=[np.arange(n) * 2 // n for n in LENGTHS] if types else None,
        labels=torch.tensor(labels),
        pad_id=pad,
    )


def models(family: str, labels: int = 3) -> tuple[Any, Any, TaskRows]:
    """A student of three layers that is not the teacher, the teacher, and rows, in float64."""
    teacher, tokenizer = tiny_classifier(family, labels)
    student, _ = tiny_classifier(family, labels, layers=3, seed=1)
    rows = ragged(tokenizer.pad_token_id, types=family != "roberta")
    return student.double(), teacher.double(), rows


def whole(model: Any, rows: TaskRows, numbers: Sequence[int] = range(len(LENGTHS))) -> Any:
    """The library's own forward pass of some rows, its hidden states among its outputs."""
    batch = rows.batch(numbers)
    types = {} if rows.types is None else {"token_type_ids": batch.token_type_ids}
    return model(batch.input_ids, batch.valid.long(), output_hidden_states=True, **types)


def projected(model: Any, kind: str, hidden: Sequence[Tensor], layer: int) -> Tensor:
    """Query, key or value (B, H, L, d) of a layer from the hidden states below it."""
    own = model.base_model.encoder.layer[layer - 1].attention.self
    heads = getattr(own, kind)(hidden[layer - 1]).unflatten(-1, (own.num_attention_heads, -1))
    return heads.transpose(1, 2)


def intermediate(student: Any, teacher: Any, objective: str) -> Intermediate:
    """Stage 1 of `PAIRS`."""
    terms = build_objective(objective, Settings(PAIRS))
    maps = terms.projections(shape_of(student.config), shape_of(teacher.config))
    return Intermediate(student, LiveTeacher(teacher, EXACTLY), EXACTLY, terms, maps)


def mean_loss(lesson: Any, rows: TaskRows) -> Tensor:
    """The stage's loss of all rows in one batch."""
    batch, numbers = rows.batch(range(len(LENGTHS))), list(range(len(LENGTHS)))
    counts = torch.tensor(lesson.counts(batch), dtype=torch.float64)
    return (lesson(batch, numbers) / counts).sum()


def same_with_gradients(loss: Tensor, expected: Tensor, student: Any) -> None:
    """Both losses, and their gradients to every weight of the student, are equal."""
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    weights = list(student.parameters())
    ours = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, weights, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert any(gradient.abs().max() > 1e-6 for gradient in ours)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_stage_1_of_att_mse_equals_a_loop_over_heads_and_tokens(family: str) -> None:
    student, teacher, rows = models(family)
    loss = mean_loss(intermediate(student, teacher, "att-mse"), rows)
    with torch.no_grad():
        theirs = whole(teacher, rows).hidden_states
    ours = whole(student, rows).hidden_states
    expected = sum(
        reference.att_mse(
            (projected(student, "query", ours, own), projected(student, "key", ours, own)),
            (
                projected(teacher, "query", theirs, other).detach(),
                projected(teacher, "key", theirs, other).detach(),
            ),
            LENGTHS,
        )
        for own, other in PAIRS
    )
    same_with_gradients(loss, expected, student)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_stage_1_of_hid_seq_equals_a_loop_over_tokens(family: str) -> None:
    student, teacher, rows = models(family)
    loss = mean_loss(intermediate(student, teacher, "hid-seq"), rows)
    with torch.no_grad():
        theirs = whole(teacher, rows).hidden_states
    ours = whole(student, rows).hidden_states
    expected = sum(reference.hid_seq(ours[own], theirs[other], LENGTHS) for own, other in PAIRS)
    same_with_gradients(loss, expected, student)


def by_loops(objective: str, student: Any, teacher: Any, ours: Any, theirs: Any) -> Tensor:
    """A term of stage 1 as sums over sequences, heads and tokens; hidden states by layer."""
    loops = {
        "att-kl": lambda own, other: reference.att_kl(own[:2], other[:2], LENGTHS),
        "val-kl": lambda own, other: reference.val_kl(own[2], other[2], LENGTHS),
        "hid-cls": lambda own, other: reference.hid_cls(own[3], other[3]),
    }

    def features(model: Any, hidden: Any, layer: int) -> tuple[Tensor, ...]:
        parts = (projected(model, kind, hidden, layer) for kind in ("query", "key", "value"))
        return (*parts, hidden[layer])

    layers = [
        (features(student, ours, one.student), features(teacher, theirs, one.teacher))
        for one in PAIRS
    ]
    return torch.stack([loops[objective](*pair) for pair in layers]).sum()


@pytest.mark.parametrize("objective", ["0.5*att-kl+2*hid-cls", "val-kl"])
def test_stage_1_of_the_papers_other_objectives_equals_loops(objective: str) -> None:
    student, teacher, rows = models("bert")
    lesson = intermediate(student, teacher.requires_grad_(False), objective)
    batch, numbers = rows.batch(range(len(LENGTHS))), [*range(len(LENGTHS))]
    weights = torch.tensor(lesson.weights(0.0), dtype=torch.float64)
    counts = torch.tensor(lesson.counts(batch), dtype=torch.float64)
    loss = (lesson(batch, numbers) * weights / counts).sum()
    ours, theirs = whole(student, rows).hidden_states, whole(teacher, rows).hidden_states
    expected = torch.zeros((), dtype=torch.float64)
    for part in objective.split("+"):
        weight, _, name = part.rpartition("*")
        expected = expected + float(weight or 1) * by_loops(name, student, teacher, ours, theirs)
    same_with_gradients(loss, expected, student)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_stage_2_equals_the_soft_cross_entropy_of_the_librarys_logits(
    family: str, temperature: float
) -> None:
    student, teacher, rows = models(family)
    lesson = Prediction(student, LiveTeacher(teacher, EXACTLY), EXACTLY, temperature, False)
    with torch.no_grad():
        target = whole(teacher, rows).logits
    expected = reference.kd(whole(student, rows).logits, target, temperature)
    same_with_gradients(mean_loss(lesson, rows), expected, student)


def test_stage_2_of_a_regression_is_the_squared_difference_of_the_outputs() -> None:
    student, teacher, rows = models("bert", labels=1)
    lesson = Prediction(student, LiveTeacher(teacher, EXACTLY), EXACTLY, 1.0, True)
    with torch.no_grad():
        target = whole(teacher, rows).logits[:, 0]
    ours = whole(student, rows).logits[:, 0]
    expected = sum((ours[i] - target[i]) ** 2 for i in range(3)) / 3
    same_with_gradients(mean_loss(lesson, rows), expected, student)


def test_vanilla_kd_adds_the_cross_entropy_with_the_true_labels() -> None:
    student, teacher, rows = models("bert")
    source = LiveTeacher(teacher, EXACTLY)
    lesson = Prediction(student, source, EXACTLY, 1.0, False, rows.labels)
    with torch.no_grad():
        target = whole(teacher, rows).logits
    ours = whole(student, rows).logits
    expected = reference.kd(ours, target) + reference.mlm(ours, rows.labels)
    same_with_gradients(mean_loss(lesson, rows), expected, student)


def test_label_loss_of_numbers_is_a_sum_of_squares() -> None:
    total = label_loss(torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 5.0]), True)
    assert total.item() == 0.25 + 4.0


def test_token_types_reach_the_encoder() -> None:
    student, _, rows = models("bert")
    batch, layer = rows.batch(range(3)), Feature("hidden", 3)
    ours = EXACTLY.encode(student, batch, {layer})[layer]
    with torch.no_grad():
        theirs = whole(student, rows).hidden_states[3]
    torch.testing.assert_close(ours[batch.valid], theirs[batch.valid], rtol=1e-9, atol=1e-10)
    plain = TaskRows(rows.ids, None, rows.labels, rows.pad_id).batch(range(3))
    without = EXACTLY.encode(student, plain, {layer})[layer]
    assert (ours - without)[batch.valid].abs().max() > 0.1


def test_an_update_does_not_depend_on_how_its_batch_is_cut() -> None:
    weights = []
    for accumulation in (1, 3):
        student, teacher, rows = models("bert")
        pace = Pace(1, 1e-3, 3, accumulation, 0.0, 0.1, seed=0)
        train_stage(
            intermediate(student, teacher, "att-mse+hid-seq"), rows, pace, 0, list().append, _on
        )
        weights.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-9)


def adamw(weights: list[Tensor], losses: Iterable[Tensor], rates: Sequence[float]) -> None:
    """Loshchilov and Hutter's algorithm 2 with RoBERTa's constants, one update for each loss."""
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step, (loss, rate) in enumerate(zip(losses, rates, strict=True), start=1):
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for weight, gradient, (first, second) in zip(weights, gradients, moments, strict=True):
            if gradient is None:  # a part that the loss does not reach is not decayed either
                continue
            first += (1 - 0.9) * (gradient - first)
            second += (1 - 0.98) * (gradient**2 - second)
            change = first / (1 - 0.9**step) / (torch.sqrt(second / (1 - 0.98**step)) + 1e-6)
            decay = 0.1 * weight.detach() if weight.ndim > 1 else 0
            weight.data -= rate * (change + decay)


@pytest.mark.parametrize("stage", ["intermediate", "prediction", "regression"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_epoch_is_adamw_on_means_over_each_batch_the_last_partial_one_too(
    stage: str, accumulation: int
) -> None:
    trained, teacher, rows = models("bert", labels=1 if stage == "regression" else 3)
    plain = copy.deepcopy(trained)
    source = LiveTeacher(teacher, EXACTLY)
    lesson: Any = intermediate(trained, teacher, "hid-seq")
    if stage != "intermediate":
        lesson = Prediction(trained, source, EXACTLY, 2.0, stage == "regression")
    pace = Pace(2, 1e-2, 2, accumulation, 0.5, 0.1, seed=0)
    batches = [numbers for e in (1, 2) for numbers in rows.shuffled(2, 0, lesson.number, e)]
    assert [len(numbers) for numbers in batches] == [2, 1, 2, 1]

    def losses() -> Iterator[Tensor]:
        for numbers in batches:  # each computed with the weights that the one before left
            own, other = whole(plain, rows, numbers), whole(teacher, rows, numbers)
            lengths = [LENGTHS[number] for number in numbers]
            if stage == "intermediate":
                pairs = [(own.hidden_states[s], other.hidden_states[t]) for s, t in PAIRS]
                yield sum((reference.hid_seq(s, t, lengths) for s, t in pairs), torch.tensor(0.0))
            elif stage == "prediction":
                yield reference.kd(own.logits, other.logits, 2.0)
            else:
                yield sum((own.logits - other.logits) ** 2).squeeze() / len(numbers)

    result = train_stage(lesson, rows, pace, 0, list().append, _on)
    rates = [1e-2 * share for share in (0.4, 0.8, 0.8, 0.4)]  # up to 1/2 of 5 places, then down
    adamw(list(plain.parameters()), losses(), rates)
    torch.testing.assert_close(trained.state_dict(), plain.state_dict(), rtol=0, atol=1e-7)
    assert result.steps == 4


def _on(epoch: int, step: int) -> bool:
    return True


def test_the_order_of_rows_is_a_function_of_seed_stage_and_epoch() -> None:
    rows = TaskRows([np.ones(1 + i % 9, np.int64) for i in range(100)], None, torch.zeros(100), 0)
    order = [*rows.shuffled(8, seed=3, stage=1, epoch=2)]
    assert order == [*rows.shuffled(8, seed=3, stage=1, epoch=2)]
    assert sorted(sum(order, [])) == list(range(100))
    for other in ((4, 1, 2), (3, 2, 2), (3, 1, 3)):
        assert order != [*rows.shuffled(8, *other)]


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_a_cut_student_is_the_teacher_with_the_chosen_layers(family: str) -> None:
    model, tokenizer = tiny_classifier(family)
    plan = plan_student(RecipeSettings(init="1,4,6"), 6)
    student = cut_student(Classifier(model, tokenizer, ()), plan, seed=0).model
    ours, theirs = student.state_dict(), model.state_dict()
    prefix = f"{family}.encoder.layer."
    for name, weights in ours.items():
        if name.startswith(prefix):
            own, _, part = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{(0, 3, 5)[int(own)]}.{part}"
        assert torch.equal(weights, theirs[name]), name
    assert student.config.num_hidden_layers == 3


def test_random_layers_are_the_seeds_and_all_else_is_the_teachers() -> None:
    model, tokenizer = tiny_classifier("bert")
    teacher = Classifier(model, tokenizer, ())
    plan = plan_student(RecipeSettings(init="random"), 6)
    first, again, other = (cut_student(teacher, plan, seed).model for seed in (1, 1, 2))
    layer = "bert.encoder.layer.0.attention.self.query.weight"
    word, head = "bert.embeddings.word_embeddings.weight", "classifier.weight"
    assert torch.equal(first.state_dict()[layer], again.state_dict()[layer])
    assert not torch.equal(first.state_dict()[layer], other.state_dict()[layer])
    for name in (word, head):
        assert torch.equal(first.state_dict()[name], model.state_dict()[name])
