"""The batches of a run: training, validation, and a few rows for probes."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import distributed as dist

from data_prep.shard_format import TRAIN, VALIDATION, ShardReader
from pretrain.batches import (
    Batch,
    Slices,
    TrainingBatches,
    training_batches,
    validation_batches,
)
from pretrain.masking import shard_masking
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
        self._train = ShardReader(folder, TRAIN)
        self._validation = ShardReader(folder, VALIDATION)

    def training(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step on."""
        config = self._plan.config
        batches = TrainingBatches(
            self._train, self._masking, self._pad, self._slices, config.run.seed
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
        return validation_batches(self._validation, self._masking, self._pad, self._slices, limit)

    def probe(self, rows: int) -> Batch:
        """The first held-out rows, the same on every rank."""
        slices = Slices(min(rows, self._validation.rows), 1, 0, 1)
        batches = validation_batches(self._validation, self._masking, self._pad, slices, rows)
        return next(iter(batches))[0]
