"""A forward pass that stops at the deepest wanted feature.

It walks the layers of a BERT-shaped Hugging Face encoder itself, through the encoder's own
modules, because the library's forward computes every layer, the pooler and the head, and gives
attention only as probabilities after dropout. Nothing behind the deepest wanted feature runs.
"""

from collections.abc import Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.attention import Attention
from pretrain.batches import Batch
from pretrain.features import Depth, Feature, Kind, Predictions, depth_needed

PROJECTIONS: tuple[Kind, ...] = ("query", "key", "value")


def encode(
    model: nn.Module,
    batch: Batch,
    wanted: Set[Feature],
    attention: Attention,
    checkpointing: bool = False,
) -> dict[Feature, Any]:
    """Run `model` on `batch` just far enough to give the `wanted` features.

    Args:
        model: a supported encoder, with MLM head where logits are wanted (`pretrain.models`).
        batch: token ids (B, L) and what is real in them.
        wanted: the features to return; see `pretrain.features` for their shapes.
        attention: the attention function, `pretrain.attention`.
        checkpointing: keep only each layer's input and the wanted features for backward, which
            computes the rest of the layer again (Chen et al. 2016).

    Returns:
        Exactly the wanted features, in the precision of the model.
    """
    base: Any = model.base_model
    depth = depth_needed(wanted, base.config.num_hidden_layers)
    key_mask = None if batch.full else batch.valid[:, None, None, :]
    features: dict[Feature, Any] = {}
    hidden = _embed(base, batch)
    _keep(features, wanted, Feature("hidden", 0), hidden)
    for number, layer in enumerate(base.encoder.layer[: depth.whole_layers], start=1):
        kinds = frozenset(kind for kind in PROJECTIONS if Feature(kind, number) in wanted)
        act = partial(_layer, layer, key_mask=key_mask, attention=attention, kinds=kinds)
        if checkpointing and torch.is_grad_enabled():
            act = partial(checkpoint, act, use_reentrant=False)
        hidden, projected = act(hidden)
        features |= {Feature(kind, number): value for kind, value in projected.items()}
        _keep(features, wanted, Feature("hidden", number), hidden)
    features.update(_beyond(base, depth, hidden, wanted))
    if depth.head:
        features.update(_logits(model, hidden, batch, wanted))
    return features


def _keep(
    features: dict[Feature, Any], wanted: Set[Feature], feature: Feature, value: Tensor
) -> None:
    if feature in wanted:
        features[feature] = value


def _embed(base: Any, batch: Batch) -> Tensor:
    embedded = base.embeddings(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids)
    if hasattr(base, "embeddings_project"):  # ELECTRA with embeddings narrower than its layers
        embedded = base.embeddings_project(embedded)
    return embedded


def _project(attention: Any, hidden: Tensor, kinds: tuple[Kind, ...]) -> dict[Kind, Tensor]:
    """Query, key, value of one layer as (B, H, L, d), straight from its projections."""
    heads = (*hidden.shape[:2], attention.num_attention_heads, -1)
    return {kind: getattr(attention, kind)(hidden).view(heads).transpose(1, 2) for kind in kinds}


def _layer(
    layer: Any,
    hidden: Tensor,
    key_mask: Tensor | None,
    attention: Attention,
    kinds: Set[Kind],
) -> tuple[Tensor, dict[Kind, Tensor]]:
    """A whole layer's output (B, L, D), and those of its projections that are of `kinds`."""
    own = layer.attention.self
    projected = _project(own, hidden, PROJECTIONS)
    dropout = own.dropout.p if own.training else 0.0
    context = attention(projected["query"], projected["key"], projected["value"], key_mask, dropout)
    context = context.transpose(1, 2).reshape(*hidden.shape[:2], -1)
    attended = layer.attention.output(context, hidden)
    kept = {kind: value for kind, value in projected.items() if kind in kinds}
    return layer.output(layer.intermediate(attended), attended), kept


def _beyond(base: Any, depth: Depth, hidden: Tensor, wanted: Set[Feature]) -> dict[Feature, Tensor]:
    """The wanted projections of the layer behind the last whole one, if there are any."""
    if depth.projected_layer is None:
        return {}
    number = depth.projected_layer
    kinds = tuple(kind for kind in PROJECTIONS if Feature(kind, number) in wanted)
    projected = _project(base.encoder.layer[number - 1].attention.self, hidden, kinds)
    return {Feature(kind, number): value for kind, value in projected.items()}


def _logits(model: Any, hidden: Tensor, batch: Batch, wanted: Set[Feature]) -> dict[Feature, Any]:
    """Logits (P, V) at the wanted positions only; the head is a large part of a small model."""
    features: dict[Feature, Any] = {}
    for feature in wanted:
        if feature.kind == "logits":
            features[feature] = mlm_head(model, _positions(hidden, batch, feature))
        elif feature.kind == "predictions":
            rows = _positions(hidden, batch, feature)
            features[feature] = Predictions(rows, partial(mlm_head, model), model.config.vocab_size)
    return features


def _positions(hidden: Tensor, batch: Batch, feature: Feature) -> Tensor:
    """The hidden states (P, D) that a feature's logits are made of."""
    tokens = hidden.flatten(0, 1)
    if feature.at == "all" and batch.full:
        return tokens
    return tokens.index_select(0, batch.positions if feature.at == "all" else batch.masked)


def mlm_head(model: Any, hidden: Tensor) -> Tensor:
    """Logits (P, V) of hidden states (P, D) by the model's own MLM head."""
    if hasattr(model, "cls"):  # BERT
        return model.cls(hidden)
    if hasattr(model, "lm_head"):  # RoBERTa, XLM-R, CamemBERT
        return model.lm_head(hidden)
    return model.generator_lm_head(model.generator_predictions(hidden))  # ELECTRA
