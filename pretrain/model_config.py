"""Whether a Hugging Face config describes an encoder that we can build and walk."""

import math
import os
from typing import Any

from transformers.activations import ACT2FN

from pretrain.model_folder import MOST_LAYERS, check_own_parts
from pretrain.options import check

_SIZES = {  # and how large we take them, so that a wrong digit does not fill the memory
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": 2**16,
    "num_attention_heads": 2**12,
    "intermediate_size": 2**18,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**10,
    "embedding_size": 2**16,
}
_SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def check_model_config(config: Any, blamed: str) -> None:
    """Refuse what the library would take silently, or fail on while it builds the model.

    Args:
        config: of a supported `model_type`. blamed: flag and folder, for messages.

    Raises:
        InputError: code or files of its own, a decoder, other positions than absolute ones, or
            values that no encoder can have.
    """
    # Of a name on the hub nothing has been looked at before; `vars` lacks a property.
    own = {**vars(config), "attn_implementation": config._attn_implementation}
    check_own_parts(own, blamed)
    positions = getattr(config, "position_embedding_type", None)
    check(
        positions in (None, "absolute"),
        f"{blamed}: position_embedding_type {positions!r} is not supported, only 'absolute'",
    )
    decoder = getattr(config, "is_decoder", False)
    check(not decoder, f"{blamed}: is_decoder is set, but only encoders are supported")
    _check_numbers(config, blamed)


def _check_numbers(config: Any, blamed: str) -> None:
    for name, most in _SIZES.items():
        value = getattr(config, name, 1)  # only some architectures have an embedding_size
        right = type(value) is int and 1 <= value <= most
        check(right, f"{blamed}: {name} {value!r} must be a whole number in 1 … {most:,}")
    hidden, heads = config.hidden_size, config.num_attention_heads
    check(
        hidden % heads == 0,
        f"{blamed}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}",
    )
    for name in _SHARES:
        value = getattr(config, name)
        right = type(value) in (int, float) and 0 <= value < 1
        check(right, f"{blamed}: {name} {value!r} must be at least 0 and below 1")
    for name in ("layer_norm_eps", "initializer_range"):
        value = getattr(config, name)
        right = type(value) in (int, float) and 0 <= value < math.inf
        check(right, f"{blamed}: {name} {value!r} must be a number, not negative")
    pad = config.pad_token_id
    right = type(pad) is int and 0 <= pad < config.vocab_size
    check(right, f"{blamed}: pad_token_id {pad!r} is no token of {config.vocab_size}")
    check(
        isinstance(config.hidden_act, str) and config.hidden_act in ACT2FN,
        f"{blamed}: hidden_act {config.hidden_act!r} is not known",
    )
    check_memory(config, blamed)


def check_memory(config: Any, blamed: str) -> None:
    """Refuse an encoder whose float32 weights alone are larger than this machine's memory.

    Raises:
        InputError: it is; names both sizes.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    layers = config.num_hidden_layers * (4 * hidden * hidden + 2 * hidden * ffn)
    words = (config.vocab_size + config.max_position_embeddings) * hidden
    needed = 4 * (layers + words)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    check(
        needed <= memory,
        f"{blamed}: an encoder of {config.num_hidden_layers} x {hidden} with {ffn} in feed-forward "
        f"and {config.vocab_size} tokens has {needed / 2**30:,.0f} GiB of weights, and this "
        f"machine {memory / 2**30:,.0f} GiB; give smaller sizes",
    )
