"""A checked extraction: everything that is asked before its long work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shard_format import (
    TRAIN,
    VALIDATION,
    Manifest,
    ShardFile,
    ShardReader,
    read_manifest,
    verify_files,
)
from data_prep.tokenization import load_tokenizer
from potstill.errors import InputError
from pretrain.checks import check_positions, check_tokenizer
from pretrain.extract_config import IMPORTANCE, RANDOM, ExtractConfig
from pretrain.models import Encoder, check_local, load_config, load_encoder
from pretrain.run_folder import check_writable, holds
from pretrain.student.depth import Flags, layers_to_copy
from pretrain.student.width import check_width

RECORD = "extraction.json"


@dataclass(frozen=True)
class Extraction:
    """A checked extraction: what is cut to what size, on which text.

    Attributes:
        chosen: teacher layers from 1 that become the student's.
        manifest: of the shards; None without `--data`.
    """

    config: ExtractConfig
    teacher: Encoder
    tokenizer: Any
    manifest: Manifest | None
    hidden: int
    ffn: int
    chosen: list[int]

    @property
    def pad_id(self) -> int:
        """The padding token of teacher and shards."""
        return int(self.tokenizer.pad_token_id)


def make_extraction(config: ExtractConfig) -> Extraction:
    """Load the teacher and check everything before long work.

    Raises:
        InputError: a teacher, shards or sizes that do not go together.
    """
    source = str(config.teacher)
    check_local(source, "--teacher")
    load_config(source, "--teacher", config.revision)  # the tokenizer would blame itself for it
    tokenizer = load_tokenizer(source, config.revision)
    manifest = _check_data(config, tokenizer) if config.data else None
    teacher = load_encoder(source, "--teacher", config.revision)
    shape, hidden = teacher.shape, int(config.hidden or 0)
    ffn = config.ffn or shape.ffn * hidden // shape.hidden
    layers = int(config.layers or 0)
    if layers > shape.layers:
        raise InputError(
            f"--layers {layers}: the teacher has only {shape.layers}; extraction makes a student "
            "shallower, never deeper"
        )
    check_width(shape, hidden, config.head_size, ffn)
    chosen = layers_to_copy(config.depth, layers, shape.layers, Flags("--depth", "--layers"))
    _check_teacher(config, teacher, manifest)
    return Extraction(config, teacher, tokenizer, manifest, hidden, ffn, chosen)


def _check_data(config: ExtractConfig, tokenizer: Any) -> Manifest:
    """Shards of the teacher's tokenizer, which is whole, as are the files that will be read."""
    folder = Path(str(config.data))
    manifest = read_manifest(folder)
    check_tokenizer(tokenizer, str(config.teacher), folder, manifest)
    verify_files(folder, manifest, manifest.tokenizer_files)
    wanted = {VALIDATION: config.validation_rows}
    if config.method == IMPORTANCE:
        ShardReader(folder, TRAIN)  # refuses a split without rows
        wanted[TRAIN] = config.rows
    for split, rows in wanted.items():
        verify_files(folder, manifest, _files_of(manifest.of_split(split), rows))
    return manifest


def _files_of(files: Sequence[ShardFile], rows: int) -> list[ShardFile]:
    """The files that hold the first `rows` rows."""
    before = 0
    needed = []
    for file in files:
        if before < rows:
            needed.append(file)
        before += file.rows
    return needed


def _check_teacher(config: ExtractConfig, teacher: Encoder, manifest: Manifest | None) -> None:
    """Refuse a teacher that cannot read the shards, or has no loss to measure importance by."""
    if config.method == IMPORTANCE and not teacher.trained_head:
        raise InputError(
            f"--teacher {teacher.source} has no trained MLM head, and --method {IMPORTANCE} "
            "measures importance by the MLM loss; train a head (pretrain/run.py --objective mlm "
            f"--freeze encoder --student {teacher.source}), or use --method {RANDOM}"
        )
    if manifest:
        check_positions(teacher, "teacher", manifest)


def is_finished(config: ExtractConfig) -> bool:
    """Whether the output folder holds this very extraction.

    Raises:
        InputError: it holds another one, or something else, or cannot be written.
    """
    folder = Path(str(config.output))
    finished = holds(folder / RECORD, config.identity(), "extraction")
    if not finished:
        check_writable(folder, folder.absolute().parent)  # it is made beside, and moved there
    return finished
