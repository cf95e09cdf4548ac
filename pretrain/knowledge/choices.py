"""Which tokens and neurons of a row are kept, how their places are stored, and read again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.batches import Batch
from pretrain.features import Feature, Features
from pretrain.knowledge.cuts import LengthChoice, WidthChoice, eligible
from pretrain.knowledge.entries import Field
from pretrain.masking import draws32, hash64
from pretrain.objectives.kept import first_query_scores

NEURON = 3  # what a draw is for; the masks' are 0 … 2 (`pretrain.masking`)
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Tokens:
    """The choice of at most `slots` tokens of a row; they stand in ascending order.

    `left_first` takes the first ones. `attention` takes those with the highest attention
    probability from [CLS], mean over heads (Marginal Utility Diminishes, section 3.2);
    `attention_no_sep` the same without [SEP] tokens.

    Attributes:
        slots: T. length: L. layer: whose attention it is, from 1 on. sep_id: that of [SEP].
    """

    slots: int
    choice: LengthChoice
    length: int
    layer: int
    sep_id: int

    @property
    def needed(self) -> frozenset[Feature]:
        """What the teacher must compute for the choice."""
        if self.choice == "left_first":
            return frozenset()
        return frozenset({Feature("query", self.layer), Feature("key", self.layer)})

    def fields(self, name: str) -> list[Field]:
        """The places, a byte each in rows of up to 255 tokens; those of `left_first` are known."""
        if self.choice == "left_first":
            return []
        return [Field(name, "|u1" if self.length <= 255 else "<u2", (self.slots,))]

    def choose(self, features: Features, batch: Batch) -> Tensor:
        """The places: int64 (B, T), any in the slots that a row does not use."""
        if self.choice == "left_first":
            return self._first(batch)
        query, key = (features[feature] for feature in self._query_and_key())
        attention = first_query_scores(query, key)
        attention = attention.masked_fill(~batch.valid[:, None], -torch.inf).softmax(dim=-1)
        allowed = eligible(batch, self.choice, self.sep_id)
        wanted = attention.mean(dim=1).masked_fill(~allowed, -1)
        # Stable: among equal ones the first, so that a row's bytes depend on the row alone.
        ranked = wanted.sort(dim=-1, descending=True, stable=True).indices[:, : self.slots]
        unused = ~self.used(batch)
        ascending = ranked.masked_fill(unused, self.length).sort(dim=-1).values
        return ascending.masked_fill(unused, 0)

    def encode(self, name: str, tokens: Tensor) -> Arrays:
        """The places (B, T) as they are stored."""
        return {field.name: tokens.cpu().numpy().astype(field.dtype) for field in self.fields(name)}

    def decode(self, name: str, stored: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """The places: int64 (B, T)."""
        if self.choice == "left_first":
            return self._first(batch)
        return stored[name].to(torch.int64)

    def used(self, batch: Batch) -> Tensor:
        """Which slots hold a token: bool (B, T), the first ones of a row."""
        most = eligible(batch, self.choice, self.sep_id).sum(dim=1, keepdim=True)
        return torch.arange(self.slots, device=batch.valid.device) < most

    def _first(self, batch: Batch) -> Tensor:
        places = torch.arange(self.slots, device=batch.valid.device)
        return places.expand(len(batch.valid), -1)

    def _query_and_key(self) -> tuple[Feature, Feature]:
        return Feature("query", self.layer), Feature("key", self.layer)


@dataclass(frozen=True)
class Neurons:
    """The choice of `kept` of `hidden` neurons, in ascending order.

    `uniform_mask` takes every hidden / kept-th; `rand_mask` a draw of (seed, copy, row), the same
    for all tokens of a row, which is made again when it is read; `importance` those with the
    largest |h| of each token, whose places are stored: as numbers, or as one bit for every neuron
    where that is smaller (Marginal Utility Diminishes, section 3.3).
    """

    kept: int
    choice: WidthChoice
    hidden: int
    seed: int

    def fields(self, name: str, slots: int) -> list[Field]:
        """The places in each of `slots` tokens, where they are not known."""
        if self.choice != "importance":
            return []
        if self._by_bits:
            return [Field(name, "|u1", (slots, -(-self.hidden // 8)))]
        return [Field(name, "<u2", (slots, self.kept))]

    def choose(self, values: Tensor, batch: Batch) -> Tensor:
        """The places, int64, of a shape that broadcasts with (B, T, W).

        Args:
            values: (B, T, D), the hidden states of the kept tokens.
        """
        if self.choice != "importance":
            return self._known(batch)
        ranked = values.abs().sort(dim=-1, descending=True, stable=True).indices
        return ranked[..., : self.kept].sort(dim=-1).values

    def encode(self, name: str, neurons: Tensor, used: Tensor) -> Arrays:
        """The places as they are stored, 0 in slots that are not `used` (B, T)."""
        if self.choice != "importance":
            return {}
        if not self._by_bits:
            return {name: neurons.masked_fill(~used[..., None], 0).cpu().numpy().astype("<u2")}
        chosen = torch.zeros(*used.shape, self.hidden, dtype=torch.bool, device=used.device)
        chosen = chosen.scatter(-1, neurons, used[..., None].expand_as(neurons))
        return {name: np.packbits(chosen.cpu().numpy(), axis=-1, bitorder="little")}

    def decode(self, name: str, stored: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """What `choose` gave; in slots that are not used, any places."""
        if self.choice != "importance":
            return self._known(batch)
        if not self._by_bits:
            return stored[name].to(torch.int64)
        shifts = torch.arange(8, dtype=torch.uint8, device=stored[name].device)
        bits = (stored[name][..., None] >> shifts).bitwise_and(1).flatten(-2)[..., : self.hidden]
        bits = bits.to(torch.int64)
        # Its rank tells a chosen neuron's place; all others go to one that is cut off.
        ranks = torch.where(bits > 0, bits.cumsum(dim=-1) - 1, self.kept)
        numbers = torch.arange(self.hidden, device=bits.device).expand_as(ranks)
        places = bits.new_zeros(*bits.shape[:-1], self.kept + 1)
        return places.scatter(-1, ranks, numbers)[..., : self.kept]

    @property
    def _by_bits(self) -> bool:
        return -(-self.hidden // 8) < 2 * self.kept

    def _known(self, batch: Batch) -> Tensor:
        if self.choice == "uniform_mask":
            places = np.arange(self.kept) * self.hidden // self.kept
        else:
            places = self._drawn(batch)
        # So few bytes are staged at once: the host need not wait for a device.
        return torch.from_numpy(places).to(batch.valid.device, non_blocking=True)

    def _drawn(self, batch: Batch) -> NDArray[np.int64]:
        """int64 (B, 1, W): the neurons with the lowest draws."""
        assert batch.epochs is not None and batch.rows is not None, "rand_mask goes by rows"
        keys = hash64(self.seed, batch.epochs.astype(np.uint64), batch.rows.astype(np.uint64))
        columns = np.arange(self.hidden, dtype=np.uint32)
        draws = draws32(keys[:, None], columns, NEURON).astype(np.uint64)
        ranked = (draws << np.uint64(32)) | columns  # no two are equal
        lowest = np.argpartition(ranked, self.kept - 1, axis=1)[:, : self.kept]
        return np.sort(lowest, axis=1)[:, None, :]
