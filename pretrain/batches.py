"""Rows of shards -> masked batches, in an order that any rank can compute for any step.

The run's sample number n (0, 1, 2, …, over all steps) stands for row `order(n)` in epoch
`n // rows`. Global step s takes samples `s * B … (s + 1) * B - 1`; ranks and micro-batches take
slices of them. So the order survives a change of world size, and a resumed run just starts at a
later step.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.shard_format import ShardReader
from pretrain.masking import Masking, hash64

VALIDATION_EPOCH = 2**32  # no training epoch: validation masks are their own, and always the same


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        input_ids: int64 (B, L), masked; both models see it.
        valid: bool (B, L), True = real token.
        masked: int64 (P,), positions of chosen tokens in the flattened (B*L) batch.
        labels: int64 (P,), the original tokens there.
        full: no padding at all, so that no attention mask is needed.
        counts: how many `sequences`, `tokens` (valid), `pairs` (valid query, valid key) and
            `masked` positions the batch holds; what objectives divide by.
    """

    input_ids: Tensor
    valid: Tensor
    masked: Tensor
    labels: Tensor
    full: bool
    counts: Mapping[str, int]

    def _map(self, act: str, *args: object, **kwargs: object) -> "Batch":
        tensors = {
            f.name: getattr(getattr(self, f.name), act)(*args, **kwargs)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; called by the DataLoader."""
        return self._map("pin_memory")

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting."""
        return self._map("to", device, non_blocking=True)


def make_batch(
    ids: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rows: NDArray[np.int64],
    masking: Masking,
    pad_id: int,
) -> Batch:
    """Mask rows (B, L) and count what is in them; padding stands only at the end of a row."""
    valid = ids != pad_id
    seen, chosen = masking(ids, epochs, rows)
    lengths = valid.sum(axis=1).astype(np.int64)
    counts = {
        "sequences": len(ids),
        "tokens": int(lengths.sum()),
        "pairs": int((lengths**2).sum()),
        "masked": int(chosen.sum()),
    }
    positions = np.flatnonzero(chosen)
    return Batch(
        input_ids=torch.from_numpy(np.ascontiguousarray(seen)),
        valid=torch.from_numpy(valid),
        masked=torch.from_numpy(positions),
        labels=torch.from_numpy(ids.reshape(-1)[positions]),
        full=bool(valid.all()),
        counts=counts,
    )


def shuffled(
    samples: NDArray[np.int64], rows: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epoch and row of each sample number: a fresh permutation of all rows in every epoch.

    A four-round Feistel network over the next even power of two, walked until it lands within
    `rows`: O(1) memory and time to any step, whatever the size of the data.

    Args:
        samples: int64 (n,). rows: number of rows of the split. seed: of the run.

    Returns:
        epochs, rows: int64 (n,) each.
    """
    epochs, position = np.divmod(samples, rows)
    half = max((int(rows - 1).bit_length() + 1) // 2, 1)
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = position.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & low
        for round_number in range(4):
            mixed = hash64(seed, epochs[outside].astype(np.uint64), round_number, right)
            left, right = right, left ^ (mixed & low)
        value[outside] = (left << shift) | right
        outside = value >= rows
    return epochs, value.astype(np.int64)


@dataclass(frozen=True)
class Slices:
    """Which samples a rank takes: global batch = accumulation x ranks x micro-batch."""

    micro_batch: int
    accumulation: int
    rank: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Sequences per step."""
        return self.micro_batch * self.accumulation * self.world_size

    def samples(self, micro_step: int) -> NDArray[np.int64]:
        """Sample numbers of this rank's micro-step (counted over the whole run)."""
        slice_number = micro_step * self.world_size + self.rank
        return np.arange(self.micro_batch, dtype=np.int64) + slice_number * self.micro_batch


class TrainingBatches(Dataset[Batch]):
    """Item i is this rank's i-th micro-batch of the run."""

    def __init__(
        self, reader: ShardReader, masking: Masking, pad_id: int, slices: Slices, seed: int
    ) -> None:
        self.reader, self.masking, self.pad_id = reader, masking, pad_id
        self.slices, self.seed = slices, seed

    def __getitem__(self, micro_step: int) -> Batch:
        epochs, rows = shuffled(self.slices.samples(micro_step), self.reader.rows, self.seed)
        ids = self.reader.read(rows).astype(np.int64)
        return make_batch(ids, epochs, rows, self.masking, self.pad_id)


def training_batches(
    batches: TrainingBatches, first_step: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """This rank's micro-batches of steps from `first_step` on, without end, loaded ahead of use."""
    accumulation = batches.slices.accumulation
    micro_steps = itertools.count(first_step * accumulation)
    loader = DataLoader(
        batches, batch_size=None, sampler=micro_steps, num_workers=workers, pin_memory=pin
    )
    return iter(loader)


def validation_batches(
    reader: ShardReader, masking: Masking, pad_id: int, slices: Slices, limit: int | None
) -> Iterator[tuple[Batch, bool]]:
    """This rank's share of the validation rows, in file order, with masks that never change.

    Every rank gets the same number of batches, because under ZeRO-3 each forward is a collective;
    a rank without rows left gets row 0 again, marked False: not to be counted.
    """
    total = reader.rows if limit is None else min(limit, reader.rows)
    stride = slices.micro_batch * slices.world_size
    for start in range(slices.rank * slices.micro_batch, -(-total // stride) * stride, stride):
        rows = np.arange(start, min(start + slices.micro_batch, total), dtype=np.int64)
        counted = len(rows) > 0
        rows = rows if counted else np.zeros(1, np.int64)
        epochs = np.full(len(rows), VALIDATION_EPOCH, np.int64)
        ids = reader.read(rows).astype(np.int64)
        yield make_batch(ids, epochs, rows, masking, pad_id), counted
