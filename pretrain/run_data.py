"""The batches of a run: training, validation, and a few rows for probes."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from data_prep.shard_format import TRAIN, VALIDATION, ShardReader
from potstill.files import write_json
from pretrain.agreement import from_main_rank
from pretrain.batches import (
    Batch,
    Slices,
    TrainingBatches,
    training_batches,
    validation_batches,
)
from pretrain.learner import Learner
from pretrain.masking import shard_masking
from pretrain.order import Order
from pretrain.plan import Plan

DRY_ROWS = 256


class RunData:
    """This rank's batches of a run, by what they are for."""

    def __init__(self, plan: Plan) -> None:
        folder = Path(str(plan.config.data.data))
        settings = plan.config.data
        self._masking = shard_masking(
            folder, settings.mlm_probability, plan.config.run.seed, settings.mask_whole_words
        )
        self._plan, self._pad = plan, plan.manifest.special_ids["pad"]
        self._slices = Slices(
            plan.sizes.micro_batch,
            plan.sizes.accumulation,
            dist.get_rank(),
            dist.get_world_size(),
        )
        self._knowledge = plan.knowledge.reader() if plan.knowledge is not None else None
        self._train = ShardReader(folder, TRAIN, plan.left_out)
        self._validation = ShardReader(folder, VALIDATION, plan.left_out)

    def training(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step on."""
        config = self._plan.config
        batches = TrainingBatches(
            self._train,
            self._masking,
            self._pad,
            self._slices,
            config.run.seed,
            config.data.copies,
            self._knowledge,
        )
        return training_batches(
            batches, step, config.data.loader_workers, pin=torch.cuda.is_available()
        )

    def validation(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of the held-out rows."""
        run = self._plan.config.run
        limit = (
            min(run.validation_rows or DRY_ROWS, DRY_ROWS) if run.dry_run else run.validation_rows
        )
        return self._held_out(self._slices, limit)

    def probe(self, rows: int) -> Batch:
        """The first held-out rows, the same on every rank."""
        rows = min(rows, self._held_out_rows)
        return next(self._held_out(Slices(rows, 1, 0, 1), rows))[0]

    @property
    def _held_out_rows(self) -> int:
        """How many there are; of stored knowledge, which may have fewer, those that it has."""
        known = self._plan.knowledge
        stored = known.manifest.contents.rows[VALIDATION] if known is not None else None
        return self._validation.rows if stored is None else min(stored, self._validation.rows)

    def _held_out(self, slices: Slices, limit: int | None) -> Iterator[tuple[Batch, bool]]:
        return validation_batches(
            self._validation, self._masking, self._pad, slices, limit, self._knowledge
        )

    def probe_digest(self, rows: int) -> str:
        """What tells these rows from others: one may be left out for a bad shard."""
        return hashlib.sha256(self.probe(rows).input_ids.numpy().tobytes()).hexdigest()

    def write_rows(self, learner: Learner, steps: range) -> str:
        """Write which rows some steps took, by shard, beside the student's metrics; where.

        Rank 0 writes. Rows of shards that are left out stand under the row that they name.
        """
        path = learner.folder / f"skipped-{steps.start + 1:08d}-{steps.stop:08d}.json"
        rows = {str(step + 1): self._rows_of(step) for step in steps}
        if not self._plan.config.run.dry_run:
            from_main_rank(lambda: write_json(path, rows))
        return str(path)

    def _rows_of(self, step: int) -> list[dict[str, Any]]:
        """File, row in it and epoch of each sample that the update after `step` steps takes."""
        size = self._slices.global_batch
        order = Order(self._train.rows, self._plan.config.run.seed)
        epochs, rows = order(np.arange(step * size, (step + 1) * size, dtype=np.int64))
        files = self._plan.manifest.of_split(TRAIN)
        starts = np.cumsum([0] + [file.rows for file in files])
        found = np.searchsorted(starts, rows, side="right") - 1
        return [
            {"file": files[file].name, "row": int(row - starts[file]), "epoch": int(epoch)}
            for file, row, epoch in zip(found.tolist(), rows, epochs, strict=True)
        ]
