"""A checked storing of knowledge: everything that is asked before its long work starts."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from data_prep.shard_format import TRAIN, VALIDATION, Manifest, damaged_files, read_manifest
from data_prep.tokenization import load_tokenizer
from potstill.errors import InputError
from pretrain.batches import BATCHES_VERSION
from pretrain.checks import check_positions, check_tokenizer
from pretrain.ds_config import batch_sizes, precision, read_ds_config
from pretrain.features import Feature
from pretrain.knowledge.cuts import Cut, mapped_layers, parse_cut
from pretrain.knowledge.entries import Entry, row_bytes
from pretrain.knowledge.format import Contents
from pretrain.knowledge.layout import check_predictions, features_of, make_entries
from pretrain.knowledge.settings import KnowledgeConfig
from pretrain.models import Encoder, check_local, fingerprint, load_config, load_encoder
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.objectives.composite import WeightedSum
from pretrain.run_folder import data_identity
from pretrain.student.depth import map_layers
from pretrain.teacher import check_teacher

MOST_FILE_BYTES, MOST_FILE_ROWS = 2**28, 4096
MOST_FILES = 50_000
"""Each is a memory map of the training process, and Linux gives it 65,530 (vm.max_map_count)."""
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "architectures")


@dataclass(frozen=True)
class Job:
    """What is to be stored, checked.

    Attributes:
        manifest: of the shards. dtype: that the teacher runs in.
    """

    config: KnowledgeConfig
    contents: Contents
    entries: tuple[Entry, ...]
    teacher: Encoder
    manifest: Manifest
    dtype: torch.dtype

    @property
    def wanted(self) -> frozenset[Feature]:
        """What the teacher must compute."""
        return frozenset[Feature]().union(*(entry.needed for entry in self.entries))


def make_job(config: KnowledgeConfig) -> Job:
    """Load the teacher and check everything; ranks share the check of the shards.

    Raises:
        InputError: teacher, shards, objective, cut and precision that do not go together.
    """
    cut = parse_cut(config.keep, config.keep_depth, config.keep_length, config.keep_width)
    ds_config = read_ds_config(path := Path(str(config.ds_config)))
    sizes = batch_sizes(ds_config, dist.get_world_size(), path)
    folder = Path(str(config.data))
    check_local(str(folder), "--data")
    manifest = read_manifest(folder)
    _check_shards(folder, manifest)
    teacher = _load_teacher(config, folder, manifest)
    layers = mapped_layers(cut, config.student_layers, teacher.shape.layers)
    layers = config.defaulted["layers"] if layers is None else _unless_given(config, layers)
    objective = _objective(config, layers, teacher)
    check_cut(config, cut, objective)
    contents = Contents(
        teacher=fingerprint(teacher),
        teacher_name=_name(teacher.source),
        teacher_config=_config_of(teacher),
        trained_head=teacher.trained_head,
        tokenizer=manifest.tokenizer_fingerprint,
        shards=data_identity(folder),
        seq_length=manifest.seq_length,
        sep_id=manifest.special_ids["sep"],
        rows=_rows(config, manifest),
        mlm_probability=config.mlm_probability,
        mask_whole_words=config.mask_whole_words,
        copies=config.copies,
        seed=config.seed,
        batches_version=BATCHES_VERSION,
        objective=str(config.objective),
        layers=layers,
        features=features_of(objective, cut),
        keep=config.keep or "",
        keep_depth=config.keep_depth or "",
        keep_length=config.keep_length or "",
        keep_width=config.keep_width or "",
        kd_temperature=config.defaulted["kd_temperature"],
        logits_top_k=config.logits_top_k or 0,
        dtype=config.dtype,
        compression=config.compression,
        precision=str(precision(ds_config)).removeprefix("torch."),
        micro_batch=sizes.micro_batch,
        rows_per_file=1,
    )
    entries = make_entries(contents, teacher.shape)
    rows = _rows_per_file(config, sizes.micro_batch, row_bytes(entries))
    contents = replace(contents, rows_per_file=rows)
    _check_number_of_files(contents)
    return Job(config, contents, entries, teacher, manifest, precision(ds_config))


def _check_shards(folder: Path, manifest: Manifest) -> None:
    """Refuse damaged shards, whichever rank has found them: rank 0 alone can tell."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = damaged_files(folder, (manifest.files + manifest.tokenizer_files)[rank::ranks])
    found: list[dict[str, str]] = [{}] * ranks
    dist.all_gather_object(found, own)
    if faults := [fault for share in found for fault in share.values()]:
        raise InputError(faults[0])


def _unless_given(config: KnowledgeConfig, layers: str) -> str:
    if config.layers is not None:
        raise InputError(
            f"--layers {config.layers} and --keep {config.keep} both choose layers; drop one"
        )
    return layers


