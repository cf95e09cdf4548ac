"""Distil a student from a teacher (or pretrain one with `--objective mlm`).

deepspeed pretrain/run.py --ds_config ds_configs/zero1_bf16.json --data shards \\
    --teacher google-bert/bert-base-uncased --student_layers 6 --objective att-mse \\
    --max_steps 100000 --output runs/att-mse

Parse, check, build, train; nothing else.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from potstill.console import program, say
from potstill.signals import Signalled, Stopped
from pretrain.checkpoint import CheckpointWriter
from pretrain.config import Config, parse_config
from pretrain.engine import build_run, finish, start_ranks
from pretrain.launcher import Launcher
from pretrain.loop import Loop
from pretrain.plan import is_finished, make_plan
from pretrain.run_folder import describe_newest, release_folder
from pretrain.signals import Signals
from pretrain.students import check_all_done
from pretrain.summary import show_plan
from pretrain.watch import Watch


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """The program; see the module's docstring."""
    launcher, writer = Launcher(), CheckpointWriter()
    with Signals() as signals:
        try:
            config = parse_config(arguments)
            device = start_ranks()
            kept = partial(describe_newest, Path(str(config.run.output)))
            with Watch(signals, launcher, kept, writer.wait_briefly) as watch:
                try:
                    run(config, device, signals, writer)
                except RuntimeError as error:  # what torch raises when another rank is lost
                    raise (watch.explain() or error) from error
        except Signalled as signalled:
            raise Stopped(signalled.number, "it had not begun to train") from None


def run(config: Config, device: torch.device, signals: Signals, writer: CheckpointWriter) -> None:
    """Check, build and train, on ranks that have met."""
    try:
        plan = make_plan(config, device)
        show_plan(plan, device)
        if is_finished(plan):
            for own in plan.students:
                say(f"finished already: {own.member.folder}/student")
            check_all_done(plan.stopped)
            return
        loop = Loop(*build_run(plan, device, signals, writer))
        with loop.obeying_signals():
            loop.train()
            finish(loop, plan)
    finally:
        release_folder()


if __name__ == "__main__":
    main()
