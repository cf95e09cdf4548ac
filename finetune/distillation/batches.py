"""A task's tokenised rows -> padded batches of like lengths, in an order that the seed decides."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers.trainer_pt_utils import get_length_grouped_indices

from pretrain.batches import Batch
from pretrain.masking import hash64


@dataclass(frozen=True)
class TaskRows:
    """One split.

    Attributes:
        ids: token ids of every row, int64 (L_row,). types: its token types, or None.
        labels: int64 or float32 (rows,). pad_id: what fills the rows of a batch up.
    """

    ids: Sequence[NDArray[np.int64]]
    types: Sequence[NDArray[np.int64]] | None
    labels: Tensor
    pad_id: int

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        return [len(row) for row in self.ids]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows, padded to their longest; nothing is masked."""
        lengths = np.array([self.lengths[row] for row in rows])
        valid = np.arange(lengths.max()) < lengths[:, None]
        full, nothing = bool(valid.all()), torch.zeros(0, dtype=torch.int64)
        return Batch(
            input_ids=_padded([self.ids[row] for row in rows], valid, self.pad_id),
            valid=torch.from_numpy(valid),
            masked=nothing,
            labels=nothing,
            full=full,
            counts={
                "sequences": len(rows),
                "tokens": int(lengths.sum()),
                "pairs": int((lengths**2).sum()),
                "masked": 0,
            },
            positions=nothing if full else torch.from_numpy(np.flatnonzero(valid)),
            token_type_ids=(
                None if self.types is None else _padded([self.types[row] for row in rows], valid, 0)
            ),
        )

    def shuffled(self, size: int, seed: int, stage: int, epoch: int) -> Iterator[list[int]]:
        """The rows of an epoch's batches: a pure function of the arguments.

        As the library's Trainer groups them: shuffled, then sorted by length within pieces of 50
        batches, the longest batch of all first, so that what does not fit in memory fails at once.
        """
        generator = torch.Generator()
        generator.manual_seed(int(hash64(seed, stage, epoch)[0]) >> 1)
        order = get_length_grouped_indices(self.lengths, size, generator=generator)
        return (order[first : first + size] for first in range(0, len(order), size))

    def by_length(self, size: int) -> list[list[int]]:
        """All rows once, the longest first."""
        order = sorted(range(len(self.lengths)), key=lambda row: (-self.lengths[row], row))
        return [order[first : first + size] for first in range(0, len(order), size)]

    @property
    def sha256(self) -> str:
        """Of all token ids and types, and where rows end."""
        digest = hashlib.sha256(np.array(self.lengths).tobytes())
        for row in [*self.ids, *(self.types or [])]:
            digest.update(row.tobytes())
        return digest.hexdigest()


def _padded(rows: Sequence[NDArray[np.int64]], valid: NDArray[np.bool_], fill: int) -> Tensor:
    padded = np.full(valid.shape, fill, np.int64)
    padded[valid] = np.concatenate(rows)
    return torch.from_numpy(padded)


def task_rows(encoded: Dataset, pad_id: int, regression: bool) -> TaskRows:
    """The rows of a tokenised split (`finetune.classifier.encode`)."""
    types = "token_type_ids" in encoded.column_names
    return TaskRows(
        ids=_arrays(encoded, "input_ids"),
        types=_arrays(encoded, "token_type_ids") if types else None,
        labels=torch.tensor(
            list(encoded["labels"]), dtype=torch.float32 if regression else torch.int64
        ),
        pad_id=pad_id,
    )


def _arrays(encoded: Dataset, column: str) -> list[NDArray[np.int64]]:
    return [np.array(row, np.int64) for row in encoded[column]]
