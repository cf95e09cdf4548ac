"""Distil a student from a teacher (or pretrain one with `--objective mlm`).

deepspeed pretrain/run.py --ds_config ds_configs/zero1_bf16.json --data shards \\
    --teacher google-bert/bert-base-uncased --student_layers 6 --objective att-mse \\
    --max_steps 100000 --output runs/att-mse

Parse, check, build, train; nothing else.
"""

from collections.abc import Sequence

from potstill.console import program, say
from pretrain.config import parse_config
from pretrain.engine import build_run, finish, start_ranks
from pretrain.loop import Loop
from pretrain.plan import is_finished, make_plan
from pretrain.signals import Signals
from pretrain.students import check_all_done
from pretrain.summary import show_plan


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """The program; see the module's docstring."""
    with Signals() as signals:
        config = parse_config(arguments)
        device = start_ranks()
        plan = make_plan(config, device)
        show_plan(plan, device)
        if is_finished(plan):
            for own in plan.students:
                say(f"finished already: {own.member.folder}/student")
            check_all_done(plan.stopped)
            return
        loop = Loop(*build_run(plan, device, signals))
        with loop.obeying_signals():
            loop.train()
            finish(loop, plan)


if __name__ == "__main__":
    main()
