"""A model folder as a model of a task: tokenizer, encoder, and a head that fits the task.

A folder's own Python code never runs: without `trust_remote_code=False` the library would ask.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from data_prep.tokenization import load_tokenizer, tokenizer_fingerprint
from finetune.model_checks import (
    check_a_row,
    check_positions,
    check_saving,
    check_vocabulary,
    check_weights,
    fresh_parameters,
    tokenizing,
    unusable,
)
from finetune.results import writing
from finetune.tasks import Rows
from finetune.token_cache import cached, key_of
from potstill.errors import InputError
from potstill.files import sha256_of, whole_folder
from pretrain.model_folder import check_model_folder, check_size
from pretrain.models import UNTRAINED

FINGERPRINTED = {".json", ".safetensors", ".txt", ".model"}  # what is read; never a pickle


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
        raise unusable(folder, "potstill.json cannot be read", error) from error
    if not isinstance(facts, dict):
        raise InputError(f"--model {folder}: potstill.json is no JSON object; copy it again")
    return facts


def _config(folder: Path) -> Any:
    check_model_folder(folder, "--model")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a wrong value raises whatever its first use happens to raise
        raise unusable(folder, "config.json cannot be used", error) from error


def fingerprint(folder: Path) -> str:
    """One SHA-256 over the names and bytes of the model's files."""
    named = sorted(path for path in folder.iterdir() if path.suffix in FINGERPRINTED)
    files = [path for path in named if path.is_file()]
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
    names = list(order) or ["score"]
    return load_with_head(
        AutoModelForSequenceClassification,
        folder,
        max_length,
        seed,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        problem_type="single_label_classification" if order else "regression",
    )


def load_with_head(kind: Any, folder: Path, max_length: int, seed: int, **head: Any) -> Classifier:
    """Load tokenizer and model with the library's class `kind`; `head` goes into its config.

    Raises:
        InputError: as `load_classifier`.
    """
    config = _config(folder)
    check_size(folder, config, "--model")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(folder, tokenizer, config)
    transformers.set_seed(seed)
    try:
        with _only_errors():
            model, loading = kind.from_pretrained(
                folder,
                **head,
                dtype=torch.float32,  # the library's default is the file's own, be it bfloat16
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_hidden_states=False,  # the config may ask for what the Trainer cannot pad
                output_attentions=False,
            )
    except Exception as error:  # as for the config
        raise unusable(folder, "cannot be loaded", error) from error
    check_positions(model, max_length)
    fresh = fresh_parameters(folder, model, loading["missing_keys"])
    check_weights(folder, model, loading["unexpected_keys"])
    check_a_row(folder, model, tokenizer, max_length)
    check_saving(folder, model, tokenizer)
    return Classifier(model, tokenizer, fresh)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Quiet the library's report on missing weights; `fresh_parameters` checks and returns them."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def encode(
    classifier: Classifier,
    rows: Rows,
    labels: Sequence[float] | None,
    max_length: int,
    kept: Path | None = None,
) -> Dataset:
    """Token ids of every row, cut to `max_length` and not yet padded, with `labels` (rows,).

    Args:
        labels: None for rows to be predicted.
        kept: a folder to take them from, if a run before this one left them there.

    Raises:
        InputError: what is kept is damaged.
        TrainingError: it cannot be written.
    """
    settings = tokenizing(classifier.model, max_length)

    def tokenize(batch: dict[str, list[Any]]) -> Any:
        return classifier.tokenizer(*(batch[name] for name in columns), **settings)

    columns = [f"text{index}" for index in range(len(rows.texts[0]))]
    texts = dict(zip(columns, zip(*rows.texts, strict=True), strict=True))
    targets = {} if labels is None else {"labels": list(labels)}
    table = Dataset.from_dict({**texts, **targets})

    def make() -> Dataset:
        return table.map(tokenize, batched=True, remove_columns=columns, desc="tokenising")

    if kept is None:
        return make()
    key = key_of(texts, targets, settings, tokenizer_fingerprint(classifier.tokenizer))
    with writing(kept):
        return cached(kept, key, make)


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write model (safetensors) and tokenizer to `folder`, whole or not at all."""
    config = classifier.model.config
    if hasattr(config, UNTRAINED):
        delattr(config, UNTRAINED)  # it told of the model before: all of this one was trained
    with whole_folder(folder) as beside:
        classifier.model.save_pretrained(beside)
        classifier.tokenizer.save_pretrained(beside)
