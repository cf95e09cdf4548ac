"""Width-wise extraction (ETD, section 3.1): which neurons stay, and a thinner student from them.

A neuron is a unit of activation: of the feed-forward block, of an attention head, or a dimension
of the hidden states. Query and key of a head keep the same neurons, because their product pairs
them up; so do value and attention output.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM

from potstill.errors import InputError
from pretrain.models import HEADS, UNTRAINED, Encoder, Shape, shape_of

Indices = tuple[int, ...]

CONSISTENT = "none"
INCONSISTENT = "no-hidden-consistency"
LOWEST: dict[str, frozenset[str]] = {
    CONSISTENT: frozenset(),
    "rev-ffn": frozenset({"ffn"}),
    "rev-head": frozenset({"head"}),
    "rev-hidden": frozenset({"hidden"}),
    "rev-all": frozenset({"ffn", "head", "hidden"}),
    INCONSISTENT: frozenset(),
}
"""Ablations (ETD, Tables 1 and 2): the kinds of neurons whose *lowest* scores stay."""


class Scores(NamedTuple):
    """How much each neuron of a teacher counts; float64."""

    hidden: Tensor  # (N, D), of the input of each layer
    query_key: Tensor  # (N, H, d)
    value: Tensor  # (N, H, d)
    ffn: Tensor  # (N, F)


def score_sizes(shape: Shape) -> tuple[tuple[int, ...], ...]:
    """The sizes of a teacher's `Scores`, in their order."""
    heads = (shape.layers, shape.heads, shape.head_size)
    return (shape.layers, shape.hidden), heads, heads, (shape.layers, shape.ffn)


def random_scores(shape: Shape, seed: int) -> Scores:
    """ETD-Rand: scores drawn from `seed`, so that the highest are a uniform choice."""
    generator = torch.Generator().manual_seed(seed)
    return Scores(
        *(torch.rand(n, generator=generator, dtype=torch.float64) for n in score_sizes(shape))
    )


@dataclass(frozen=True)
class Kept:
    """The neurons that stay, by teacher layer; every set is ascending.

    Attributes:
        hidden: N sets. Under hidden consistency they are all the same. Otherwise all slices of a
            layer use its own; the embeddings use the first layer's, as does the output side of
            the MLM head, which is tied to them; its input side uses the last layer's.
        query_key, value: N x H sets, within the head.
        ffn: N sets.
    """

    hidden: tuple[Indices, ...]
    query_key: tuple[tuple[Indices, ...], ...]
    value: tuple[tuple[Indices, ...], ...]
    ffn: tuple[Indices, ...]


def check_width(shape: Shape, hidden: int, head_size: int | None, ffn: int) -> None:
    """Refuse a width that the teacher, or a Hugging Face checkpoint, cannot have.

    Raises:
        InputError: larger than the teacher; heads that do not divide `hidden`; a `head_size` that
            is not hidden / heads, which is the only one that these architectures know; or ELECTRA
            layers just as wide as its embeddings, which would lose the map between them.
    """
    for flag, value, limit in (("hidden", hidden, shape.hidden), ("ffn", ffn, shape.ffn)):
        if value > limit:
            raise InputError(
                f"--{flag} {value}: the teacher has only {limit}; extraction makes a student "
                "narrower, never wider"
            )
    if hidden % shape.heads:
        below = hidden // shape.heads * shape.heads
        near = [n for n in (below, below + shape.heads) if 0 < n <= shape.hidden]
        raise InputError(
            f"--hidden {hidden} is not a multiple of the teacher's {shape.heads} heads, which "
            f"stay; give {' or '.join(map(str, near))}"
        )
    own = hidden // shape.heads
    if head_size not in (None, own):
        raise InputError(
            f"--head_size {head_size}: a Hugging Face encoder has hidden / heads = {own} at "
            f"--hidden {hidden} and {shape.heads} heads; leave it out, or give --hidden "
            f"{shape.heads * int(head_size or 0)}"
        )
    if shape.embedding != shape.hidden and hidden == shape.embedding:
        raise InputError(
            f"--hidden {hidden} is the width of this teacher's embeddings: a Hugging Face ELECTRA "
            f"then has no map from embeddings to layers; give {hidden - shape.heads} or "
            f"{hidden + shape.heads}"
        )


