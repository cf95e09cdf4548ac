"""Whether a folder's files make a model that can be fine-tuned: each check raises an InputError."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenization import vocabulary_size
from potstill.errors import InputError
from pretrain.model_folder import check_layers

LONGEST_PROBE = 8


def check_vocabulary(folder: Path, tokenizer: Any, config: Any) -> None:
    """Refuse a model of no text, and a tokenizer with ids that the model does not embed."""
    words, embedded = vocabulary_size(tokenizer), getattr(config, "vocab_size", None)
    if type(embedded) is not int:
        raise InputError(
            f"--model {folder}: model type {config.model_type!r} with vocab_size {embedded!r} "
            "embeds no words; give an encoder of text"
        )
    if words > embedded:
        raise InputError(
            f"--model {folder}: the tokenizer has {words} words, the model "
            f"embeds {embedded}; copy the tokenizer that it was trained with"
        )


def fresh_parameters(folder: Path, model: Any, missing: set[str]) -> tuple[str, ...]:
    """The names of `missing`, sorted; refused where weights of the encoder are among them."""
    encoder, pooler = f"{model.base_model_prefix}.", f"{model.base_model_prefix}.pooler."
    lost = sorted(name for name in missing if name.startswith(encoder) and pooler not in name)
    if lost:
        raise InputError(
            f"--model {folder}: {len(lost)} encoder weights are missing, "
            f"{lost[0]} first; save the whole model again"
        )
    return tuple(sorted(missing))


def check_weights(folder: Path, model: Any, unexpected: set[str]) -> None:
    """Refuse weights that are not finite, or of layers that the config does not have."""
    check_layers(unexpected, f"--model {folder}")
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise InputError(
                f"--model {folder}: {name} holds numbers that are not finite; "
                "save or copy the model again"
            )


def check_positions(model: Any, max_length: int) -> None:
    """Refuse rows that are longer than the model has positions."""
    embedding = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if embedding is None:  # relative positions have no limit
        return
    # RoBERTa counts its positions from behind the padding index.
    offset = 0 if embedding.padding_idx is None else embedding.padding_idx + 1
    positions = embedding.num_embeddings - offset
    if max_length > positions:
        raise InputError(
            f"--max_length {max_length}: the model has {positions} positions; "
            f"give {positions} or less"
        )


def check_a_row(folder: Path, model: Any, tokenizer: Any, max_length: int) -> None:
    """Compute one short pair: settings that no reader checks fail here, not after minutes."""
    needed = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length < needed:
        raise InputError(
            f"--max_length {max_length}: two texts and the special tokens need {needed}; "
            f"give {needed} or more"
        )
    names = tokenizer.model_input_names
    if names[:1] != ["input_ids"]:  # by whose lengths the Trainer makes its batches
        raise InputError(
            f"--model {folder}: model_input_names in tokenizer_config.json is {names}; "
            "copy the model's tokenizer again"
        )
    model.train()  # dropout has settings too
    try:
        row = tokenizer(
            "a", "b", return_tensors="pt", **tokenizing(model, max(LONGEST_PROBE, needed))
        )
        with torch.random.fork_rng(), torch.no_grad():
            outputs = model(**row).to_tuple()  # logits; of a model of spans those of start and end
            finite = all(logits.isfinite().all() for logits in outputs)
        model.eval()  # as it was loaded
    except Exception as error:  # a wrong value raises whatever its first use happens to raise
        raise unusable(folder, "cannot compute a row", error) from error
    if not finite:
        raise InputError(
            f"--model {folder}: its outputs are not finite; save or copy the model again"
        )


def check_saving(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save config and tokenizer once: it must not fail only after the training."""
    try:
        with tempfile.TemporaryDirectory() as beside:
            tokenizer.save_pretrained(beside)
            model.config.save_pretrained(beside)
    except Exception as error:  # as in `check_a_row`
        # the tokenizers library raises a bare Exception for the system's errors too
        if isinstance(error, OSError) or "(os error " in str(error):
            raise InputError(
                f"the folder for temporary files cannot be written ({error}); make room there, or "
                "set TMPDIR to another folder"
            ) from error
        raise unusable(folder, "cannot be saved again", error) from error


def tokenizing(model: Any, max_length: int) -> dict[str, Any]:
    """How texts become token ids for this model: cut to `max_length`, not padded."""
    settings: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": False}
    if getattr(model.config, "type_vocab_size", 0) < 2:
        settings["return_token_type_ids"] = False  # RoBERTa has no second type to embed
    return settings


def unusable(folder: Path, what: str, error: Exception) -> InputError:
    """The error for files that a library cannot use."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(f"--model {folder}: {what} ({reason}); save or copy the model again")
