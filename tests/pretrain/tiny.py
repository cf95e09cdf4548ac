"""Tiny random encoders of every supported family, and ragged batches for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    CamembertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from pretrain.batches import Batch, make_batch
from pretrain.masking import Masking
from pretrain.models import Encoder, shape_of

VOCAB, SPECIAL = 61, 5
"""Ids below SPECIAL are special tokens; 4 is the mask."""

_CONFIGS: dict[str, tuple[type, int]] = {  # config class, id of the padding token
    "bert": (BertConfig, 0),
    "roberta": (RobertaConfig, 1),
    "xlm-roberta": (XLMRobertaConfig, 1),
    "camembert": (CamembertConfig, 1),
    "electra": (ElectraConfig, 0),
}
FAMILIES = tuple(_CONFIGS)


def tiny_config(family: str, layers: int = 3, **changes: Any) -> Any:
    """A config of `family`: width 24, 4 heads; ELECTRA's embeddings are narrower, 16."""
    kind, pad = _CONFIGS[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
        "pad_token_id": pad,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "electra":
        sizes["embedding_size"] = 16
    return kind(**(sizes | changes))


def tiny_encoder(
    family: str, seed: int, layers: int = 3, dtype: torch.dtype = torch.float64, **changes: Any
) -> Encoder:
    """A random encoder in eval mode whose biases and layer norms are random too.

    As the library initialises them (0 and 1), leaving one out would change nothing.
    """
    config = tiny_config(family, layers, **changes)
    model = AutoModelForMaskedLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        is_scale = "LayerNorm.weight" in name or "layer_norm.weight" in name
        parameter.data = noise + 1 if is_scale else noise
    model.tie_weights()
    return Encoder(model.to(dtype).eval(), shape_of(config), True, family)


def tiny_masking(probability: float = 0.3, seed: int = 0) -> Masking:
    """Masking for the tiny vocabulary."""
    return Masking(probability, 4, VOCAB, np.arange(VOCAB) < SPECIAL, seed=seed)


def ragged_ids(lengths: Sequence[int], length: int, pad: int, seed: int) -> np.ndarray:
    """Random ordinary tokens, `lengths` of them in each row of `length`, padding behind."""
    ids = np.random.default_rng(seed).integers(SPECIAL, VOCAB, (len(lengths), length))
    return np.where(np.arange(length) < np.array(lengths)[:, None], ids, pad)


def ragged_batch(
    lengths: Sequence[int],
    pad: int = 0,
    seed: int = 0,
    length: int | None = None,
    probability: float = 0.3,
) -> Batch:
    """A masked batch of rows with `lengths` real tokens each."""
    ids = ragged_ids(lengths, length or max(lengths), pad, seed)
    rows = np.arange(len(lengths))
    return make_batch(ids, np.zeros_like(rows), rows, tiny_masking(probability, seed), pad)


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without submodules, by name."""
    return {name: part for name, part in model.named_modules() if not any(part.children())}
