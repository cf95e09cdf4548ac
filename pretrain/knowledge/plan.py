"""What storing knowledge will take, and from how many students on it pays."""

import torch

from data_prep.shard_format import TRAIN, VALIDATION
from potstill.console import say
from pretrain.knowledge.entries import row_bytes
from pretrain.knowledge.job import Job
from pretrain.summary import describe_shape


def describe(job: Job) -> None:
    """Print what will be stored."""
    contents, bytes_ = job.contents, row_bytes(job.entries)
    rows = sum(contents.slots(split) for split in (TRAIN, VALIDATION))
    say(f"teacher    {describe_shape(job.teacher)}")
    say(f"objective  {contents.objective}, layers {contents.layers}")
    for entry in job.entries:
        fields = ", ".join(f"{name} {shape} {code}" for name, code, shape in entry.fields())
        say(f"stored     {fields}")
    say(
        f"size       {bytes_ / contents.seq_length:,.1f} bytes a token before compression, "
        f"{rows:,} rows, {rows * bytes_ / 2**30:,.3f} GiB"
    )


def show_estimate(job: Job, device: torch.device) -> None:
    """PLACEHOLDER"""
