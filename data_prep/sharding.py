"""The sharder's work: text -> pieces -> tokens -> rows -> shards -> manifest."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.corpus import Source, read_pieces
from data_prep.journal import Journal
from data_prep.packing import PACKING, RowPacker, is_validation
from data_prep.readers import ReadOptions
from data_prep.shard_format import (
    FORMAT_VERSION,
    TOKENIZER_FOLDER,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardFile,
    SplitSize,
    token_dtype,
    write_manifest,
)
from data_prep.tokenization import (
    encoder_settings,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    vocabulary_size,
)
from data_prep.workers import tokenize
from potstill.console import progress
from potstill.errors import InputError
from potstill.files import sha256_of, whole_folder

MOST_ROWS = 2**31  # of a shard: its rows are held in memory
LONGEST_ROW = 65_536  # tokens; no encoder here reads nearly as many


@dataclass(frozen=True)
class ShardPlan:
    """What decides the bytes of the shards."""

    seq_length: int = 128
    validation_fraction: float = 0.005
    rows_per_shard: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        if not 8 <= self.seq_length <= LONGEST_ROW:
            raise InputError(
                f"--seq_length is {self.seq_length}; give 8 or more, at most {LONGEST_ROW}"
            )
        if not 0 <= self.validation_fraction < 1:
            raise InputError(
                f"--validation_fraction is {self.validation_fraction}; give 0 or more, below 1"
            )
        if not 1 <= self.rows_per_shard <= MOST_ROWS:
            raise InputError(
                f"--rows_per_shard is {self.rows_per_shard}; give 1 or more, at most {MOST_ROWS}"
            )
        if not 0 <= self.seed < 2**64:
            raise InputError(f"--seed is {self.seed}; give 0 or more, below 2^64")


def settings_of(
    plan: ShardPlan, sources: list[Source], options: ReadOptions, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """What two runs must share to share a folder."""
    return {
        "format_version": FORMAT_VERSION,
        **tokenizer,
        **vars(plan),
        **vars(options),
        "sources": [source.identity() for source in sources],
    }


class Sharder:
    """One run: packs what the workers return and saves its state behind every finished shard."""

    def __init__(
        self,
        journal: Journal,
        plan: ShardPlan,
        sources: list[Source],
        options: ReadOptions,
        tokenizer: Any,
    ) -> None:
        self.journal = journal
        self.plan = plan
        self.sources = sources
        self.options = options
        self.tokenizer = tokenizer
        self.vocab_size = vocabulary_size(tokenizer)
        self.ids = special_ids(tokenizer)
        self.state, waiting = journal.load()
        self.continues = bool(self.state.shards)
        journal.check_shards(self.state)
        self.state.documents_by_source += [0] * (len(sources) - len(self.state.documents_by_source))
        self.packers = {}
        for split in (TRAIN, VALIDATION):
            packer = RowPacker(
                plan.seq_length, plan.rows_per_shard, self.ids, token_dtype(self.vocab_size)
            )
            if waiting:
                packer.restore(waiting[split], self.state.begun[split])
            self.packers[split] = packer

    def run(self, workers: int, engine: str = "tokenizers") -> tuple[Manifest, int, float]:
        """Shard everything; the manifest, the tokens read in this run, and its seconds.

        The shards depend neither on the number of workers nor on the engine.

        Raises:
            InputError: bad input, or no text at all; what was finished is kept.
        """
        started, tokens = time.perf_counter(), 0
        if not self.state.finished:
            pieces = read_pieces(self.sources, self.options, self.state.position)
            settings = encoder_settings(self.tokenizer)
            with progress(unit=" tokens", unit_scale=True, desc="sharding") as bar:
                for batch, encoded in tokenize(pieces, settings, workers, engine):
                    for piece, ids in zip(batch, encoded, strict=True):
                        self._take(piece.position.source, ids)
                        self._pass(piece.ends, piece.bad)
                    self.state.position = batch[-1].position
                    self._write_full_blocks()
                    count = sum(map(len, encoded))
                    tokens += count
                    bar.update(count)
            self._write_last_blocks()
        return self._complete(), tokens, time.perf_counter() - started

    def _take(self, source: int, ids: np.ndarray) -> None:
        """Append a piece's tokens to its document's split; a document begins with its first."""
        if not len(ids):
            return
        state = self.state
        if not state.open_split:
            validation = is_validation(
                self.plan.seed, state.documents, self.plan.validation_fraction
            )
            state.open_split = VALIDATION if validation else TRAIN
            state.documents += 1
            state.documents_by_source[source] += 1
            self.packers[state.open_split].begin_document()
        self.packers[state.open_split].add(ids)

    def _pass(self, ends: bool, bad: int) -> None:
        self.state.skipped_texts += bad
        if ends:
            self.state.open_split = ""

    def _write_full_blocks(self) -> None:
        before = len(self.state.shards)
        for split, packer in self.packers.items():
            while (rows := packer.full_block()) is not None:
                self.journal.add_shard(self.state, split, rows)
        if len(self.state.shards) > before:
            self._save()

    def _write_last_blocks(self) -> None:
        if not self.state.documents:
            raise InputError(
                f"no text in {', '.join(source.name for source in self.sources[:3])}; "
                "the corpus is empty: give files with documents"
            )
        for split, packer in self.packers.items():
            rows, padding = packer.last_block()
            if len(rows):
                self.journal.add_shard(self.state, split, rows)
                self.state.padding[split] = padding
        self.state.finished = True
        self._save()

    def _save(self) -> None:
        self.state.begun = {split: packer.begun for split, packer in self.packers.items()}
        waiting = {split: packer.waiting() for split, packer in self.packers.items()}
        self.journal.save(self.state, waiting)

    def _complete(self) -> Manifest:
        """Name the shards, add the tokenizer, and last of all the manifest."""
        output = self.journal.output
        with whole_folder(output / TOKENIZER_FOLDER) as folder:
            save_tokenizer(self.tokenizer, folder)
        tokenizer_files = [
            ShardFile(f"{TOKENIZER_FOLDER}/{path.name}", "", 0, sha256_of(path))
            for path in sorted((output / TOKENIZER_FOLDER).iterdir())
        ]
        manifest = self._manifest(self.journal.name_shards(self.state), tokenizer_files)
        write_manifest(output, manifest)
        self.journal.close()
        return manifest

    def _manifest(self, files: list[ShardFile], tokenizer_files: list[ShardFile]) -> Manifest:
        state, plan = self.state, self.plan
        return Manifest(
            format_version=FORMAT_VERSION,
            seq_length=plan.seq_length,
            seed=plan.seed,
            vocab_size=self.vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
            special_ids=self.ids,
            documents=state.documents,
            splits={split: self._size(split, files) for split in (TRAIN, VALIDATION)},
            files=files,
            tokenizer_files=tokenizer_files,
            sources=[
                {"name": source.name, "documents": count}
                for source, count in zip(self.sources, state.documents_by_source, strict=True)
            ],
            packing=PACKING,
            validation_fraction=plan.validation_fraction,
            rows_per_shard=plan.rows_per_shard,
            skipped_texts=state.skipped_texts,
        )

    def _size(self, split: str, files: list[ShardFile]) -> SplitSize:
        rows = sum(file.rows for file in files if file.split == split)
        padding = self.state.padding[split]
        return SplitSize(rows, rows * self.plan.seq_length - padding, padding)
