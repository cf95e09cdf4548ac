"""Names of the tensors that objectives ask for, and what each of them is.

| kind    | at                     | shape                                                        |
|---------|------------------------|--------------------------------------------------------------|
| hidden  | layer 0 (embeddings)…N | (B, L, D)                                                    |
| query, key, value | layer 1…N    | (B, H, L, d), before any dropout                             |
| logits  | "masked" or "all"      | (P, V): one row per masked (or valid) token, in batch order  |
| predictions | "masked" or "all"  | the same, not computed yet: `Predictions`                    |
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

Kind = Literal["hidden", "query", "key", "value", "logits", "predictions"]
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


Features = Mapping[Feature, Any]
"""Tensors by name; under "predictions" a `Predictions`."""


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