def choose(scores: Scores, hidden: int, ffn: int, ablation: str = CONSISTENT) -> Kept:
    """Keep the neurons with the highest scores (ETD, section 3.1), ties going to the first.

    Args:
        hidden, ffn: how many stay; within each head it is hidden / heads.
        ablation: a key of `LOWEST`.
    """
    lowest = LOWEST[ablation]
    by_layer = scores.hidden
    if ablation != INCONSISTENT:  # one score per dimension, summed over layers (eq. 8)
        by_layer = by_layer.sum(0, keepdim=True).expand_as(by_layer)
    head_size = hidden // scores.query_key.shape[1]
    return Kept(
        hidden=_best(by_layer, hidden, "hidden" in lowest),
        query_key=tuple(_best(one, head_size, "head" in lowest) for one in scores.query_key),
        value=tuple(_best(one, head_size, "head" in lowest) for one in scores.value),
        ffn=_best(scores.ffn, ffn, "ffn" in lowest),
    )


def _best(scores: Tensor, count: int, lowest: bool) -> tuple[Indices, ...]:
    """Ascending indices of the `count` highest (or lowest) scores in each row of (n, size)."""
    order = scores.argsort(dim=-1, descending=not lowest, stable=True)
    rows: list[list[int]] = order[:, :count].sort(dim=-1).values.tolist()
    return tuple(tuple(row) for row in rows)


