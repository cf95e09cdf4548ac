"""A model folder as a classifier: tokenizer, encoder, and a head that fits the task's labels.

A folder's own Python code never runs: without `trust_remote_code=False` the library would ask.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from data_prep.tokenization import load_tokenizer, vocabulary_size
from finetune.tasks import Rows
from potstill.errors import InputError
from potstill.files import sha256_of, whole_folder
from pretrain.model_folder import check_model_folder, check_size
from pretrain.models import UNTRAINED

FINGERPRINTED = {".json", ".safetensors", ".bin", ".txt", ".model"}
OF_A_LAYER = re.compile(r"\.layers?\.\d+\.")
LONGEST_PROBE = 8


@dataclass(frozen=True)
class Classifier:
    """A float32 model with a head of the task's size, and what of it was not in the folder."""

    model: Any
    tokenizer: Any
    fresh_parameters: tuple[str, ...]

    def check_epochs(self, epochs: int) -> None:
        """Raise an InputError where a model without a trained head would only be evaluated."""
        if epochs == 0 and self.fresh_parameters:
            raise InputError(
                f"--epochs 0: the model has no trained {self.fresh_parameters[0]}; "
                "give one epoch or more, or a fine-tuned model"
            )


def output_names(folder: Path) -> tuple[str, ...] | None:
    """The names of a fine-tuned model's outputs, in their order; None for a model without a head.

    Raises:
        InputError: the folder has no readable config.json.
    """
    config = _config(folder)
    classes = config.architectures
    if not (isinstance(classes, list) and str(classes[:1]).endswith("ForSequenceClassification']")):
        return None
    try:
        return tuple(str(config.id2label[index]) for index in range(config.num_labels))
    except KeyError as error:
        raise InputError(
            f"--model {folder}: id2label in config.json has no name for output {error}; "
            "save or copy the model again"
        ) from error


def potstill_facts(folder: Path) -> dict[str, Any]:
    """What Potstill wrote beside a distilled model (potstill.json); empty for other models.

    Raises:
        InputError: the file is there but holds no JSON object.
    """
    path = folder / "potstill.json"
    if not path.exists():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(folder, "potstill.json cannot be read", error) from error
    if not isinstance(facts, dict):
        raise InputError(f"--model {folder}: potstill.json is no JSON object; copy it again")
    return facts


def _config(folder: Path) -> Any:
    check_model_folder(folder, "--model")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a wrong value raises whatever its first use happens to raise
        raise _unusable(folder, "config.json cannot be used", error) from error


def fingerprint(folder: Path) -> str:
    """One SHA-256 over the names and bytes of the model's files."""
    files = sorted(path for path in folder.iterdir() if path.suffix in FINGERPRINTED)
    lines = "".join(f"{path.name} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def load_classifier(folder: Path, order: Sequence[str], max_length: int, seed: int) -> Classifier:
    """Load tokenizer and model; the head gets the outputs `order` (empty: one, a regression).

    What the folder lacks is drawn from `seed`: a head, and a pooler where the model has one.

    Raises:
        InputError: a file is missing or damaged, the tokenizer has more words than the model
            embeds, encoder weights are missing or not finite, the model is too short for
            `max_length`, or it cannot compute a row, or be saved.
    """
    config = _config(folder)
    _check_size(folder, config)
    tokenizer = load_tokenizer(folder)
    _check_vocabulary(folder, tokenizer, config)
    transformers.set_seed(seed)
    names = list(order) or ["score"]
    try:
        with _only_errors():
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                id2label=dict(enumerate(names)),
                label2id={name: index for index, name in enumerate(names)},
                problem_type="single_label_classification" if order else "regression",
                dtype=torch.float32,  # the library's default is the file's own, be it bfloat16
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_hidden_states=False,  # the config may ask for what the Trainer cannot pad
                output_attentions=False,
            )
    except Exception as error:  # as for the config
        raise _unusable(folder, "cannot be loaded", error) from error
    _check_positions(model, max_length)
    fresh = _fresh(folder, model, loading["missing_keys"])
    _check_weights(folder, model, loading["unexpected_keys"])
    classifier = Classifier(model, tokenizer, fresh)
    _check_a_row(folder, classifier, max_length)
    return classifier


