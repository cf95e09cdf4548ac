"""Dropout from a bit stream: the right rate and scale, and a pure function of the seed."""

import math

import pytest
import torch
from torch import Tensor, nn

from pretrain import dropout
from pretrain.dropout import Dropout, drop, keep, replace_dropout
from tests.pretrain.tiny import tiny_encoder

ELEMENTS = 300_001  # over two blocks, and no multiple of the four draws of a word


def masks(probability: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(seed)
    return drop(torch.ones(ELEMENTS, dtype=dtype), probability)[1]


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_asked_for(probability: float) -> None:
    dropped = ELEMENTS - int(masks(probability, 3).sum())
    error = 5 * math.sqrt(ELEMENTS * probability * (1 - probability))
    assert abs(dropped - ELEMENTS * probability) < error + ELEMENTS * 2**-17


@pytest.mark.parametrize("probability", [0.1, 0.3])
def test_what_stays_is_scaled_to_the_same_expected_value(probability: float) -> None:
    _, _, scale = drop(torch.ones(8), probability)
    assert scale == pytest.approx(1 / (1 - probability), rel=2e-5)


def test_neighbours_are_dropped_independently() -> None:
    kept = masks(0.3, 5).double() - 0.7
    for distance in (1, 2, 3, 4, 128, dropout._BLOCK):
        correlation = float((kept[:-distance] * kept[distance:]).mean()) / 0.21
        assert abs(correlation) < 5 / math.sqrt(ELEMENTS)


def test_a_mask_is_a_function_of_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = masks(0.1, 7)
    assert torch.equal(first, masks(0.1, 7, torch.bfloat16))
    assert not torch.equal(first, masks(0.1, 8))
    monkeypatch.setattr(dropout, "_BLOCK", 2**12)
    assert torch.equal(first, masks(0.1, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_the_mask_times_the_scale(dtype: torch.dtype) -> None:
    layer = Dropout(0.25)
    x = torch.randn(6, 5, 7, dtype=dtype).transpose(0, 1).requires_grad_()
    torch.manual_seed(1)
    kept = drop(torch.empty(x.shape, dtype=dtype), 0.25)[1]
    torch.manual_seed(1)
    value = layer(x)
    expected = x.detach().double() * kept / 0.75
    close = {"rtol": 1e-2 if dtype == torch.bfloat16 else 3e-5, "atol": 0.0}
    torch.testing.assert_close(value.double(), expected, **close)
    weights = torch.randn(x.shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(value, x, weights)
    torch.testing.assert_close(gradient.double(), weights.double() * kept / 0.75, **close)
    torch.testing.assert_close(keep(weights, kept), weights * kept)


def test_bfloat16_gradients_are_scaled_as_the_values_are() -> None:
    x = (1 + torch.rand(200_000)).bfloat16().requires_grad_()
    value = Dropout(0.1)(x)
    (gradient,) = torch.autograd.grad(value, x, x.detach())
    kept = value != 0
    ratio = gradient[kept].double().mean() / value[kept].detach().double().mean()
    assert float(ratio) == pytest.approx(1, abs=1e-5)


def test_nothing_is_dropped_in_evaluation_or_at_probability_zero() -> None:
    x = torch.randn(4, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_every_dropout_of_a_model_is_replaced_and_nothing_else_changes() -> None:
    model = tiny_encoder("bert", 8).model
    names, probabilities = (
        list(model.state_dict()),
        [module.p for module in model.modules() if type(module) is nn.Dropout],
    )
    replace_dropout(model)
    assert list(model.state_dict()) == names
    assert [m.p for m in model.modules() if type(m) is Dropout] == probabilities
    assert not any(type(module) is nn.Dropout for module in model.modules())
