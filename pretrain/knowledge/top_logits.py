"""Stored predictions: all logits of a position, or its likeliest tokens and what the others weigh.

A row has a fixed number of slots: one for every token that masking can choose ("masked"), or for
every token ("all"). `TopK` shares `k` tokens a position among all positions of a row: it keeps the
row's likeliest (token, position) pairs, so that positions of which the teacher is sure leave room
to those of which it is not. What lies on disk, for each row:

| field | what |
|---|---|
| marks, low, middle | the pairs, ascending by token, then position, as gaps (`bits.Gaps`) |
| levels, halves | 5 bits a pair: its place between the position's most and least likely token |
| range | a byte a position: the difference of those two log-probabilities, in eighths |
| rest | 16 bits a position: log(r / (1 - r)) of the probability r of all tokens that are cut |

Tokens that many positions of a row share stand close together and their low bytes repeat, so that
zstd halves a record whose plain form is already near the least for a random set.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from potstill.errors import InputError
from pretrain.batches import NO_LABEL, Batch
from pretrain.features import Features, TopLogits
from pretrain.knowledge.bits import Gaps, best_gaps, pack, unpack
from pretrain.knowledge.codecs import Codec
from pretrain.knowledge.entries import Entry, Field

MOST = 4
"""Times `k`: what one position keeps at most; objectives get tensors of that width."""

LEVELS, CURVE = 31, 1.5
"""The highest level, and how much finer levels lie among likely tokens than among others."""

STEPS = 8  # of a range, in one unit of log-probability
REST_LIMIT = 16.0  # log(r / (1 - r)) from -16 to 16: r from 1.1e-7 on
REST_STEP = 2 * REST_LIMIT / 65534  # code 0 is r = 0
_BLOCK = 2**22  # logits in float32 at a time


def slots_of(batch: Batch, at: str, slots: int) -> tuple[Tensor, Tensor]:
    """The slot of every position of logits (P, V) in the batch's (B * slots), and which count.

    Returns:
        int64 (P,), 0 where a masked position is unused; bool (P,).
    """
    rows, length = batch.input_ids.shape
    if at == "all":
        everywhere = torch.arange(rows * length, device=batch.input_ids.device)
        places = everywhere if batch.full else batch.positions
        return places, torch.ones_like(places, dtype=torch.bool)
    used = batch.labels != NO_LABEL
    row = batch.masked // length
    counts = row.new_zeros(rows).scatter_add_(0, row, used.long())
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    return (row * slots + place).masked_fill(~used, 0), used


@dataclass(frozen=True)
class WholeLogits(Entry):
    """All logits (P, V), by a codec: what the teacher gives, exactly so in its own precision.

    Attributes:
        slots: positions a row, at most. vocab: V.
    """

    codec: Codec
    slots: int
    vocab: int

    def fields(self) -> list[Field]:
        return self.codec.fields(self.name, (self.slots, self.vocab))

    def encode(self, features: Features, batch: Batch) -> dict[str, NDArray[Any]]:
        logits, rows = features[self.feature], len(batch.input_ids)
        places, used = slots_of(batch, str(self.feature.at), self.slots)
        laid = logits.new_zeros(rows * self.slots, self.vocab)
        laid[places[used]] = logits[used]
        return self.codec.encode(self.name, laid.view(rows, self.slots, self.vocab))

    def decode(self, stored: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype) -> Tensor:
        laid = self.codec.decode(self.name, stored, dtype)
        places, _ = slots_of(batch, str(self.feature.at), self.slots)
        return laid.flatten(0, 1).index_select(0, places)


@dataclass(frozen=True)
class TopK(Entry):
    """The likeliest tokens, `k` a position on the average of a row, and the mass of all others.

    Attributes:
        slots, vocab: as of `WholeLogits`.
        k: every position keeps its likeliest token, and `MOST * k` at most.
        temperature: of `kd`, at which probabilities are taken.

    Raises:
        InputError: `k` is not below the size of the vocabulary.
    """

    slots: int
    vocab: int
    k: int
    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.k < self.vocab:
            raise InputError(
                f"--logits_top_k {self.k} must lie between 1 and {self.vocab - 1}, one less than "
                "the vocabulary; leave it out to store all logits"
            )

    @property
    def pairs(self) -> int:
        """Pairs of a token and a position in a row's record."""
        return self.slots * self.k

    @property
    def most(self) -> int:
        """Tokens of one position, at most."""
        return min(MOST * self.k, self.vocab)

    @property
    def gaps(self) -> Gaps:
        """How the pairs are written: token * slots + position, ascending."""
        return best_gaps(self.pairs, self.slots * self.vocab)

    def fields(self) -> list[Field]:
        name, pairs, gaps = self.name, self.pairs, self.gaps
        bits = {"marks": gaps.marks, "low": 8 * pairs, "middle": pairs * (gaps.width - 8)}
        bits |= {"levels": 4 * pairs, "halves": pairs, "range": 8 * self.slots}
        fields = [Field(f"{name}/{part}", "|u1", (-(-n // 8),)) for part, n in bits.items() if n]
        return [*fields, Field(f"{name}/rest", "<i2", (self.slots,))]

    def encode(self, features: Features, batch: Batch) -> dict[str, NDArray[Any]]:
        logits, rows = features[self.feature], len(batch.input_ids)
        places, used = slots_of(batch, str(self.feature.at), self.slots)
        row = torch.where(used, places // self.slots, -1).cpu().numpy()
        ids, logs, tail = (part.cpu().numpy() for part in self._likeliest(logits))
        record = {f.name: np.zeros((rows, *f.shape), f.dtype) for f in self.fields()}
        for number in range(rows):
            own = row == number
            for name, values in self._row(ids[own], logs[own], tail[own]).items():
                record[f"{self.name}/{name}"][number, : len(values)] = values
        return record

    def decode(self, stored: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype) -> TopLogits:
        """As `TopLogits` of (P, `most`), in float32 whatever `dtype` is."""
        parts = {name.removeprefix(f"{self.name}/"): value for name, value in stored.items()}
        ids, depth = self._pairs(parts)
        used = depth < torch.inf
        width = parts["range"].reshape(-1, 1).float() / STEPS
        logs = torch.where(used, depth.masked_fill(~used, 0) * -width, -torch.inf)
        code = parts["rest"].flatten().int() & 0xFFFF
        odds = torch.where(code > 0, (code - 1) * REST_STEP - REST_LIMIT, -torch.inf)
        shift = logs.logsumexp(-1) - functional.logsigmoid(-odds)
        logs = torch.where(used, logs - shift[:, None], -torch.inf)
        places, counted = slots_of(batch, str(self.feature.at), self.slots)
        return TopLogits(
            ids.index_select(0, places),
            logs.index_select(0, places).masked_fill(~counted[:, None], -torch.inf),
            odds.sigmoid().index_select(0, places).masked_fill(~counted, 0),
        )

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and log-probabilities (P, most), likeliest first; all others' mass (P,)."""
        parts = []
        for block in logits.split(max(1, _BLOCK // self.vocab)):
            if not block.isfinite().all():
                raise InputError(
                    f"the teacher's {self.name} is not finite; run it in a wider precision "
                    "(--ds_config), or check its weights"
                )
            logs = (block.float() / self.temperature).log_softmax(-1)
            top, ids = logs.topk(self.most, -1)
            tail = logs.exp_().scatter_(1, ids, 0).sum(-1)  # 1 - sum would lose small masses
            parts.append((ids, top, tail))
        ids, top, tail = (torch.cat(part) for part in zip(*parts, strict=True))
        return ids, top, tail

    def _row(
        self, ids: NDArray[np.int64], logs: NDArray[np.float32], tail: NDArray[np.float32]
    ) -> dict[str, NDArray[Any]]:
        """The fields of a row from its n positions: (n, most), (n, most), (n,)."""
        if not len(ids):
            return {}
        kept = self._kept(logs)
        rest = tail.astype(np.float64) + np.where(kept, 0, np.exp(logs, dtype=np.float64)).sum(1)
        lowest = np.where(kept, logs, np.inf).min(1)
        steps = np.minimum(np.ceil((logs[:, 0] - lowest) * STEPS), 255).astype(np.uint8)
        numbers = ids * self.slots + np.arange(len(ids))[:, None]
        order = np.argsort(numbers[kept])
        levels = _levels(logs, steps)[kept][order]
        marks, low = self.gaps.encode(numbers[kept][order])
        fields: dict[str, NDArray[Any]] = {"marks": marks, "low": pack(low, 8)}
        if self.gaps.width > 8:
            fields["middle"] = pack(low >> 8, self.gaps.width - 8)
        fields |= {"levels": pack(levels >> 1, 4), "halves": pack(levels, 1), "range": steps}
        return fields | {"rest": _rest_codes(rest, kept.sum(1) == self.vocab)}

    def _kept(self, logs: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The row's likeliest pairs, one of every position among them: bool (n, most)."""
        wish = logs.copy()
        wish[:, 0] = np.inf
        chosen = np.argpartition(wish.reshape(-1), -len(logs) * self.k)[-len(logs) * self.k :]
        kept = np.zeros(wish.size, bool)
        kept[chosen] = True
        return kept.reshape(wish.shape)

    def _pairs(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and depths below the likeliest, 0 to 1 or inf (unused): (B * slots, most)."""
        low = unpack(parts["low"], 8, self.pairs)
        if self.gaps.width > 8:
            low = low + (unpack(parts["middle"], self.gaps.width - 8, self.pairs) << 8)
        numbers, used = self.gaps.decode(parts["marks"], low)
        level = 2 * unpack(parts["levels"], 4, self.pairs) + unpack(parts["halves"], 1, self.pairs)
        slot = torch.where(used, numbers % self.slots, self.slots)
        slot, order = slot.sort(dim=1, stable=True)
        all_slots = torch.arange(self.slots + 1, device=slot.device).repeat(len(slot), 1)
        place = torch.arange(self.pairs, device=slot.device)
        place = place - torch.searchsorted(slot, all_slots).gather(1, slot)
        end = self.slots * self.most  # where all that is unused goes
        target = (slot * self.most + place).clamp(max=end)
        depth = 1 - (level.float() / LEVELS) ** (1 / CURVE)
        sizes = len(slot), end + 1
        ids = slot.new_zeros(sizes).scatter_(1, target, (numbers // self.slots).gather(1, order))
        depths = depth.new_full(sizes, torch.inf).scatter_(1, target, depth.gather(1, order))
        shape = len(slot) * self.slots, self.most
        return ids[:, :-1].reshape(shape), depths[:, :-1].reshape(shape)


def _levels(logs: NDArray[np.float32], steps: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The levels 0 to `LEVELS` of log-probabilities (n, most), by each position's range (n,)."""
    width = np.maximum(steps, 1)[:, None] / STEPS
    height = np.clip(1 - (logs[:, :1] - logs) / width, 0, 1)
    levels: NDArray[np.int64] = np.rint(height**CURVE * LEVELS).astype(np.int64)
    return levels


def _rest_codes(rest: NDArray[np.float64], whole: NDArray[np.bool_]) -> NDArray[np.int16]:
    """The 16 bits of each mass (n,); 0 where nothing was cut."""
    rest = np.clip(rest, 1e-12, 1 - 1e-12)
    odds = np.clip(np.log(rest / (1 - rest)), -REST_LIMIT, REST_LIMIT)
    codes = 1 + np.rint((odds + REST_LIMIT) / REST_STEP)
    return np.where(whole, 0, codes).astype(np.uint16).view(np.int16)
