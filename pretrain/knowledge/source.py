"""Stored knowledge in the place of a live teacher: the same features, and no teacher runs."""

from collections.abc import Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoConfig, AutoModelForMaskedLM

from data_prep.shard_format import TRAIN, VALIDATION, Manifest
from potstill.errors import InputError
from pretrain.batches import BATCHES_VERSION, Batch
from pretrain.features import Feature, Features
from pretrain.knowledge.cuts import Cut
from pretrain.knowledge.entries import Entry, record_type
from pretrain.knowledge.format import (
    MANIFEST,
    KnowledgeManifest,
    damaged,
    read_knowledge_manifest,
)
from pretrain.knowledge.layout import check_needs, cut_of, make_entries
from pretrain.knowledge.reader import KnowledgeReader
from pretrain.model_config import check_model_config
from pretrain.models import HEADS, Encoder, shape_of
from pretrain.objectives.base import CutForm
from pretrain.objectives.composite import WeightedSum


class StoredTeacher:
    """Gives the wanted features of any batch that came with its knowledge, as `Teacher` does."""

    def __init__(
        self, entries: tuple[Entry, ...], wanted: Set[Feature], dtype: torch.dtype
    ) -> None:
        self._entries, self._dtype = entries, dtype
        self.wanted = frozenset(wanted)

    def features(self, batch: Batch) -> Features:
        """What is stored for the wanted features, on the batch's device."""
        assert batch.knowledge is not None, "the loader attaches knowledge"
        stored = batch.knowledge
        return {
            entry.feature: entry.decode(stored, batch, self._dtype)
            for entry in self._entries
            if entry.instead_of & self.wanted
        }


@dataclass(frozen=True)
class Knowledge:
    """A folder of stored knowledge, whole and described."""

    folder: Path
    manifest: KnowledgeManifest

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """What a row's record is made of.

        Raises:
            InputError: the manifest asks for what cannot be.
        """
        try:
            entries = make_entries(self.manifest.contents, self.teacher.shape)
            record_type(entries)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{self.folder / MANIFEST} describes no features that can be ({error!r}); store "
                "them again"
            ) from error
        return entries

    @property
    def cut(self) -> Cut:
        """What is kept."""
        return cut_of(self.manifest.contents)

    @cached_property
    def teacher(self) -> Encoder:
        """The teacher's shape and config; its weights hold no values, since it never runs.

        Raises:
            InputError: the stored config is not that of an encoder.
        """
        contents = self.manifest.contents
        blamed = f"--knowledge {self.folder}"
        try:
            settings = dict(contents.teacher_config)
            kind = settings.pop("model_type")
            if kind not in HEADS:
                raise ValueError(f"model type {kind!r} is not supported")
            config: Any = AutoConfig.for_model(kind, **settings)
        except Exception as error:  # whatever damaged values lead to
            raise InputError(f"{blamed}: the teacher's config is unreadable ({error})") from error
        check_model_config(config, blamed)
        with torch.device("meta"):
            model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
        return Encoder(model, shape_of(config), contents.trained_head, contents.teacher_name)

    def reader(self) -> KnowledgeReader:
        """Reads its rows."""
        return KnowledgeReader(self.folder, self.manifest, self.entries)

    def source(self, wanted: Set[Feature], dtype: torch.dtype) -> StoredTeacher:
        """Gives features of batches to which `reader` attached their rows."""
        return StoredTeacher(self.entries, wanted, dtype)

    def check_objective(self, objective: WeightedSum) -> None:
        """Refuse an objective that asks for more than what is stored.

        Raises:
            InputError: what is missing.
        """
        check_needs(self.manifest.contents, objective.teacher_features(), objective)

    def check_cut_form(self, form: CutForm) -> None:
        """Refuse a form of cut losses where nothing is cut.

        Raises:
            InputError: `--cut_form masked` for whole rows.
        """
        if form == "masked" and self.cut.whole:
            raise InputError(
                f"--cut_form masked: --knowledge {self.folder} has all tokens and neurons, so "
                "that there is nothing to mask; drop it"
            )

    def check_files(self) -> None:
        """Compare all files with their checksums; ranks share the work.

        Raises:
            InputError: one is damaged or missing.
        """
        own = self.manifest.files[dist.get_rank() :: dist.get_world_size()]
        found: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(found, damaged(self.folder, own))
        if faults := [fault for share in found for fault in share]:
            raise InputError(faults[0])


def open_knowledge(folder: Path) -> Knowledge:
    """Read what a folder of knowledge says.

    Raises:
        InputError: not whole, or its manifest is damaged.
    """
    if not folder.is_dir():
        raise InputError(
            f"--knowledge {folder}: there is no such folder; make it: pretrain/cache_knowledge.py"
        )
    return Knowledge(folder, read_knowledge_manifest(folder))


def check_agrees(
    knowledge: Knowledge, shards: str, manifest: Manifest, asked: "dict[str, Any]"
) -> None:
    """Refuse knowledge of other rows, or of rows masked otherwise, than the run's.

    Args:
        shards: what makes the run's shards these. manifest: of them.
        asked: the run's `mlm_probability`, `mask_whole_words`, `copies`, `seed` and
            `validation_rows`, by flag.

    Raises:
        InputError: what differs, by name.
    """
    contents, blamed = knowledge.manifest.contents, f"--knowledge {knowledge.folder}"
    if contents.tokenizer != manifest.tokenizer_fingerprint:
        raise InputError(f"{blamed} was stored with another tokenizer than that of --data")
    if contents.seq_length != manifest.seq_length:
        raise InputError(
            f"{blamed} has rows of {contents.seq_length} tokens, --data of {manifest.seq_length}"
        )
    if contents.shards != shards or contents.rows[TRAIN] != manifest.splits[TRAIN].rows:
        raise InputError(f"{blamed} was stored from other shards than --data; store it again")
    if contents.batches_version != BATCHES_VERSION:
        raise InputError(f"{blamed} has masks as an older Potstill drew them; store it again")
    masks = ("mlm_probability", "mask_whole_words", "copies", "seed")
    unmasked = asked["mlm_probability"] == contents.mlm_probability == 0
    for flag in ("mlm_probability", "copies") if unmasked else masks:
        if asked[flag] != (stored := getattr(contents, flag)):
            raise InputError(f"{blamed} was stored with --{flag} {stored}, not {asked[flag]}")
    held_out, there = contents.rows[VALIDATION], manifest.splits[VALIDATION].rows
    if min(asked["validation_rows"] or there, there) > held_out:
        raise InputError(
            f"{blamed} has {held_out} validation rows: give --validation_rows {held_out} or less"
        )


def stored_run(knowledge: Knowledge, data: Any, objective: Any) -> tuple[Any, Any]:
    """A run's data and objective settings with what the knowledge decides, where not given."""
    contents = knowledge.manifest.contents
    layers = contents.layers if objective.layers is None else objective.layers
    copies = contents.copies if data.copies is None else data.copies
    return replace(data, copies=copies), replace(objective, layers=layers)
