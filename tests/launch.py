"""What end-to-end tests share: tiny shards, teachers and ds_configs, and starting the trainer.

`runs(...)` does several runs of the trainer behind one another on the same ranks, which are forked
from one process, since a start takes longer than twenty steps of a tiny model.
"""

import dataclasses
import json
import os
import pydoc_data.topics
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from data_prep import shard
from data_prep.shard_format import (
    TOKENIZER_FOLDER,
    TRAIN,
    VALIDATION,
    ShardReader,
    read_manifest,
    shard_image,
    token_dtype,
    write_manifest,
)
from potstill.files import sha256_of
from tests.forked import LIMIT, Ended, Job, forked, free_port

REPOSITORY = Path(__file__).resolve().parent.parent
PROGRAM = REPOSITORY / "pretrain" / "run.py"
SEVERAL = Path(__file__).parent / "end_to_end" / "several_runs.py"
LENGTH, VOCABULARY, LAYERS, HEADS = 32, 400, 4, 4
START_LIMIT = LIMIT  # seconds a start may take


@dataclass(frozen=True)
class Materials:
    """Folders made once per session.

    Attributes:
        shards: rows of 32 tokens of Python's own manual, full but for a split's last row.
        ragged: the same rows, cut to lengths from 6 to 32.
        teacher: a random BERT, 4 layers x 32, with MLM head and the shards' tokenizer.
        headless: the same encoder, saved without its MLM head.
    """

    folder: Path
    shards: Path
    ragged: Path
    teacher: Path
    headless: Path


@pytest.fixture(scope="session", name="materials")
def materials_fixture(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    """Import this fixture into a test module to use it by the name `materials`."""
    return make_materials(tmp_path_factory.getbasetemp())


@cache
def make_materials(base: Path) -> Materials:
    """Make shards and teachers in a folder of their own."""
    folder = base / "launch"
    folder.mkdir()
    texts = [pydoc_data.topics.topics[n] for n in ("assignment", "booleans", "comparisons", "if")]
    (folder / "manual.txt").write_text("\n\n".join(" ".join(text.split()) for text in texts))
    made = Materials(folder, *(folder / n for n in ("shards", "ragged", "teacher", "headless")))
    shard_text(folder / "manual.txt", made.shards)
    cut_rows(made.shards, made.ragged)
    write_teacher(made.teacher, made.shards / TOKENIZER_FOLDER)
    write_teacher(made.headless, made.shards / TOKENIZER_FOLDER, head=False)
    return made


def shard_text(text: Path, output: Path, *more: str) -> None:
    """Shard a text with a small vocabulary of its own, by the program, in this process."""
    argv = sys.argv
    sizes = ["--train_tokenizer", str(VOCABULARY), "--seq_length", str(LENGTH), "--workers", "1"]
    sys.argv = ["shard.py", "--input", str(text), "--output", str(output), *sizes, *more]
    try:
        shard.main()
    finally:
        sys.argv = argv


def cut_rows(shards: Path, output: Path) -> None:
    """Copy shards, each row cut to a length of its own and padded."""
    manifest, files = read_manifest(shards), []
    pad, sep = manifest.special_ids["pad"], manifest.special_ids["sep"]
    output.mkdir()
    for split in (TRAIN, VALIDATION):
        rows = ShardReader(shards, split).read(np.arange(manifest.splits[split].rows))
        for number, row in enumerate(rows):
            length = 6 + (number * 11) % (LENGTH - 5)
            row[length - 1], row[length:] = sep, pad
        (file,) = manifest.of_split(split)
        (output / file.name).write_bytes(shard_image(rows.astype(token_dtype(manifest.vocab_size))))
        files.append(dataclasses.replace(file, sha256=sha256_of(output / file.name)))
    shutil.copytree(shards / TOKENIZER_FOLDER, output / TOKENIZER_FOLDER)
    write_manifest(output, dataclasses.replace(manifest, files=files))


def write_teacher(folder: Path, tokenizer: Path, head: bool = True, **sizes: Any) -> None:
    """A random BERT with a tokenizer; weights large enough for features to differ by token."""
    torch.manual_seed(1)
    words = AutoTokenizer.from_pretrained(tokenizer)
    shape = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    model = BertForMaskedLM(BertConfig(**(shape | sizes)))
    (model if head else model.bert).save_pretrained(folder)
    words.save_pretrained(folder)


def write_ds_config(path: Path, micro: int = 4, accumulation: int = 1, **sections: Any) -> Path:
    """A ds_config: fp32 without ZeRO, plus the sections."""
    sizes = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
    path.write_text(json.dumps({**sizes, **sections}))
    return path


def flags(**values: Any) -> list[str]:
    """Command-line flags: `--name value`; True is a bare flag, None leaves it out."""
    given: list[str] = []
    for name, value in values.items():
        if value is True:
            given.append(f"--{name}")
        elif value is not None:
            given += [f"--{name}", str(value)]
    return given


def environment(folder: Path) -> dict[str, str]:
    """The environment of a started run: one thread, DeepSpeed's ops built once per session."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    own["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR", str(folder / "ops"))
    rank = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {n: v for n, v in os.environ.items() if n not in rank} | own


def command(ranks: int | None, program: Path = PROGRAM) -> list[str]:
    """The start of a command line: the launcher with so many ranks, or None for plain Python."""
    if ranks is None:
        return [sys.executable, str(program)]
    launcher = str(Path(sys.executable).parent / "deepspeed")
    return [launcher, "--num_gpus", str(ranks), "--master_port", str(free_port()), str(program)]


def runs(
    materials: Materials, name: str, *groups: tuple[int, Sequence[list[str] | str]]
) -> list[Ended]:
    """Do groups of runs: each on so many ranks (0: one rank that is told of no others), in turn.

    A group is what `several_runs.py` does in one start: argument lists, and shell commands.
    """
    jobs = []
    for number, (ranks, items) in enumerate(groups):
        path = materials.folder / f"{name}-{number}.json"
        path.write_text(json.dumps(items))
        jobs.append(Job(str(SEVERAL), ranks, [str(path)]))
    place = materials.folder / f"{name}-forked"
    return forked(place, jobs, environment(materials.folder), materials.folder)


def by_run(printed: str) -> list[tuple[int, str]]:
    """Status and text of each of several runs, of what one start printed to a stream."""
    pieces = re.split(r"^ended with (\d+)$", printed, flags=re.MULTILINE)
    return [(int(n), text) for text, n in zip(pieces[::2], pieces[1::2], strict=False)]


def metrics(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path) -> list[float]:
    """The loss of each step, in order."""
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
