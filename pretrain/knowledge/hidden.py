"""Entries of hidden states and projections: whole, or cut; and of scores of attention, cut."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kept, KeptScores, Kind
from pretrain.knowledge.choices import Neurons, Tokens
from pretrain.knowledge.codecs import Codec, Precision, get_codec
from pretrain.knowledge.entries import Entry, Field
from pretrain.objectives.attention import SCORES
from pretrain.objectives.kept import at_neurons, at_tokens, kept_scores
from pretrain.objectives.relation import Sides

SIDES: dict[Kind, tuple[Kind, Kind]] = {kind: sides for sides, kind in SCORES.items()}
"""What scores that are stored under a name are the products of."""


@dataclass(frozen=True)
class Whole(Entry):
    """Hidden states, queries, keys or values of all tokens, as the teacher gives them.

    A vector is a token's hidden state, or a head's part of its projection. Padding is 0, which
    changes no loss: it never counts.

    Attributes:
        length: L. width: D. heads: H, 1 for hidden states.
    """

    precision: Precision
    length: int
    width: int
    heads: int = 1

    @property
    def _codec(self) -> Codec:
        return get_codec(self.precision)

    @property
    def _is_hidden(self) -> bool:
        return self.feature.kind == "hidden"

    def fields(self) -> list[Field]:
        vectors = (self.width,) if self._is_hidden else (self.heads, self.width // self.heads)
        return self._codec.fields(self.name, (self.length, *vectors))

    def encode(self, features: Features, batch: Batch) -> dict[str, NDArray[Any]]:
        values: Tensor = features[self.feature]
        if not self._is_hidden:
            values = values.transpose(1, 2)
        padding = ~batch.valid.view(*batch.valid.shape, *[1] * (values.dim() - 2))
        return self._codec.encode(self.name, values.masked_fill(padding, 0))

    def decode(self, stored: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype) -> Tensor:
        """(B, L, D), or (B, H, L, d) that lies in memory as a model's own projection does."""
        values = self._codec.decode(self.name, stored, dtype)
        return values if self._is_hidden else values.transpose(1, 2)


@dataclass(frozen=True)
class CutHidden(Entry):
    """Hidden states of some tokens and neurons. A vector is what is kept of a token.

    Attributes:
        neurons: None keeps all of `width` neurons.
    """

    precision: Precision
    tokens: Tokens
    width: int
    neurons: Neurons | None = None

    @property
    def needed(self) -> frozenset[Feature]:
        return frozenset({self.feature}) | self.tokens.needed

    def fields(self) -> list[Field]:
        kept = self.neurons.kept if self.neurons else self.width
        found = get_codec(self.precision).fields(self.name, (self.tokens.slots, kept))
        found += self.tokens.fields(self._places)
        return found + (
            self.neurons.fields(self._chosen, self.tokens.slots) if self.neurons else []
        )

    def encode(self, features: Features, batch: Batch) -> dict[str, NDArray[Any]]:
        tokens, used = self.tokens.choose(features, batch), self.tokens.used(batch)
        values = at_tokens(features[self.feature], tokens)
        arrays = self.tokens.encode(self._places, tokens)
        if self.neurons:
            neurons = self.neurons.choose(values, batch)
            arrays |= self.neurons.encode(self._chosen, neurons, used)
            values = at_neurons(values, neurons)
        kept = values.masked_fill(~used[..., None], 0)
        return get_codec(self.precision).encode(self.name, kept) | arrays

    def decode(self, stored: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype) -> Kept:
        return Kept(
            get_codec(self.precision).decode(self.name, stored, dtype),
            self.tokens.decode(self._places, stored, batch),
            self.tokens.used(batch),
            self.neurons.decode(self._chosen, stored, batch) if self.neurons else None,
        )

    @property
    def _places(self) -> str:
        return f"{self.name}/tokens"

    @property
    def _chosen(self) -> str:
        return f"{self.name}/neurons"


@dataclass(frozen=True)
class CutScores(Entry):
    """Scores of some queries with all keys, `query-key` or `value-value`, by the teacher's heads.

    A vector is one query's scores in one head.
    """

    precision: Precision
    tokens: Tokens
    heads: int

    @property
    def instead_of(self) -> frozenset[Feature]:
        """What an objective asks a live teacher for where it takes these scores."""
        return frozenset(Feature(kind, self.feature.at) for kind in SIDES[self.feature.kind])

    @property
    def needed(self) -> frozenset[Feature]:
        return self.instead_of | self.tokens.needed

    def fields(self) -> list[Field]:
        shape = (self.heads, self.tokens.slots, self.tokens.length)
        found = get_codec(self.precision).fields(self.name, shape)
        return found + self.tokens.fields(f"{self.name}/tokens")

    def encode(self, features: Features, batch: Batch) -> dict[str, NDArray[Any]]:
        tokens, used = self.tokens.choose(features, batch), self.tokens.used(batch)
        left, right = (
            features[Feature(kind, self.feature.at)] for kind in SIDES[self.feature.kind]
        )
        counted = used[:, None, :, None] & batch.valid[:, None, None, :]
        scores = kept_scores(Sides(left, right), tokens).masked_fill(~counted, 0)
        arrays = get_codec(self.precision).encode(self.name, scores)
        return arrays | self.tokens.encode(f"{self.name}/tokens", tokens)

    def decode(self, stored: Mapping[str, Tensor], batch: Batch, dtype: torch.dtype) -> KeptScores:
        """In float32 or more, as scores of a live teacher are."""
        precise = torch.promote_types(dtype, torch.float32)
        return KeptScores(
            get_codec(self.precision).decode(self.name, stored, precise),
            self.tokens.decode(f"{self.name}/tokens", stored, batch),
            self.tokens.used(batch),
        )