def extract(teacher: Encoder, kept: Kept, layers: Sequence[int], seed: int = 0) -> Encoder:
    """The thinner student: the kept neurons of the chosen teacher layers, weights unscaled.

    An ELECTRA-shaped teacher whose embeddings differ in width from its layers keeps them whole:
    only the map from embeddings to layers (and the head's way back) is cut on the layers' side.
    An untrained MLM head is not copied: the student's is fresh, drawn from `seed`.

    Args:
        layers: teacher layers from 1 that become the student's, in order (`layers_to_copy`).
    """
    theirs: Any = teacher.model
    config = _thin_config(teacher, kept, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ours: Any = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
    ours.to(next(theirs.parameters()).dtype)
    with torch.no_grad():
        _copy_embeddings(ours.base_model, theirs.base_model, kept.hidden[0])
        for own, number in zip(ours.base_model.encoder.layer, layers, strict=True):
            _copy_layer(own, theirs.base_model.encoder.layer[number - 1], kept, number - 1)
        if teacher.trained_head:
            _copy_head(ours, theirs, kept)
    ours.tie_weights()
    return Encoder(ours.eval(), shape_of(config), teacher.trained_head, teacher.source)


def _thin_config(teacher: Encoder, kept: Kept, layers: Sequence[int]) -> Any:
    """The teacher's config with the student's sizes, and what in the student is untrained."""
    own: Any = teacher.model.config
    config = type(own).from_dict(own.to_dict())
    config.num_hidden_layers = len(layers)
    config.hidden_size = len(kept.hidden[0])
    config.intermediate_size = len(kept.ffn[0])
    if _embeddings_follow(own):
        config.embedding_size = config.hidden_size
    config.architectures = None
    setattr(config, UNTRAINED, _untrained_parts(teacher, layers))
    return config


def _embeddings_follow(config: Any) -> bool:
    """Whether a config names a width of embeddings, and it is that of the layers."""
    return getattr(config, "embedding_size", None) == config.hidden_size


def _untrained_parts(teacher: Encoder, layers: Sequence[int]) -> list[str]:
    """What was never trained in the student, by its own layer numbers."""
    config: Any = teacher.model.config
    parts: set[str] = set()
    for part in getattr(config, UNTRAINED, None) or []:
        before, layer, rest = part.partition(".encoder.layer.")
        number, dot, rest = rest.partition(".")
        if layer:
            own = [m for m, chosen in enumerate(layers) if chosen == int(number) + 1]
            parts |= {f"{before}{layer}{m}{dot}{rest}" for m in own}
        elif part.split(".")[0] not in HEADS[config.model_type]:
            parts.add(part)
    if not teacher.trained_head:
        parts |= set(HEADS[config.model_type])
    return sorted(parts)


def _copy_embeddings(own: Any, other: Any, hidden: Indices) -> None:
    width = other.embeddings.word_embeddings.embedding_dim
    projected = hasattr(other, "embeddings_project")
    columns = tuple(range(width)) if projected else hidden
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        _copy(getattr(own.embeddings, name), getattr(other.embeddings, name), None, columns)
    _copy(own.embeddings.LayerNorm, other.embeddings.LayerNorm, columns)
    if projected:
        _copy(own.embeddings_project, other.embeddings_project, hidden)


def _copy_layer(own: Any, other: Any, kept: Kept, layer: int) -> None:
    """One layer; `layer` counts the teacher's from 0."""
    hidden, ffn = kept.hidden[layer], kept.ffn[layer]
    head_size = other.attention.self.attention_head_size
    query_key = _across_heads(kept.query_key[layer], head_size)
    value = _across_heads(kept.value[layer], head_size)
    for name, rows in (("query", query_key), ("key", query_key), ("value", value)):
        _copy(getattr(own.attention.self, name), getattr(other.attention.self, name), rows, hidden)
    _copy(own.attention.output.dense, other.attention.output.dense, hidden, value)
    _copy(own.attention.output.LayerNorm, other.attention.output.LayerNorm, hidden)
    _copy(own.intermediate.dense, other.intermediate.dense, ffn, hidden)
    _copy(own.output.dense, other.output.dense, hidden, ffn)
    _copy(own.output.LayerNorm, other.output.LayerNorm, hidden)


def _across_heads(sets: Sequence[Indices], head_size: int) -> Indices:
    """Sets within the heads as indices into their concatenation."""
    return tuple(head * head_size + i for head, one in enumerate(sets) for i in one)


def _copy_head(ours: Any, theirs: Any, kept: Kept) -> None:
    """The MLM head: it reads the last layer, and speaks in the (tied) embeddings' dimensions."""
    read, spoken = kept.hidden[-1], kept.hidden[0]
    if hasattr(theirs, "cls"):  # BERT
        own, other = ours.cls.predictions, theirs.cls.predictions
        _copy(own.transform.dense, other.transform.dense, spoken, read)
        _copy(own.transform.LayerNorm, other.transform.LayerNorm, spoken)
        _copy(own.decoder, other.decoder, None, spoken)
    elif hasattr(theirs, "lm_head"):  # RoBERTa, XLM-R, CamemBERT
        own, other = ours.lm_head, theirs.lm_head
        _copy(own.dense, other.dense, spoken, read)
        _copy(own.layer_norm, other.layer_norm, spoken)
        _copy(own.decoder, other.decoder, None, spoken)
    else:  # ELECTRA
        own, other = ours.generator_predictions, theirs.generator_predictions
        rows = spoken if _embeddings_follow(theirs.config) else None
        _copy(own.dense, other.dense, rows, read)
        _copy(own.LayerNorm, other.LayerNorm, rows)
        _copy(ours.generator_lm_head, theirs.generator_lm_head, None, rows)


def _copy(
    own: nn.Module, other: nn.Module, rows: Indices | None, columns: Indices | None = None
) -> None:
    """Copy the rows (outputs) and columns (inputs) of a weight; None takes all of them."""
    for name, parameter in other.named_parameters(recurse=False):
        part: Tensor = parameter
        if rows is not None:
            part = part[list(rows)]
        if columns is not None and part.ndim > 1:
            part = part[:, list(columns)]
        target: Any = getattr(own, name)
        assert target.shape == part.shape, (name, target.shape, part.shape)
        target.copy_(part)
