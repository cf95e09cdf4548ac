"""The memory-lean forms of the losses equal the plain ones, in value and gradient."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pretrain.attention import plain_attention
from pretrain.encoder import encode
from pretrain.features import Predictions
from pretrain.objectives import LayerPair, Settings, build_objective, relation
from pretrain.objectives.base import LEAN_FROM
from pretrain.objectives.prediction import count_chunks
from pretrain.objectives.relation import (
    Sides,
    divergence,
    divergence_lean,
    squared_error,
    squared_error_lean,
)
from tests.pretrain.tiny import ragged_batch, tiny_encoder

FORMS = {"att-mse": (squared_error, squared_error_lean), "kl": (divergence, divergence_lean)}
RAGGED = (9, 4, 1)


def sides(seed: int, size: int, dtype: torch.dtype, heads: int = 3) -> Sides:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    shape = (len(RAGGED), heads, max(RAGGED), size)
    return Sides(*(draw(shape).to(dtype).requires_grad_() for _ in range(2)))


def valid_tokens() -> Tensor:
    return torch.arange(max(RAGGED)) < torch.tensor(RAGGED)[:, None]


@pytest.fixture
def seed() -> int:
    chosen = int.from_bytes(os.urandom(4), "little")
    print(f"seed {chosen}")
    return chosen


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Value and gradients of bfloat16 features: the gradients are themselves rounded to 8 bits.
    [(torch.float64, 1e-11), (torch.float32, 2e-5), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_lean_form_equals_the_plain_one(
    name: str, padded: bool, dtype: torch.dtype, tolerance: float, seed: int
) -> None:
    student, teacher = sides(seed, 4, dtype), sides(seed + 1, 6, dtype)
    valid = valid_tokens() if padded else torch.ones(len(RAGGED), max(RAGGED), dtype=torch.bool)
    values, gradients = [], []
    for form in FORMS[name]:
        value = form(student, teacher, valid)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        values.append(value)
        gradients.append(torch.autograd.grad(3 * value, student))
        assert all(g.dtype == dtype for g in gradients[-1])
    torch.testing.assert_close(*values, rtol=min(tolerance, 2e-5), atol=1e-9)
    for plain, lean in zip(*gradients, strict=True):
        torch.testing.assert_close(lean, plain, rtol=tolerance, atol=tolerance)


def test_squared_error_of_a_whole_micro_batch_is_summed_to_float32s_precision(seed: int) -> None:
    """6 million differences: adding them up one by one in float32 would be off by 4e-4."""
    torch.manual_seed(seed)
    exact = [torch.randn(32, 12, 128, 8, dtype=torch.float64) for _ in range(4)]
    single = [side.float() for side in exact]
    expected = squared_error(Sides(*exact[:2]), Sides(*exact[2:]), None)
    found = squared_error(Sides(*single[:2]), Sides(*single[2:]), None)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 40, 100, 10**6])
def test_divergence_does_not_depend_on_the_chunk(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = sides(1, 4, torch.float64), sides(2, 6, torch.float64)
    expected = torch.autograd.grad(divergence(student, teacher, valid_tokens()), student)
    monkeypatch.setitem(relation.CHUNKS, "cpu", chunk)
    found = torch.autograd.grad(divergence_lean(student, teacher, valid_tokens()), student)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("same", [False, True], ids=["two sides", "one side twice"])
def test_gradient_of_the_streamed_divergence_is_the_numerical_one(same: bool) -> None:
    """`same`: a value relation, whose two sides are one tensor."""
    student, teacher = sides(3, 2, torch.float64, heads=2), sides(4, 3, torch.float64, heads=2)
    left, right = student

    def loss(*inputs: Tensor) -> Tensor:
        return divergence_lean(Sides(inputs[0], inputs[-1]), teacher, valid_tokens())

    assert torch.autograd.gradcheck(loss, (left,) if same else (left, right))


@pytest.mark.parametrize("wider", [0, 16], ids=["heads of one size", "wider heads"])
def test_squared_error_survives_a_student_that_is_almost_the_teacher(wider: int) -> None:
    """Where float32 products would leave few right digits: the scores differ by about 1e-3."""
    teacher = sides(5, 64, torch.float32)
    near = [side.detach() + 1e-3 * torch.randn_like(side) / 8 for side in teacher]
    if wider:  # the same scores from wider heads
        near = [functional.pad(side, (0, wider)) for side in near]
        near[0] = near[0] * ((64 + wider) / 64) ** 0.5
    student = Sides(*(side.requires_grad_() for side in near))
    exact = squared_error(
        Sides(*(s.double() for s in student)), Sides(*(t.double() for t in teacher)), None
    )
    lean = squared_error_lean(student, teacher, None)
    assert exact < 1e-2
    torch.testing.assert_close(lean.double(), exact, rtol=3e-6, atol=0)
    gradients = torch.autograd.grad(lean, student)
    wanted = torch.autograd.grad(exact, student)
    for one, two in zip(gradients, wanted, strict=True):
        assert float((one - two).norm() / two.norm()) < 1e-5


def test_no_graph_no_gradient_work() -> None:
    student, teacher = sides(6, 4, torch.float32), sides(7, 4, torch.float32)
    with torch.no_grad():
        value = divergence_lean(student, teacher, valid_tokens())
    assert not value.requires_grad
    torch.testing.assert_close(value, divergence(student, teacher, valid_tokens()))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
@pytest.mark.parametrize("positions", ["masked", "all"])
def test_chunked_kd_equals_the_plain_one(family: str, positions: str) -> None:
    """Value, and the gradient of every parameter of the student, its head's included."""
    student, teacher = tiny_encoder(family, 1), tiny_encoder(family, 2)
    pad = 1 if family == "roberta" else 0
    batch = ragged_batch((9, 4, 6), pad=pad, seed=3)
    values, gradients = [], []
    for chunks in (0, 1, 3, 50):  # 50 are more than there are positions
        settings = Settings((LayerPair(1, 1),), 2.0, positions, logit_chunks=chunks)  # type: ignore[arg-type]
        objective = build_objective("kd", settings)
        with torch.inference_mode():
            theirs = encode(teacher.model, batch, objective.teacher_features(), plain_attention)
        ours = encode(student.model, batch, objective.student_features(), plain_attention)
        assert all(isinstance(value, Predictions) == bool(chunks) for value in ours.values())
        value = objective.totals(ours, theirs, batch, {}).sum()
        values.append(value)
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(value, parameters, allow_unused=True))
    for value, found in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(value, values[0], rtol=1e-12, atol=0)
        for one, two in zip(found, gradients[0], strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_chunked_kd_without_masked_positions_costs_nothing() -> None:
    objective = build_objective("kd", Settings((LayerPair(1, 1),), logit_chunks=3))
    student = tiny_encoder("bert", 1)
    batch = ragged_batch((5, 3), probability=0.0)
    wanted = objective.student_features()
    features = encode(student.model, batch, wanted, plain_attention)
    assert objective.totals(features, features, batch, {}).tolist() == [0.0]


def test_auto_takes_the_lean_form_for_long_rows_and_large_logits() -> None:
    settings = Settings(())
    assert not settings.lean(LEAN_FROM - 1) and settings.lean(LEAN_FROM)
    assert replace(settings, form="lean").lean(8)
    assert not replace(settings, form="plain").lean(8192)
    assert count_chunks("auto", 1024 * 30522) == 0 and count_chunks("auto", 8192 * 30522) == 8
    assert count_chunks("lean", 1) == 1 and count_chunks("plain", 1e12) == 0