def _load_teacher(config: KnowledgeConfig, folder: Path, manifest: Manifest) -> Encoder:
    source = str(config.teacher)
    check_local(source, "--teacher")
    load_config(source, "--teacher", config.revision)  # not to be blamed on the tokenizer
    check_tokenizer(load_tokenizer(source, config.revision), source, folder, manifest)
    teacher = load_encoder(source, "--teacher", config.revision)
    check_positions(teacher, "teacher", manifest)
    return teacher


def _objective(config: KnowledgeConfig, layers: str, teacher: Encoder) -> WeightedSum:
    """What students will learn, of any depth where the mapping leaves that open."""
    chosen, depth = config.defaulted, config.student_layers
    if depth is None and layers not in ("last", "uniform"):
        depth = 10**9  # pairs name their layers
    if depth is None and layers == "uniform":
        raise InputError("--layers uniform maps layers by the student's depth: --student_layers")
    number = depth or teacher.shape.layers
    pairs: tuple[LayerPair, ...] = map_layers(layers, number, teacher.shape.layers)
    settings = Settings(
        pairs, temperature=chosen["kd_temperature"], positions=chosen["kd_positions"]
    )
    objective = build_objective(str(config.objective), settings)
    if not objective.uses_teacher:
        raise InputError(f"--objective {config.objective} learns from no teacher: nothing to store")
    for name, term in zip(objective.names, objective.objectives, strict=True):
        term.check_layers(name)
    check_teacher(teacher, objective.teacher_features(), str(config.objective))
    masked = any(at == "masked" for _, at in objective.teacher_features())
    if masked and not config.mlm_probability:
        raise InputError(
            f"--mlm_probability 0 masks nothing, and --objective {config.objective} learns at "
            "masked positions; raise it, or use --kd_positions all"
        )
    return objective


def check_cut(config: KnowledgeConfig, cut: Cut, objective: WeightedSum) -> None:
    """Refuse a cut that the objective cannot learn from, or that cuts nothing.

    Raises:
        InputError: it is such a cut, or predictions are cut of which there are none.
    """
    for name, term in zip(objective.names, objective.objectives, strict=True):
        term.check_cut(name, cut)
        check_predictions(name, term, config.logits_top_k or 0)
    kinds = {kind for kind, _ in objective.teacher_features()}
    logits = bool(kinds & {"logits", "predictions"})
    for part, cuts, what in (
        (cut.layers, kinds - {"logits", "predictions"}, "layers"),
        (cut.tokens, kinds - {"logits", "predictions"}, "tokens of hidden states and attention"),
        (cut.width, kinds & {"hidden"}, "neurons of hidden states"),
    ):
        if part is not None and not cuts:
            raise InputError(
                f"--keep {config.keep} cuts {what}, of which --objective {config.objective} "
                "learns from none; leave that part out"
            )
    if config.logits_top_k is not None and not logits:
        raise InputError(
            f"--logits_top_k {config.logits_top_k}: --objective {config.objective} learns from no "
            "predictions; drop it"
        )


def _rows(config: KnowledgeConfig, manifest: Manifest) -> dict[str, int]:
    rows = {split: size.rows for split, size in manifest.splits.items()}
    for split in (TRAIN, VALIDATION):
        if not rows[split]:
            raise InputError(
                f"--data {config.data} has no {split} rows; shard a corpus of two documents or "
                "more with --validation_fraction above 0"
            )
    rows[VALIDATION] = min(rows[VALIDATION], config.validation_rows or rows[VALIDATION])
    return rows


def _rows_per_file(config: KnowledgeConfig, micro_batch: int, bytes_: int) -> int:
    """Whole micro-batches, so that a row meets the same neighbours however files are dealt out."""
    rows = config.rows_per_file or min(MOST_FILE_ROWS, MOST_FILE_BYTES // bytes_)
    return max(1, rows // micro_batch) * micro_batch


def _check_number_of_files(contents: Contents) -> None:
    if contents.files <= MOST_FILES:
        return
    rows = sum(contents.slots(split) for split in (TRAIN, VALIDATION))
    least = -(-rows // (MOST_FILES - 2))  # the last file of each split may be short
    raise InputError(
        f"{rows:,} rows in files of {contents.rows_per_file:,} are {contents.files:,} files, and "
        f"at most {MOST_FILES:,} can be read; give --rows_per_file "
        f"{-(-least // contents.micro_batch) * contents.micro_batch} or more, which each rank has "
        "in memory while it writes them"
    )


def _name(source: str) -> str:
    """A teacher's name for people, without the path of this machine."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _config_of(teacher: Encoder) -> dict[str, Any]:
    config: Any = teacher.model.config
    return {n: v for n, v in config.to_dict().items() if n not in _VOLATILE}


def identity_of(contents: Contents) -> dict[str, Any]:
    """What a folder must agree in to be gone on with: all but what only names the teacher."""
    return {
        n: v for n, v in asdict(contents).items() if n not in ("teacher_name", "teacher_config")
    }
