"""Precisions on disk: what comes back, by their definition, and what is refused."""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from potstill.errors import InputError
from pretrain.knowledge.codecs import CODECS, Precision, get_codec
from pretrain.knowledge.entries import Field
from tests import reference

PRECISIONS = tuple(CODECS)
SCALED: tuple[Precision, ...] = ("int8", "fp8")
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0}


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    chosen = int.from_bytes(os.urandom(4), "little")
    print(f"seed {chosen}")
    torch.manual_seed(chosen)


def vectors(*shape: int) -> Tensor:
    """Random vectors of very different lengths, some with one value far above all others."""
    values = torch.randn(*shape) * 10 ** (4 * torch.rand(*shape[:-1], 1) - 2)
    values[..., 0] *= 1 + 50 * (torch.rand(shape[:-1]) < 0.3)
    return values


def there_and_back(precision: Precision, values: Tensor, dtype: torch.dtype) -> Tensor:
    codec = get_codec(precision)
    arrays = codec.encode("x", values)
    fields = {field.name: field for field in codec.fields("x", tuple(values.shape[1:]))}
    assert arrays.keys() == fields.keys()
    for name, array in arrays.items():
        assert array.shape == (len(values), *fields[name].shape)
        assert array.dtype == np.dtype(fields[name].dtype)
    return codec.decode("x", {n: torch.from_numpy(a) for n, a in arrays.items()}, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 4, 3, 7), (1, 1, 1)])
def test_every_number_comes_back_within_the_bound_of_its_precision(
    precision: Precision, shape: tuple[int, ...]
) -> None:
    values = vectors(*shape)
    found = there_and_back(precision, values, torch.float32)
    assert found.shape == values.shape
    shares = []  # of its bound that each number is off by
    for vector, back in zip(values.double().flatten(0, -2), found.flatten(0, -2), strict=True):
        largest = vector.abs().max().item()
        for number, other in zip(vector.tolist(), back.tolist(), strict=True):
            bound = reference.codec_bound(number, largest, precision)
            shares.append(abs(other - number) / (bound + 1e-6 * abs(number)))
    assert max(shares) <= (0 if precision == "fp32" else 1)
    if len(shares) > 100 and precision != "fp32":
        assert max(shares) > 0.8, "the bound is far from what happens"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_vectors_error_does_not_depend_on_its_neighbours(precision: Precision) -> None:
    values = vectors(4, 6, 16)
    alone = torch.cat(
        [there_and_back(precision, values[i : i + 1], torch.float32) for i in range(4)]
    )
    assert torch.equal(there_and_back(precision, values, torch.float32), alone)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros_beside_other_vectors(precision: Precision) -> None:
    values = vectors(2, 3, 8)
    values[1, 2] = 0
    found = there_and_back(precision, values, torch.float32)
    assert (found[1, 2] == 0).all() and (found[0] != 0).any()


@pytest.mark.parametrize("precision", SCALED)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_huge_and_tiny_vectors_keep_their_relative_error(precision: Precision, size: float) -> None:
    values = torch.randn(3, 4, 32) * size
    found = there_and_back(precision, values, torch.float32).double()
    largest = values.double().abs().amax(-1, keepdim=True)
    assert ((found - values.double()).abs() / largest).max() < (
        0.01 if precision == "int8" else 0.07
    )


@pytest.mark.parametrize("precision", SCALED)
def test_the_largest_values_that_exist_come_back_finite(precision: Precision) -> None:
    values = torch.full((1, 2, 4), torch.finfo(torch.float32).max)
    values[0, 1] *= -1
    found = there_and_back(precision, values, torch.float32)
    assert found.isfinite().all()
    assert ((found.double() - values.double()).abs() <= 0.01 * values.double().abs()).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_bf16_teacher_gives_is_stored_exactly(precision: Precision) -> None:
    values = vectors(2, 3, 8).bfloat16()
    found = there_and_back(precision, values, torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, values)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(precision: Precision, bad: float) -> None:
    values = vectors(2, 3, 8)
    values[1, 2, 3] = bad
    with pytest.raises(InputError, match="^the teacher's hidden-3 is not finite; .*--ds_config"):
        get_codec(precision).encode("hidden-3", values)


def test_what_fp16_cannot_hold_is_refused_with_the_value_and_the_remedy() -> None:
    values = torch.tensor([[[1.0, -65520.0]]])
    with pytest.raises(InputError, match=r"hidden-3 reaches 6.55e\+04, .*--dtype bf16"):
        get_codec("fp16").encode("hidden-3", values)
    assert there_and_back("fp16", values.clamp(-65504), torch.float32)[0, 0, 1] == -65504


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_vector_costs_its_numbers_and_two_bytes_of_scale(precision: Precision) -> None:
    fields: list[Field] = get_codec(precision).fields("x", (5, 32))
    size = sum(np.dtype((field.dtype, field.shape)).itemsize for field in fields)
    assert size == 5 * (32 * BYTES[precision] + (2 if precision in SCALED else 0))
