"""Tiny fine-tuned teachers, and rows of unequal lengths for them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from tests.finetune.conftest import SHAPE, byte_level, wordpiece, write_parquet

NAMES = ["entailment", "neutral", "contradiction"]
SAID = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}


def pairs(rows: int) -> dict[str, list[Any]]:
    """Pairs of 1 to 7 words and a hypothesis that says its label."""
    labels = [NAMES[row % 3] for row in range(rows)]
    return {
        "premise": [
            " ".join(["line", str(row), "the", "of"] * 2)[: 5 + row % 20] for row in range(rows)
        ],
        "hypothesis": [SAID[label] for label in labels],
        "label": [NAMES.index(label) for label in labels],
    }


def write_pairs(folder: Path, rows: int = 48) -> Path:
    """A folder of MNLI's shape."""
    for split in ("train", "validation_matched", "validation_mismatched"):
        write_parquet(folder / f"mnli/{split}.parquet", pairs(rows), NAMES)
    return folder


def scored(rows: int) -> dict[str, list[Any]]:
    """STS-B's columns; the second sentence names its score."""
    return {
        "sentence1": [" ".join(["line", str(row), "the"])[: 4 + row % 9] for row in range(rows)],
        "sentence2": [("no", "maybe", "yes")[row % 3] for row in range(rows)],
        "label": [2.5 * (row % 3) for row in range(rows)],
    }


def write_scored(folder: Path, rows: int = 48) -> Path:
    """A folder of STS-B's shape."""
    for split in ("train", "validation"):
        write_parquet(folder / f"stsb/{split}.parquet", scored(rows), None)
    return folder


def tiny_classifier(
    family: str, labels: int = 3, layers: int = 6, seed: int = 0, **sizes: int
) -> Any:
    """A random classifier whose biases and layer norms are random too, with its tokenizer."""
    tokenizer = byte_level() if family == "roberta" else wordpiece()
    shape = {**SHAPE, "num_hidden_layers": layers, "vocab_size": len(tokenizer), **sizes}
    names = {"id2label": dict(enumerate(NAMES[:labels])) if labels > 1 else {0: "score"}}
    torch.manual_seed(seed)
    model: Any
    if family == "bert":
        config = BertConfig(**shape, **names, max_position_embeddings=64)
        model = BertForSequenceClassification(config)
    elif family == "roberta":
        config = RobertaConfig(
            **shape,
            **names,
            max_position_embeddings=66,
            type_vocab_size=1,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
        )
        model = RobertaForSequenceClassification(config)
    else:
        config = ElectraConfig(**shape, **names, embedding_size=16, max_position_embeddings=64)
        model = ElectraForSequenceClassification(config)
    for name, weights in model.named_parameters():
        noise = torch.randn_like(weights) * 0.2
        weights.data = noise + 1 if "LayerNorm.weight" in name else noise
    return model.eval(), tokenizer


def write_teacher(
    folder: Path, family: str, labels: int = 3, layers: int = 6, **sizes: int
) -> Path:
    """The folder of a classifier that answers as it happens to, decidedly."""
    model, tokenizer = tiny_classifier(family, labels, layers, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
