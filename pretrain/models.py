"""Hugging Face encoders: which are supported, their shape, loading them, what they lack."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from potstill.errors import InputError
from potstill.text import means_a_folder
from pretrain.model_config import check_model_config
from pretrain.model_folder import INDEX, check_index, check_layers, check_model_folder, check_size
from pretrain.options import check

HEADS = {
    "bert": ("cls",),
    "roberta": ("lm_head",),
    "xlm-roberta": ("lm_head",),
    "camembert": ("lm_head",),
    "electra": ("generator_predictions", "generator_lm_head"),
}
"""Supported `model_type`s, and the modules that make up the MLM head of each."""

UNTRAINED = "potstill_untrained"
"""Key of an exported config.json: the parts that no objective ever trained."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder: M (or N), D, H, feed-forward, V, longest L."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    positions: int
    embedding: int
    """Width of the embeddings; differs from `hidden` only in ELECTRA-shaped models."""

    @property
    def head_size(self) -> int:
        """Width of one attention head, d."""
        return self.hidden // self.heads


def shape_of(config: Any) -> Shape:
    """The shape in a Hugging Face config. Positions exclude RoBERTa's offset."""
    offset = config.pad_token_id + 1 if HEADS[config.model_type] == ("lm_head",) else 0
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings - offset,
        embedding=getattr(config, "embedding_size", config.hidden_size),
    )


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder.

    Attributes:
        model: with an MLM head, random where the checkpoint has none.
        shape: its sizes.
        trained_head: whether the MLM head came, trained, with the checkpoint.
        source: the folder or hub name.
    """

    model: nn.Module
    shape: Shape
    trained_head: bool
    source: str


def load_config(source: str, flag: str, revision: str | None = None) -> Any:
    """The config of a supported encoder in a folder or on the hub.

    Raises:
        InputError: nothing there, unreadable, or an architecture that we cannot walk.
    """
    if Path(source).is_dir():
        check_model_folder(Path(source), flag)
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # a damaged config raises whatever its values lead to
        raise InputError(
            f"{flag} {source}: no readable model config there ({_first_line(error)}); give a "
            "folder with config.json and model.safetensors, or a name on the hub"
        ) from error
    if config.model_type not in HEADS:
        raise InputError(
            f"{flag} {source}: model type {config.model_type!r} is not supported; "
            f"supported are {', '.join(HEADS)}"
        )
    check_model_config(config, f"{flag} {source}")
    _check_untrained(config, f"{flag} {source}")
    if Path(source).is_dir():
        check_size(Path(source), config, flag)
    return config


def load_encoder(source: str, flag: str, revision: str | None = None) -> Encoder:
    """Load an encoder in float32 on the CPU, never running code from the checkpoint.

    Args:
        source: a folder, or a name on the hub. flag: the user's flag, for messages.

    Raises:
        InputError: missing, unreadable or unsupported, or weights of the encoder are missing.
    """
    config = load_config(source, flag, revision)
    if not Path(source).is_dir():
        _check_hub_index(source, flag, revision)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports a missing head as if it were a fault
    try:
        model, report = AutoModelForMaskedLM.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,  # never a pickle, which could run code
        )
    except Exception as error:  # damaged files raise whatever their bytes lead to
        raise InputError(
            f"{flag} {source}: the weights cannot be read ({_first_line(error)}); fetch them "
            "again, as model.safetensors"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = set(report["missing_keys"])
    lost = {name for name in missing if name.split(".")[0] not in HEADS[config.model_type]}
    if lost:
        raise InputError(
            f"{flag} {source}: {len(lost)} weights of the encoder are missing, for example "
            f"{min(lost)}; is it a checkpoint of a {config.model_type} model?"
        )
    check_layers(report["unexpected_keys"], f"{flag} {source}")
    _check_finite(model, f"{flag} {source}")
    trained = not missing and not has_untrained_head(config)
    return Encoder(model, shape_of(config), trained, source)


def _check_hub_index(source: str, flag: str, revision: str | None) -> None:
    """Of weights in pieces on the hub, refuse pieces that are no safetensors files."""
    try:
        index = cached_file(
            source,
            INDEX,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,  # then the library cannot get it either
        )
    except OSError as error:
        raise InputError(
            f"{flag} {source}: {INDEX} cannot be asked for on the hub ({_first_line(error)})"
        ) from error
    if index is not None:
        check_index(Path(index), flag, source)


def _check_finite(model: nn.Module, blamed: str) -> None:
    """Refuse weights that would make every loss NaN."""
    for name, weight in model.named_parameters():
        if not weight.sum(dtype=torch.float64).isfinite():
            raise InputError(f"{blamed}: the weight {name} holds NaN or infinity; fetch it again")


def _check_untrained(config: Any, blamed: str) -> None:
    """Refuse a damaged list of untrained parts, such as `bert.encoder.layer.3.output`."""
    parts = getattr(config, UNTRAINED, None) or []
    right = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    numbers = [p.partition(".encoder.layer.")[2].partition(".")[0] for p in parts] if right else []
    check(
        right and all(re.fullmatch("[0-9]{0,4}", number) for number in numbers),
        f"{blamed}: {UNTRAINED} in its config must be a list of parts; export it again",
    )


def has_untrained_head(config: Any) -> bool:
    """Whether an exported student's config says that its MLM head was never trained."""
    parts = getattr(config, UNTRAINED, None) or []
    return any(part.split(".")[0] in HEADS[config.model_type] for part in parts)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_local(source: str, flag: str) -> None:
    """Refuse what looks like a path and does not exist, before the hub is asked for it.

    Raises:
        InputError: a missing folder.
    """
    if means_a_folder(source) and not Path(source).is_dir():
        raise InputError(f"{flag} {source}: there is no such folder")


COMPUTING = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "pad_token_id")
"""What of a config changes features, besides what the weights' shapes tell."""


def fingerprint(encoder: Encoder) -> str:
    """SHA-256 of what decides an encoder's features: its weights, but for a head it came without.

    The same for the same numbers, whatever files they came from.
    """
    config: Any = encoder.model.config
    digest = hashlib.sha256(json.dumps([getattr(config, name) for name in COMPUTING]).encode())
    untrained = () if encoder.trained_head else HEADS[config.model_type]
    for name, weight in sorted(encoder.model.state_dict().items()):
        if name.split(".")[0] not in untrained:
            digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def freeze(model: nn.Module) -> nn.Module:
    """No gradients, evaluation mode: a teacher."""
    return model.requires_grad_(False).eval()
