"""What an extraction is told, and everything that is checked before its long work starts."""

import argparse
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from data_prep.shard_format import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardFile,
    ShardReader,
    read_manifest,
    verify_files,
)
from data_prep.tokenization import load_tokenizer, tokenizer_fingerprint
from potstill.errors import InputError
from pretrain.models import Encoder, check_local, load_encoder
from pretrain.student.depth import NAMED_INITS, Flags, layers_to_copy
from pretrain.student.width import CONSISTENT, LOWEST, check_width

IMPORTANCE, RANDOM = "etd-impt", "etd-rand"
RECORD = "extraction.json"


def _help(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


def _check(right: bool, message: str) -> None:
    if not right:
        raise InputError(message)


def _check_name(flag: str, name: str | None, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
        raise InputError(f"--{flag} {name!r} is not known; nearest: {', '.join(near)}")


@dataclass(frozen=True)
class ExtractConfig:
    """What an extraction is told."""

    teacher: str | None = _help("Teacher: a Hugging Face folder or hub name.")
    revision: str | None = _help("Branch, tag or commit of a teacher on the hub.")
    layers: int | None = _help("The student's layers.")
    hidden: int | None = _help("The student's hidden size, a multiple of the teacher's heads.")
    head_size: int | None = _help(
        "Width of a head; Hugging Face encoders have hidden / heads, so it only checks --hidden."
    )
    ffn: int | None = _help("Feed-forward size. Default: in the teacher's proportion.")
    method: str | None = _help(
        "etd-impt: keep the neurons that matter most to the MLM loss on the first --rows rows (the "
        "teacher needs a trained MLM head). etd-rand: keep random ones; needs no data."
    )
    depth: str = _help(
        "Which teacher layers stay: first, last, uniform, alternate, or a list such as 1,8,12.",
        "uniform",
    )
    data: str | None = _help("Folder of shards (data_prep/shard.py), with the teacher's tokenizer.")
    rows: int = _help("Training rows that importance is measured on, from the first.", 10_000)
    micro_batch: int = _help("Rows at a time; fewer need less memory.", 32)
    mlm_probability: float = _help("Share of tokens to mask.", 0.15)
    validation_rows: int = _help("Held-out rows for the MLM loss before and after.", 1_000)
    ablation: str = _help(
        "The paper's ablations: rev-ffn, rev-head, rev-hidden or rev-all keep the *least* "
        "important neurons; no-hidden-consistency chooses hidden dimensions layer by layer.",
        CONSISTENT,
    )
    seed: int = _help("Of random choices, masks, and a head that the teacher has not.", 0)
    output: str | None = _help("Folder of the student; it appears whole or not at all.")
    local_rank: int = _help("Set by the launcher.", -1)

    def __post_init__(self) -> None:
        for name in ("teacher", "layers", "hidden", "output", "method"):
            _check(getattr(self, name) is not None, f"--{name} is missing; see --help")
        _check_name("method", self.method, (IMPORTANCE, RANDOM))
        _check_name("ablation", self.ablation, tuple(LOWEST))
        _check(
            self.method == IMPORTANCE or not LOWEST[self.ablation],
            f"--ablation {self.ablation} reverses importance, which --method {RANDOM} does not "
            f"look at; use --method {IMPORTANCE}",
        )
        if not re.fullmatch(r"\d+(,\d+)*", self.depth):
            _check_name("depth", self.depth, [n for n in NAMED_INITS if n != "random"])
        for name in ("layers", "hidden", "head_size", "ffn", "rows", "micro_batch"):
            value = getattr(self, name)
            _check(value is None or value > 0, f"--{name} {value} must be positive")
        _check(
            self.validation_rows > 0, f"--validation_rows {self.validation_rows} must be positive"
        )
        _check(0 <= self.seed < 2**63, f"--seed {self.seed} must lie in 0 … 2^63 - 1")
        _check(
            0 < self.mlm_probability < 1,
            f"--mlm_probability {self.mlm_probability} must lie between 0 and 1",
        )
        _check(
            self.data is not None or self.method != IMPORTANCE,
            f"--method {IMPORTANCE} measures importance on text: give --data, a folder of shards "
            f"(data_prep/shard.py), or use --method {RANDOM}",
        )

    def identity(self) -> dict[str, Any]:
        """What makes it this extraction and no other; shards go by their content.

        Raises:
            InputError: `--data` is no folder of shards.
        """
        free = ("micro_batch", "validation_rows", "output", "local_rank")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        if self.data is not None:
            check_local(self.data, "--data")
            read_manifest(Path(self.data))
            content = (Path(self.data) / MANIFEST).read_bytes()
            settings["data"] = hashlib.sha256(content).hexdigest()
        return settings


def parse_config(arguments: Sequence[str] | None = None) -> ExtractConfig:
    """Parse the command line.

    Raises:
        InputError: values that no extraction can have, or unknown flags.
        SystemExit: malformed values (status 2), or `--help` (status 0).
    """
    parser = HfArgumentParser(
        (ExtractConfig,),
        prog="extract.py",
        description="Extract a student of any width and depth from a teacher (ETD).",
        epilog="Example: python pretrain/extract.py --teacher google-bert/bert-base-uncased "
        "--layers 6 --hidden 384 --method etd-impt --data shards --output students/etd-6x384. "
        "Then: deepspeed pretrain/run.py --student students/etd-6x384 --objective etd ...",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    config, unknown = parser.parse_args_into_dataclasses(
        args=arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(f"unknown flags: {' '.join(unknown)}; --help lists all there are")
    return config


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
    """Shards of the teacher's tokenizer; the files that will be read are whole."""
    folder = Path(str(config.data))
    manifest = read_manifest(folder)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"--teacher {config.teacher} has another tokenizer than the shards in {folder} "
            f"(fingerprints {fingerprint[:12]} and {manifest.tokenizer_fingerprint[:12]}); shard "
            f"the corpus again with --tokenizer {config.teacher}"
        )
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
    if manifest and teacher.shape.positions < manifest.seq_length:
        raise InputError(
            f"the shards' seq_length is {manifest.seq_length}, but the teacher has only "
            f"{teacher.shape.positions} positions; shard with a smaller --seq_length"
        )
    if manifest and teacher.shape.vocab < manifest.vocab_size:
        raise InputError(
            f"the shards' vocabulary has {manifest.vocab_size} tokens, the teacher's only "
            f"{teacher.shape.vocab}; shard with the teacher's tokenizer"
        )


def is_finished(config: ExtractConfig) -> bool:
    """Whether the output folder holds this very extraction.

    Raises:
        InputError: it holds another one, or something else, or cannot be written.
    """
    folder = Path(str(config.output))
    record = folder / RECORD
    own = config.identity()
    if record.exists():
        try:
            before = json.loads(record.read_text())["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{record} is unreadable ({error!r}); give another --output"
            ) from error
        changed = sorted(name for name in own if own[name] != before.get(name))
        if changed:
            name = changed[0]
            raise InputError(
                f"--output {folder} holds another extraction: {', '.join(changed)} differ ({name} "
                f"was {before.get(name)!r}, is {own[name]!r}); give another --output"
            )
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {folder} is not an empty folder; give another one")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--output {folder}: the folder cannot be written")
    return False
