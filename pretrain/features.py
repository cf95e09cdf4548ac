"""Names of the tensors that objectives ask for, and what each of them is.

| kind    | at                     | shape                                                        |
|---------|------------------------|--------------------------------------------------------------|
| hidden  | layer 0 (embeddings)…N | (B, L, D)                                                    |
| query, key, value | layer 1…N    | (B, H, L, d), before any dropout                             |
| logits  | "masked" or "all"      | (P, V): one row per masked (or valid) token, in batch order  |
| predictions | "masked" or "all"  | the same, not computed yet: `Predictions`                    |

Stored knowledge may hold less (`pretrain.knowledge`): hidden states come as `Kept`, logits as
`TopLogits`, and in the place of projections there are scores of some queries:

| query-key, value-value | layer 1…N | `KeptScores`                                             |
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

Wanted = Literal["hidden", "query", "key", "value", "logits", "predictions"]
"""What objectives may ask for."""
Kind = Literal[Wanted, "query-key", "value-value"]
Positions = Literal["masked", "all"]


class Feature(NamedTuple):
    """One wanted tensor: its kind, and the layer (for logits: the positions) it is taken at."""

    kind: Kind
    at: int | Positions


class Predictions(NamedTuple):
    """Logits that nobody has computed: what the MLM head reads, and the head.

    Attributes:
        hidden: (P, D), the last hidden states. head: gives logits (P', V) of rows (P', D).
        vocab: V.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    vocab: int


class Kept(NamedTuple):
    """Hidden states of which only some tokens and neurons are known; no other one counts.

    Attributes:
        values: (B, T, W). tokens: int64 (B, T), their places in the row. used: bool (B, T); False
            where a row has fewer tokens to keep, whose slots mean nothing.
        neurons: int64, the W places in the width of (B, T, D), of a shape that broadcasts with
            `values`; None: all of them.
    """

    values: Tensor
    tokens: Tensor
    used: Tensor
    neurons: Tensor | None


class KeptScores(NamedTuple):
    """Scores of some queries with all keys, before softmax, by the model's own heads.

    Attributes:
        values: (B, H, T, L). tokens: int64 (B, T), the queries. used: bool (B, T), as in `Kept`.
    """

    values: Tensor
    tokens: Tensor
    used: Tensor


class TopLogits(NamedTuple):
    """Predictions of which only the likeliest tokens are known, and what all others weigh.

    Attributes:
        ids: int64 (P, k). log_probabilities: float32 (P, k), at the temperature that was asked for;
            -inf in unused slots. rest: float32 (P,), the probability of all other tokens together.
    """

    ids: Tensor
    log_probabilities: Tensor
    rest: Tensor


Features = Mapping[Feature, Any]
"""Tensors by name; under "predictions" a `Predictions`, and what stored knowledge gives instead."""


class Depth(NamedTuple):
    """How far an encoder must run: whole layers, and projections in the layer behind them."""

    whole_layers: int
    projected_layer: int | None
    head: bool


def depth_needed(wanted: Iterable[Feature], layers: int) -> Depth:
    """The smallest part of an encoder of `layers` layers that yields all `wanted` features.

    Query, key and value of layer k need layer k-1 whole and only projections of layer k.
    """
    whole, projected, head = 0, 0, False
    for kind, at in wanted:
        if kind in ("logits", "predictions"):
            whole, head = layers, True
        elif kind == "hidden":
            whole = max(whole, int(at))
        else:
            projected = max(projected, int(at))
    whole = max(whole, projected - 1)
    return Depth(whole, projected if projected > whole else None, head)
