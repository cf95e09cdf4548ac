"""Rows of shards -> masked batches, in an order that any rank can compute for any step.

The run's sample number n (0, 1, 2, …, over all steps) stands for a row in epoch `n // rows`, which
`pretrain.order` tells. Global step s takes samples `s * B … (s + 1) * B - 1`; ranks and
micro-batches take slices of them. So the order survives a change of world size, and a resumed run
just starts at a later step.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data_prep.shard_format import ShardReader
from potstill.errors import InputError
from pretrain.masking import Masking
from pretrain.order import Order
from pretrain.signals import ignore_in_worker

if TYPE_CHECKING:  # which reads what belongs to a batch, and so knows batches
    from pretrain.knowledge.reader import KnowledgeReader

BATCHES_VERSION = 2  # of how order and masks are drawn: a run goes on only under its own
GROUP_ROWS = 1024  # made at once: 1 MiB of ids at 128 tokens
GROUP_BYTES = 2**26  # of stored knowledge that are read at once
NO_LABEL = -100  # the label of unused slots: what torch's cross_entropy leaves out
VALIDATION_EPOCH = 2**32  # no training epoch: validation masks are their own, and always the same


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        input_ids: int64 (B, L), masked; both models see it.
        valid: bool (B, L), True = real token.
        masked: int64 (P,), positions of chosen tokens in the flattened (B*L) batch, then 0 up to a
            P that B, L and the masking alone decide, so that shapes never change.
        labels: int64 (P,), the original tokens there, then `NO_LABEL`.
        full: no padding at all, so that no attention mask is needed.
        counts: how many `sequences`, `tokens` (valid), `pairs` (valid query, valid key) and
            `masked` positions the batch holds; what objectives divide by.
        positions: int64 (N,), positions of valid tokens in the flattened batch; empty when it is
            `full`. Made here because finding them on a device makes the host wait.
        token_type_ids: int64 (B, L), 1 in the second text of a pair; None: all are 0.
        rows, epochs: int64 (B,), which rows of their split these are and in which epoch's masks;
            None where nobody needs to know.
        knowledge: what is stored of the rows, by field, (B, …) each; None without knowledge.
    """

    input_ids: Tensor
    valid: Tensor
    masked: Tensor
    labels: Tensor
    full: bool
    counts: Mapping[str, int]
    positions: Tensor
    token_type_ids: Tensor | None = None
    rows: NDArray[np.int64] | None = None
    epochs: NDArray[np.int64] | None = None
    knowledge: Mapping[str, Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel from a loader worker as plain bytes: torch's way opens a shared file for each
        tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {n: values.pop(n).numpy() for n, v in [*values.items()] if isinstance(v, Tensor)}
        stored = values.pop("knowledge")
        known = None if stored is None else {n: v.numpy() for n, v in stored.items()}
        return _arrived, (values, arrays, known)

    def _map(self, act: str, *args: object, **kwargs: object) -> "Batch":
        def acted(tensor: Tensor) -> Tensor:
            result: Tensor = getattr(tensor, act)(*args, **kwargs)
            return result

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {n: acted(v) for n, v in values.items() if isinstance(v, Tensor)}
        if self.knowledge is not None:
            tensors["knowledge"] = {name: acted(v) for name, v in self.knowledge.items()}
        return replace(self, **tensors)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; called by the DataLoader."""
        return self._map("pin_memory")

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting."""
        return self._map("to", device, non_blocking=True)


def _arrived(
    values: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    knowledge: dict[str, NDArray[Any]] | None,
) -> Batch:
    """A batch from what `Batch.__reduce__` sent."""
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if knowledge is not None:
        tensors["knowledge"] = {name: torch.from_numpy(array) for name, array in knowledge.items()}
    return Batch(**values, **tensors)


def make_batch(
    ids: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rows: NDArray[np.int64],
    masking: Masking,
    pad_id: int,
) -> Batch:
    """Mask rows (B, L) and count what is in them; padding stands only at the end of a row."""
    return make_batches(ids, epochs, rows, masking, pad_id, len(ids))[0]


def make_batches(
    ids: NDArray[np.int64],
    epochs: NDArray[np.int64],
    rows: NDArray[np.int64],
    masking: Masking,
    pad_id: int,
    size: int,
) -> list[Batch]:
    """The same for several micro-batches of `size` rows, masked together because that is faster."""
    seen, chosen = masking(ids, epochs, rows)
    length = ids.shape[1]
    batches = []
    for first in range(0, len(ids), size):
        own = slice(first, first + size)
        start, end = np.searchsorted(chosen, [first * length, (first + size) * length])
        positions = chosen[start:end] - first * length
        slots = len(ids[own]) * masking.most(length)
        masked, labels = _slots(ids[own], positions, slots)
        batch = _batch(ids[own], seen[own], masked, labels, len(positions), pad_id)
        batches.append(replace(batch, rows=rows[own], epochs=epochs[own]))
    return batches


def _slots(
    ids: NDArray[np.int64], positions: NDArray[np.int64], slots: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chosen positions and their tokens, int64 (slots,) each, unused slots at the end."""
    masked, labels = np.zeros(slots, np.int64), np.full(slots, NO_LABEL, np.int64)
    masked[: len(positions)] = positions
    labels[: len(positions)] = ids.reshape(-1)[positions]
    return masked, labels


def _batch(
    ids: NDArray[np.int64],
    seen: NDArray[np.int64],
    masked: NDArray[np.int64],
    labels: NDArray[np.int64],
    chosen: int,
    pad_id: int,
) -> Batch:
    full = bool((ids[:, -1] != pad_id).all())
    valid = np.ones(ids.shape, bool) if full else ids != pad_id
    lengths = np.count_nonzero(valid, axis=1)
    return Batch(
        input_ids=torch.from_numpy(seen),
        valid=torch.from_numpy(valid),
        masked=torch.from_numpy(masked),
        labels=torch.from_numpy(labels),
        full=full,
        counts={
            "sequences": len(ids),
            "tokens": int(lengths.sum()),
            "pairs": int((lengths**2).sum()),
            "masked": chosen,
        },
        positions=torch.from_numpy(np.zeros(0, np.int64) if full else np.flatnonzero(valid)),
    )


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


class TrainingBatches(Dataset[list[Batch]]):
    """This rank's micro-batches of the run; item i is the i-th and those behind it, `group` in all.

    Batches of few rows are made together: most of their cost is that of calls, not of rows.

    Args:
        copies: masked versions of each row that there are, the epoch counting modulo them; None: a
            new one in every epoch.
        knowledge: what is stored of the rows, to come with them.
    """

    def __init__(
        self,
        reader: ShardReader,
        masking: Masking,
        pad_id: int,
        slices: Slices,
        seed: int,
        copies: int | None = None,
        knowledge: "KnowledgeReader | None" = None,
    ) -> None:
        self.reader, self.masking, self.pad_id = reader, masking, pad_id
        self.slices, self.order = slices, Order(reader.rows, seed, reader.expect)
        self.copies, self.knowledge = copies, knowledge
        row_bytes = knowledge.row_bytes if knowledge is not None else 1
        together = min(GROUP_ROWS, GROUP_BYTES // row_bytes)
        self.group = max(1, together // slices.micro_batch)

    def __getitem__(self, micro_step: int) -> list[Batch]:
        steps = range(micro_step, micro_step + self.group)
        epochs, rows = self.order(np.concatenate([self.slices.samples(step) for step in steps]))
        epochs = epochs % self.copies if self.copies else epochs
        ids, size = self.reader.read(rows), self.slices.micro_batch
        batches = make_batches(ids, epochs, rows, self.masking, self.pad_id, size)
        return batches if self.knowledge is None else list(map(self.knowledge.attach, batches))


def training_batches(
    batches: TrainingBatches, first_step: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """This rank's micro-batches of steps from `first_step` on, without end, loaded ahead of use.

    Workers hold two groups each, besides the one that they make.
    """
    first = first_step * batches.slices.accumulation
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=itertools.count(first, batches.group),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=ignore_in_worker if workers else None,
    )
    return itertools.chain.from_iterable(_plainly(loader))


def _plainly(groups: Iterable[list[Batch]]) -> Iterator[list[Batch]]:
    """What a loader gives; a worker's error without the worker's traceback around it."""
    try:
        yield from groups
    except InputError as error:
        last = str(error).strip().splitlines()[-1]
        raise InputError(last.removeprefix("potstill.errors.InputError: ")) from None


def validation_batches(
    reader: ShardReader,
    masking: Masking,
    pad_id: int,
    slices: Slices,
    limit: int | None,
    knowledge: "KnowledgeReader | None" = None,
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
        batch = make_batch(reader.read(rows), epochs, rows, masking, pad_id)
        yield batch if knowledge is None else knowledge.attach(batch), counted
