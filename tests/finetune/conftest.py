"""Small models with their own tokenizers, tiny labelled files, and the program run in-process."""

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForPreTraining,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from finetune.results import read_result
from finetune.run import main

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,  # so narrow a model hardly tells words apart with the usual 0.02
}
WORDS = ("yes", "no", "maybe")
QUICK = ["--lr", "5e-3", "--batch_size", "16", "--max_length", "32"]


def _texts() -> list[str]:
    return [*pydoc_data.topics.topics.values()][:20] + [" ".join(WORDS) * 5]


def _finish(tokenizer: Tokenizer, names: list[str], inputs: list[str]) -> PreTrainedTokenizerFast:
    start, end = names[0], names[1]
    ids = [(name, tokenizer.token_to_id(name)) for name in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", pair=f"{start} $A {end} $B:1 {end}:1", special_tokens=ids
    )
    cls, sep, pad, unknown, mask = names
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=cls,
        sep_token=sep,
        pad_token=pad,
        unk_token=unknown,
        mask_token=mask,
        model_input_names=inputs,
    )


def wordpiece() -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer with token types, trained on Python's own manual."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        _texts(), trainers.WordPieceTrainer(vocab_size=400, special_tokens=special)
    )
    names = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"]
    return _finish(tokenizer, names, ["input_ids", "token_type_ids", "attention_mask"])


def byte_level() -> PreTrainedTokenizerFast:
    """A RoBERTa-like tokenizer, without token types."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    names = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    return _finish(tokenizer, names, ["input_ids", "attention_mask"])


def write_tiny_bert(folder: Path) -> None:
    """A tiny random BERT with an MLM head and without a pooler, as our students are."""
    tokenizer = wordpiece()
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SHAPE)
    BertForMaskedLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT."""
    folder = tmp_path_factory.mktemp("bert")
    write_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random RoBERTa: one token type, positions counted from behind the padding index."""
    folder, tokenizer = tmp_path_factory.mktemp("roberta"), byte_level()
    torch.manual_seed(0)
    shape = RobertaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=66,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        **SHAPE,
    )
    RobertaForMaskedLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random ELECTRA discriminator."""
    folder, tokenizer = tmp_path_factory.mktemp("electra"), wordpiece()
    torch.manual_seed(0)
    shape = ElectraConfig(
        vocab_size=len(tokenizer), embedding_size=16, max_position_embeddings=64, **SHAPE
    )
    ElectraForPreTraining(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_parquet(path: Path, columns: dict[str, list[Any]], names: list[str] | None) -> Path:
    """Columns of text and `label`; `names` makes the label a ClassLabel, as GLUE's are."""
    label = ClassLabel(names=names) if names else Value("float32")
    features = Features(
        {name: Value("string") for name in columns if name != "label"} | {"label": label}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(Dataset.from_dict(columns, features=features).data.table, path)
    return path


def mnli_rows(rows: int, names: list[str]) -> dict[str, list[Any]]:
    """Pairs whose hypothesis says its own label, so that a tiny model learns them in seconds."""
    said = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}
    labels = [names[row % 3] for row in range(rows)]
    return {
        "premise": [f"line {row}" for row in range(rows)],
        "hypothesis": [said[label] for label in labels],
        "label": [names.index(label) for label in labels],
    }


def run_program(flags: tuple[object, ...], output: Path) -> None:
    """The program in this process; the GPUs that it hides are there again behind it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        main([*map(str, flags), "--output", str(output)])


@pytest.fixture
def fine_tune(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the program in this process on a new folder; gives its result."""

    def run(*flags: str, output: Path = tmp_path / "run") -> dict[str, Any]:
        run_program(flags, output)
        result = read_result(output)
        assert result is not None
        return result

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run the program in this process, expecting status 2 and one line, which it gives."""

    def run(*flags: str, output: Path = tmp_path / "refused") -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_program(flags, output)
        assert stop.value.code == 2
        assert not (output / "result.json").exists()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return run
