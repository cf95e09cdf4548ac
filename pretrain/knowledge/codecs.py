"""Numbers on disk: in which precision a feature's vectors are stored.

The 8-bit codecs keep a scale for every vector (the last dimension), so that a token of large
values costs the others nothing. A scale is a bfloat16: no feature is out of its range.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import InputError
from pretrain.knowledge.entries import Field

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
FP8 = torch.float8_e4m3fn


class Codec(ABC):
    """Turns a tensor of vectors (..., D) into fields and back; a field's rows are dimension 0."""

    @abstractmethod
    def fields(self, name: str, shape: tuple[int, ...]) -> list[Field]:
        """The arrays of one row whose vectors have this shape."""

    @abstractmethod
    def encode(self, name: str, values: Tensor) -> dict[str, NDArray[Any]]:
        """The arrays of a micro-batch (B, *shape), by field name.

        Raises:
            InputError: values that are not finite, or too large for the precision.
        """

    @abstractmethod
    def decode(self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The vectors (B, *shape) in `dtype`, on the device of what was stored."""


@dataclass(frozen=True)
class Plain(Codec):
    """Floating-point numbers as they are; NumPy knows no bfloat16, whose bits stand as integers."""

    precision: torch.dtype
    code: str

    def fields(self, name: str, shape: tuple[int, ...]) -> list[Field]:
        return [Field(name, self.code, shape)]

    def encode(self, name: str, values: Tensor) -> dict[str, NDArray[Any]]:
        _check_finite(name, values)
        rounded = values.to(self.precision).cpu().contiguous()
        if not rounded.isfinite().all():
            raise InputError(
                f"the teacher's {name} reaches {values.abs().max():.3g}, more than "
                f"{str(self.precision).removeprefix('torch.')} holds; use --dtype bf16, fp32 or "
                "int8"
            )
        return {name: _bits(rounded, self.precision)}

    def decode(self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return stored[name].view(self.precision).to(dtype)


@dataclass(frozen=True)
class Scaled(Codec):
    """One byte a number and a scale for every vector: its largest value is the largest byte."""

    precision: torch.dtype
    largest: float

    def fields(self, name: str, shape: tuple[int, ...]) -> list[Field]:
        code = "|i1" if self.precision == torch.int8 else "|u1"
        return [Field(name, code, shape), Field(f"{name}/scale", "<i2", shape[:-1])]

    def encode(self, name: str, values: Tensor) -> dict[str, NDArray[Any]]:
        _check_finite(name, values)
        values = values.float()
        scale = (values.abs().amax(dim=-1) / self.largest).to(torch.bfloat16)
        divisor = scale.float().masked_fill(scale == 0, 1)  # a vector of zeros
        scaled = (values / divisor[..., None]).clamp(-self.largest, self.largest)
        if self.precision == torch.int8:
            scaled = scaled.round()
        bytes_ = scaled.to(self.precision).cpu().contiguous()
        return {
            name: bytes_.view(torch.uint8).numpy() if self.precision == FP8 else bytes_.numpy(),
            f"{name}/scale": _bits(scale.cpu().contiguous(), torch.bfloat16),
        }

    def decode(self, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        values, scale = stored[name], stored[f"{name}/scale"].view(torch.bfloat16)
        if self.precision == FP8:
            values = values.view(FP8)
        return (values.float() * scale.float()[..., None]).to(dtype)


CODECS: dict[Precision, Codec] = {
    "fp32": Plain(torch.float32, "<f4"),
    "bf16": Plain(torch.bfloat16, "<i2"),
    "fp16": Plain(torch.float16, "<f2"),
    "int8": Scaled(torch.int8, 127.0),
    "fp8": Scaled(FP8, 448.0),
}


def get_codec(precision: Precision) -> Codec:
    """The codec of `--dtype`."""
    return CODECS[precision]


def _bits(values: Tensor, precision: torch.dtype) -> NDArray[Any]:
    array: NDArray[Any] = (
        values.view(torch.int16) if precision == torch.bfloat16 else values
    ).numpy()
    return array


def _check_finite(name: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise InputError(
            f"the teacher's {name} is not finite; run it in a wider precision (--ds_config), or "
            "check its weights"
        )
