"""Run a teacher once over the shards and store its knowledge, to train students without it.

deepspeed pretrain/cache_knowledge.py --ds_config ds_configs/zero1_bf16.json \\
    --teacher google-bert/bert-base-uncased --data shards --objective hid-seq \\
    --keep 1l_10t_0.1h --dtype int8 --output knowledge/hid-seq
deepspeed pretrain/run.py --knowledge knowledge/hid-seq --data shards --objective hid-seq ...

`--plan` only prints what that would take, and from how many students on it pays.
"""

from collections.abc import Sequence

import torch
from torch import distributed as dist

from potstill.console import program, say
from potstill.signals import Signalled, Stopped, raised_signals
from pretrain.agreement import from_main_rank
from pretrain.engine import start_ranks
from pretrain.knowledge.job import Job, make_job
from pretrain.knowledge.plan import describe, show_estimate
from pretrain.knowledge.settings import parse_config
from pretrain.knowledge.writer import is_stored, store
from pretrain.run_folder import release_folder


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """The program; see the module's docstring."""
    try:
        with raised_signals():
            config = parse_config(arguments)
            device = start_ranks()
            try:
                run(make_job(config), device)
            finally:
                release_folder()
            dist.destroy_process_group()
    except Signalled as signalled:
        kept = "the files that are written stay: run the same command again to go on"
        raise Stopped(signalled.number, kept) from None


def run(job: Job, device: torch.device) -> None:
    """Plan, or store; all ranks call it."""
    if job.config.plan:
        describe(job)
        show_estimate(job, device)
        return
    done = from_main_rank(lambda: is_stored(job))
    if done:
        say(f"finished already: {job.config.folder}")
        return
    describe(job)
    store(job, device)
    say(f"written    {job.config.folder}")


if __name__ == "__main__":
    main()
