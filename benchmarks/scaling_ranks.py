"""The ranks of `benchmarks/scaling.py`: jobs behind one another, in one start of the launcher.

    deepspeed --num_gpus 2 benchmarks/scaling_ranks.py JOBS.json

A job is a run of the real trainer (`trainer`), steps without DeepSpeed (`bare`), or the time of
all-reduces (`link`). On a CPU each rank is bound to one core of its own.
"""

import json
import os
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare_step import BareStep, Learning, Pair, random_batch
from common import seconds
from torch import distributed as dist

from potstill.console import is_main_rank, program
from potstill.errors import InputError
from potstill.files import write_json
from pretrain import run
from pretrain.engine import start_ranks

LINK_BYTES = tuple(4**k * 1024 for k in range(1, 9))  # 4 KiB … 64 MiB


def bind_to_a_core() -> None:
    """One core for this rank, also for the threads that it starts later.

    Raises:
        InputError: fewer cores than ranks.
    """
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        raise InputError(f"--ranks {ranks}: this process may use {len(cores)} cores; take fewer")
    os.sched_setaffinity(0, {cores[rank]})


def bare(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of whole steps without DeepSpeed, what is trained, the share of the backward pass."""
    pair = replace(Pair.parse(job["pair"]), vocab=job["vocab"])
    rows, length = job["micro_batch"], job["length"]
    step = BareStep(Learning(pair), job["precision"], rows, length, device=device)
    batches = [
        random_batch(pair.vocab, rows, length, seed).to(device)
        for seed in range(job["accumulation"])
    ]
    step.step(*batches)  # warm-up
    taken = [seconds(partial(step.step, *batches), device) for _ in range(job["steps"])]
    loss = step.loss(batches[0])
    backward = seconds(loss.backward, device)
    step.optimizer.zero_grad()
    trained = sum(p.numel() for p in step.module.parameters() if p.requires_grad)
    share = backward * job["accumulation"] / statistics.median(taken)
    return {"seconds": taken, "trained": trained, "backward_share": min(share, 1.0)}


def link(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Seconds of an all-reduce of float32 between all ranks, by its bytes: medians."""
    found = []
    for size in LINK_BYTES:
        tensor = torch.ones(size // 4, device=device)
        dist.all_reduce(tensor)  # warm-up
        dist.barrier()
        taken = [seconds(partial(dist.all_reduce, tensor), device) for _ in range(job["steps"])]
        found.append((size, statistics.median(taken)))
    return {"all_reduce": found}


def trainer(arguments: list[str]) -> None:
    """A whole run of `pretrain/run.py`; its figures stand in its folder.

    The ranks stay together for the next job: DeepSpeed cannot join them twice in a process.
    """
    leave = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: None
    sys.argv = ["pretrain/run.py", *arguments]
    try:
        run.main()
    finally:
        dist.destroy_process_group = leave


@program
def main() -> None:
    """The program; see the module's docstring."""
    jobs = json.loads(Path(sys.argv[-1]).read_text())
    if not torch.cuda.is_available():
        bind_to_a_core()
    device = start_ranks()
    for job in jobs:
        if job["kind"] == "trainer":
            trainer(job["arguments"])
            continue
        found = (bare if job["kind"] == "bare" else link)(job, device)
        if is_main_rank():
            write_json(Path(job["output"]), found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
