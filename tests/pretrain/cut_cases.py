"""Random features of tiny models, and the entries that cut them."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.batches import Batch
from pretrain.features import Feature
from pretrain.knowledge.choices import Neurons, Tokens
from pretrain.knowledge.entries import Entry
from pretrain.knowledge.hidden import CutHidden, CutScores
from pretrain.models import Shape
from tests.pretrain.tiny import VOCAB, ragged_batch

SEP = 3
LENGTHS = (7, 3, 1, 6, 2)
HEADS = 2


def shape_of_heads(size: int) -> Shape:
    """Two layers of `HEADS` heads of `size`."""
    return Shape(2, HEADS * size, HEADS, 8, VOCAB, 40, HEADS * size)


OWN, OTHER = shape_of_heads(3), shape_of_heads(5)


def fresh_seed() -> int:
    """Another one in every test; printed where a test fails."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed


def numbered_batch(lengths: tuple[int, ...], seed: int, length: int | None = None) -> Batch:
    """A batch of the rows 10, 11, … in epoch 1; the last token of each row is [SEP]."""
    batch = ragged_batch(lengths, seed=seed, length=length)
    ids = batch.input_ids.clone()
    ids[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = SEP
    rows = np.arange(10, 10 + len(lengths))
    return replace(batch, input_ids=ids, epochs=np.ones_like(rows), rows=rows)


def rows_of(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, for choices, which look at nothing else."""
    assert batch.epochs is not None and batch.rows is not None
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        valid=batch.valid[rows],
        epochs=batch.epochs[rows],
        rows=batch.rows[rows],
    )


def features(batch: Batch, shape: Shape, seed: int, layers: tuple[int, ...]) -> dict[Feature, Any]:
    """Of float64, but float32 holds them; at padding as well, where they must never count."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.valid.shape
    heads = (rows, length, shape.heads, shape.head_size)
    found: dict[Feature, Any] = {}
    for layer in layers:
        drawn = torch.randn(rows, length, shape.hidden, generator=generator)
        found[Feature("hidden", layer)] = drawn.double()
        for kind in ("query", "key", "value"):
            drawn = torch.randn(heads, generator=generator)
            found[Feature(kind, layer)] = drawn.double().transpose(1, 2)
    return found


def tokens_of(batch: Batch, choice: Any, slots: int, layer: int = 2) -> Tokens:
    """The choice of tokens in rows of the batch's length."""
    return Tokens(slots, choice, batch.valid.shape[1], max(layer, 1), SEP)


def cut_hidden(
    tokens: Tokens, neurons: Neurons | None, layer: int = 2, shape: Shape = OTHER
) -> CutHidden:
    """An exact entry of a layer's hidden states."""
    return CutHidden(Feature("hidden", layer), "fp32", tokens, shape.hidden, neurons)


def cut_scores(kind: Any, tokens: Tokens, layer: int = 2) -> CutScores:
    """An exact entry of a layer's scores."""
    return CutScores(Feature(kind, layer), "fp32", tokens, HEADS)


def there_and_back(entry: Entry, teacher: dict[Feature, Any], batch: Batch) -> Any:
    """What objectives get of what was stored; the record is checked against the fields."""
    arrays = entry.encode({name: teacher[name] for name in entry.needed}, batch)
    assert sorted(arrays) == sorted(field.name for field in entry.fields())
    for field in entry.fields():
        assert arrays[field.name].shape == (len(batch.valid), *field.shape), field
        assert arrays[field.name].dtype == np.dtype(field.dtype), field
    stored = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return entry.decode(stored, batch, torch.float64)


def places(tokens: Tensor, used: Tensor) -> list[list[int]]:
    """The kept tokens of each row."""
    return [row[flags].tolist() for row, flags in zip(tokens, used, strict=True)]
