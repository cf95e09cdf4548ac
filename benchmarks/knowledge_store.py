"""What studies of stored knowledge share: a few rows of shards, and storing in this process."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.shard_format import (
    TOKENIZER_FOLDER,
    TRAIN,
    VALIDATION,
    ShardFile,
    ShardReader,
    SplitSize,
    read_manifest,
    shard_image,
    token_dtype,
    write_manifest,
)
from potstill.errors import InputError
from potstill.files import sha256_of, write_bytes
from pretrain.knowledge.format import (
    KnowledgeFile,
    KnowledgeManifest,
    file_image,
    parts_of,
)
from pretrain.knowledge.format import write_manifest as write_knowledge_manifest
from pretrain.knowledge.job import Job, make_job
from pretrain.knowledge.reader import KnowledgeReader
from pretrain.knowledge.settings import parse_config
from pretrain.knowledge.source import open_knowledge
from pretrain.knowledge.writer import store
from pretrain.run_folder import release_folder


@dataclass(frozen=True)
class Way:
    """One way to store knowledge: its name in tables, and flags of cache_knowledge.py."""

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)


def few_rows(source: Path, output: Path, rows: Mapping[str, int]) -> Path:
    """Shards of the first so many rows of each split.

    Raises:
        InputError: there are fewer.
    """
    manifest = read_manifest(source)
    dtype, files, sizes = token_dtype(manifest.vocab_size), [], {}
    output.mkdir()
    shutil.copytree(source / TOKENIZER_FOLDER, output / TOKENIZER_FOLDER)
    for split in (TRAIN, VALIDATION):
        count, there = rows[split], manifest.splits[split].rows - 1  # the last one may be padded
        if count > there:
            raise InputError(f"--data {source}: {there} full {split} rows, {count} are needed")
        ids = ShardReader(source, split).read(np.arange(count, dtype=np.int64))
        path = output / f"{split}-00000-of-00001.h5"
        write_bytes(path, shard_image(ids.astype(dtype)))
        files.append(ShardFile(path.name, split, count, sha256_of(path)))
        sizes[split] = SplitSize(count, count * manifest.seq_length, 0)
    write_manifest(output, replace(manifest, files=files, splits=sizes))
    return output


def words(flags: Mapping[str, Any]) -> list[str]:
    """A command line of flags."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def store_knowledge(flags: Mapping[str, Any], output: Path, device: torch.device) -> Job:
    """Store knowledge in this process, as the program does it on one rank."""
    job = make_job(parse_config(words({**flags, "output": output})))
    store(job, device)
    release_folder()
    return job


def compressed(source: Path, output: Path) -> Path:
    """The same knowledge under zstd: what `--compression zstd` writes, but no teacher runs."""
    knowledge = open_knowledge(source)
    contents = replace(knowledge.manifest.contents, compression="zstd")
    reader, files = knowledge.reader(), []
    output.mkdir()
    for part in parts_of(contents):
        records = reader.read(part.split, np.array(part.slots, dtype=np.int64))
        write_bytes(output / part.name, file_image(records, "zstd"))
        digest = sha256_of(output / part.name)
        files.append(KnowledgeFile(part.name, part.split, len(part.slots), digest))
    write_knowledge_manifest(output, contents, files)
    return output


def open_reader(folder: Path) -> KnowledgeReader:
    """Reads a knowledge's rows."""
    return open_knowledge(folder).reader()


def bytes_per_token(folder: Path) -> float:
    """Of the files of training rows."""
    manifest: KnowledgeManifest = open_knowledge(folder).manifest
    files = manifest.of_split(TRAIN)
    size = sum((folder / file.name).stat().st_size for file in files)
    return size / (sum(file.records for file in files) * manifest.contents.seq_length)
