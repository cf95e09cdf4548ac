"""What an entry of stored knowledge is: one teacher feature, or what a cut leaves of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.batches import Batch
from pretrain.features import Feature, Features


class Field(NamedTuple):
    """One array of a row's record: a NumPy type such as `<i2`, and its shape for one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry(ABC):
    """Turns a feature of a micro-batch into arrays of fixed size per row, and back.

    Attributes:
        feature: under which objectives find what `decode` gives.
    """

    feature: Feature

    @property
    def name(self) -> str:
        """For names of fields and for people: `hidden-12`."""
        return f"{self.feature.kind}-{self.feature.at}"

    @property
    def needed(self) -> frozenset[Feature]:
        """What the teacher must compute for it."""
        return frozenset({self.feature})

    @property
    def instead_of(self) -> frozenset[Feature]:
        """The features that objectives ask for and get this entry for."""
        if self.feature.kind == "logits":
            return frozenset({self.feature, Feature("predictions", self.feature.at)})
        return frozenset({self.feature})

    @abstractmethod
    def fields(self) -> list[Field]:
        """The arrays of a row; names begin with the entry's own."""

    @abstractmethod
    def encode(self, features: Features, batch: Batch) -> dict[str, NDArray[Any]]:
        """The arrays of a micro-batch by field name, each (B, *shape).

        Bytes must depend on the row alone: 0 wherever nothing counts.

        Raises:
            InputError: values that the precision cannot hold.
        """

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype) -> Any:
        """What objectives get: a tensor as the teacher would give it, or what is kept of it.

        Args:
            stored: the fields of the micro-batch, (B, *shape) each, on the device of `batch`.
            dtype: of the floating-point numbers in the result.
        """


def row_bytes(entries: "tuple[Entry, ...]") -> int:
    """Bytes of one row's record, before any compression."""
    return record_type(entries).itemsize


def record_type(entries: "tuple[Entry, ...]") -> np.dtype[Any]:
    """The NumPy type of one row's record: all fields behind one another, without gaps."""
    fields = [field for entry in entries for field in entry.fields()]
    return np.dtype([(field.name, field.dtype, field.shape) for field in fields])
