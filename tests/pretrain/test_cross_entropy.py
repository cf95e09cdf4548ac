"""Cross-entropies in blocks equal the forms written out, in value and gradient."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pretrain.batches import NO_LABEL
from pretrain.objectives import cross_entropy
from pretrain.objectives.cross_entropy import HardCrossEntropy, SoftCrossEntropy

POSITIONS, VOCAB = 11, 37


@pytest.fixture(autouse=True)
def fresh_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = int.from_bytes(os.urandom(4), "little")
    print(f"seed {chosen}")
    torch.manual_seed(chosen)
    monkeypatch.setattr(cross_entropy, "_BLOCK", 3 * VOCAB)  # blocks of 3, 3, 3 and 2 positions


def logits(dtype: torch.dtype) -> Tensor:
    return (3 * torch.randn(POSITIONS, VOCAB, dtype=torch.float64)).to(dtype)


PRECISIONS = [
    (torch.float64, 1e-12),
    (torch.float32, 2e-6),
    (torch.bfloat16, 1e-2),
    (torch.float16, 2e-3),
]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("partly", [False, True])
def test_soft_cross_entropy(partly: bool, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = logits(dtype).requires_grad_(), logits(dtype)
    used = torch.arange(POSITIONS) % 4 != 1 if partly else None
    value = SoftCrossEntropy.apply(student, teacher, 1.7, used)
    (gradient,) = torch.autograd.grad(value, student, torch.tensor(0.3, dtype=value.dtype))
    exact = student.detach().double().requires_grad_()
    target, logs = (teacher.double() / 1.7).softmax(-1), (exact / 1.7).log_softmax(-1)
    rows = -(target * logs).sum(-1) * 1.7**2
    expected = rows.sum() if used is None else rows[used].sum()
    (wanted,) = torch.autograd.grad(0.3 * expected, exact)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=min(tolerance, 1e-5), atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance * 1e-2)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_hard_cross_entropy(dtype: torch.dtype, tolerance: float) -> None:
    student = logits(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (POSITIONS,))
    labels[[2, 9, 10]] = NO_LABEL
    value = HardCrossEntropy.apply(student, labels)
    (gradient,) = torch.autograd.grad(value, student)
    exact = student.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact, labels, reduction="sum", ignore_index=NO_LABEL)
    (wanted,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=min(tolerance, 1e-5), atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=tolerance, atol=tolerance * 1e-2)


def test_a_small_slope_survives_float16_and_its_loss_scale() -> None:
    student = torch.zeros(1, 4, dtype=torch.float16, requires_grad=True)
    teacher = torch.tensor([[1e-3, 0, 0, 0]], dtype=torch.float16)
    scale = torch.tensor(1e-4 * 2**16)  # of the loss, over a count of tokens
    (gradient,) = torch.autograd.grad(
        SoftCrossEntropy.apply(student, teacher, 1.0, None), student, scale
    )
    target = teacher.double().softmax(-1)
    torch.testing.assert_close(gradient.double(), (0.25 - target) * float(scale), rtol=2e-2, atol=0)


def test_nothing_is_kept_without_a_gradient() -> None:
    with torch.no_grad():
        value = SoftCrossEntropy.apply(logits(torch.float32), logits(torch.float32), 1.0, None)
    assert not value.requires_grad