def _check_size(folder: Path, config: Any) -> None:
    try:
        check_size(folder, config, "--model")
    except InputError:
        raise
    except Exception as error:  # as for the config
        raise _unusable(folder, "config.json cannot be used", error) from error


def _check_vocabulary(folder: Path, tokenizer: Any, config: Any) -> None:
    words = vocabulary_size(tokenizer)
    if words > config.vocab_size:
        raise InputError(
            f"--model {folder}: the tokenizer has {words} words, the model "
            f"embeds {config.vocab_size}; copy the tokenizer that it was trained with"
        )


@contextmanager
def _only_errors() -> Iterator[None]:
    """Quiet the library's report on missing weights; `_fresh` checks and returns them."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _fresh(folder: Path, model: Any, missing: set[str]) -> tuple[str, ...]:
    encoder, pooler = f"{model.base_model_prefix}.", f"{model.base_model_prefix}.pooler."
    lost = sorted(name for name in missing if name.startswith(encoder) and pooler not in name)
    if lost:
        raise InputError(
            f"--model {folder}: {len(lost)} encoder weights are missing, "
            f"{lost[0]} first; save the whole model again"
        )
    return tuple(sorted(missing))


def _check_weights(folder: Path, model: Any, unexpected: set[str]) -> None:
    beyond = sorted(name for name in unexpected if OF_A_LAYER.search(name))
    if beyond:
        raise InputError(
            f"--model {folder}: {len(beyond)} weights belong to layers that config.json does not "
            f"have, {beyond[0]} first; save or copy the model again"
        )
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise InputError(
                f"--model {folder}: {name} holds numbers that are not finite; "
                "save or copy the model again"
            )


def _check_a_row(folder: Path, classifier: Classifier, max_length: int) -> None:
    """Compute one short pair: settings that no reader checks fail here, not after minutes."""
    needed = classifier.tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length < needed:
        raise InputError(
            f"--max_length {max_length}: two texts and the special tokens need {needed}; "
            f"give {needed} or more"
        )
    model = classifier.model.train()  # dropout has settings too
    try:
        row = classifier.tokenizer(
            "a", "b", return_tensors="pt", **_tokenizing(classifier, max(LONGEST_PROBE, needed))
        )
        with torch.random.fork_rng(), torch.no_grad():
            finite = model(**row).logits.isfinite().all()
        with tempfile.TemporaryDirectory() as beside:  # nor must saving fail after the training
            classifier.tokenizer.save_pretrained(beside)
            model.config.save_pretrained(beside)
    except Exception as error:  # as for the config
        raise _unusable(folder, "cannot compute a row and be saved again", error) from error
    if not finite:
        raise InputError(
            f"--model {folder}: its outputs are not finite; save or copy the model again"
        )


def _check_positions(model: Any, max_length: int) -> None:
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


def _unusable(folder: Path, what: str, error: Exception) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return InputError(f"--model {folder}: {what} ({reason}); save or copy the model again")


def encode(classifier: Classifier, rows: Rows, labels: Sequence[float], max_length: int) -> Dataset:
    """Token ids of every row, cut to `max_length` and not yet padded, with `labels` (rows,)."""
    settings = _tokenizing(classifier, max_length)

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        return classifier.tokenizer(*(batch[name] for name in columns), **settings)

    columns = [f"text{index}" for index in range(len(rows.texts[0]))]
    texts = dict(zip(columns, zip(*rows.texts, strict=True), strict=True))
    table = Dataset.from_dict({**texts, "labels": list(labels)})
    return table.map(tokenize, batched=True, remove_columns=columns, desc="tokenising")


def _tokenizing(classifier: Classifier, max_length: int) -> dict[str, Any]:
    settings: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": False}
    if getattr(classifier.model.config, "type_vocab_size", 0) < 2:
        settings["return_token_type_ids"] = False  # RoBERTa has no second type to embed
    return settings


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write model (safetensors) and tokenizer to `folder`, whole or not at all."""
    config = classifier.model.config
    if hasattr(config, UNTRAINED):
        delattr(config, UNTRAINED)  # it told of the model before: all of this one was trained
    with whole_folder(folder) as beside:
        classifier.model.save_pretrained(beside)
        classifier.tokenizer.save_pretrained(beside)
