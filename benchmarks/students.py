"""How much of the teacher's cost goes away when several students share it?

    python benchmarks/students.py --teacher MODEL --data SHARDS --ds_config ds_configs/cpu.json

Times a training step of N = 1, 2, 4 students together against the same students each trained alone,
all in one process and in turns, so that the machine's noise hits both alike. A student is half of
the teacher's layers under Att-MSE unless `--students` gives others; they differ by their seed.
The ratio is that of a turn: seconds together / sum of seconds alone; beside it the same by the
formulas of `pretrain/flops.py`.

On a CPU with one thread (OMP_NUM_THREADS=1) the clock is the process's own CPU time, so that other
programs on the machine hardly matter; otherwise it is the wall clock.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import quartiles, seconds, write_report
from torch import distributed as dist

from potstill.console import is_main_rank, program, progress, say
from potstill.files import write_json
from pretrain.config import parse_config
from pretrain.engine import build_run, start_ranks
from pretrain.environment import describe_environment
from pretrain.loop import Loop
from pretrain.plan import Plan, make_plan
from pretrain.summary import alone_flops, describe_shape

RESULTS = Path(__file__).parent / "results" / "students-cpu.json"
SIZES = (1, 2, 4)
WARM_UP = 2  # steps
NO_MACHINE = ("command", "machine")  # paths and host names say nothing about speed


@dataclass(frozen=True)
class Row:
    """Medians in seconds per step, and the ratio together / alone with its quartiles."""

    students: int
    together_seconds: float
    alone_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    flops_ratio: float


class Trainer:
    """A group of students that takes steps, and their cost by the formulas."""

    def __init__(self, options: argparse.Namespace, students: dict[str, Any], device: torch.device):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "students.json"
            write_json(file, students)
            self.plan: Plan = make_plan(parse_config(self._flags(options, folder, file)), device)
            self.loop = Loop(*build_run(self.plan, device))
        self._batches, self._device = self.loop.run.batches(0), device

    @staticmethod
    def _flags(options: argparse.Namespace, folder: str, students: Path) -> list[str]:
        """A dry run's: it writes nothing, and its steps cost what those of a real one do."""
        given = {
            "--data": options.data,
            "--teacher": options.teacher,
            "--ds_config": options.ds_config,
            "--max_steps": WARM_UP + options.turns + 1,
            "--log_every": 10**6,
            "--objective": "att-mse",
            "--output": f"{folder}/run",
            "--students": students,
        }
        return [str(word) for pair in given.items() for word in pair] + [
            "--no_check_shards",
            "--dry_run",
        ]

    def seconds(self, clock: str) -> float:
        """Seconds of one step by a clock of `common.CLOCKS`."""
        return seconds(lambda: self.loop.step(self._batches), self._device, clock)


def measure(together: dict[int, Trainer], alone: Sequence[Trainer], turns: int) -> list[Row]:
    """Let every group take a step in each turn; the first turns are not counted."""
    clock = clock_name()
    groups, lone = [], []
    for turn in progress(range(WARM_UP + turns), desc="turns"):
        times = {size: trainer.seconds(clock) for size, trainer in together.items()}
        each = [trainer.seconds(clock) for trainer in alone]
        if turn >= WARM_UP:
            groups.append(times)
            lone.append(each)
    return [_row(size, together[size].plan, groups, lone) for size in together]


def _row(size: int, plan: Plan, groups: list[dict[int, float]], lone: list[list[float]]) -> Row:
    sums = [sum(each[:size]) for each in lone]
    ratios = [times[size] / total for times, total in zip(groups, sums, strict=True)]
    spread = quartiles(ratios)
    return Row(
        students=size,
        together_seconds=statistics.median(times[size] for times in groups),
        alone_seconds=statistics.median(sums),
        ratio=spread["median"],
        ratio_low=spread["low"],
        ratio_high=spread["high"],
        flops_ratio=plan.flops_per_token / sum(alone_flops(plan, own) for own in plan.students),
    )


def clock_name() -> str:
    """The clock that fits the device; see the module's docstring."""
    own = not torch.cuda.is_available() and torch.get_num_threads() == dist.get_world_size() == 1
    return "process CPU time" if own else "wall"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| students | together, s a step | each alone, s in sum | together / alone (quartiles) | "
        "by FLOPs | time per student |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.students} | {row.together_seconds:.3f} | {row.alone_seconds:.3f} "
            f"| {row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f}) "
            f"| {row.flops_ratio:.2f} | {row.ratio - 1:+.0%} |"
        )
    return "\n".join(lines) + "\n"


def record(options: argparse.Namespace, plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """Figures with all that they depend on."""
    environment = describe_environment(dist.get_world_size())
    machine = {name: value for name, value in environment.items() if name not in NO_MACHINE}
    own = {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
    assert plan.teacher is not None
    shapes = {s.member.name: describe_shape(s.student) for s in plan.students}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine | own | {"clock": clock_name()},
        "settings": {
            "teacher": asdict(plan.teacher.shape),
            "students": shapes,
            "objectives": [s.config.objective.objective for s in plan.students],
            "precision": str(plan.dtype),
            "global_batch": plan.sizes.global_batch,
            "micro_batch": plan.sizes.micro_batch,
            "seq_length": plan.manifest.seq_length,
            "turns": options.turns,
        },
        "rows": [asdict(row) for row in rows],
    }


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Folder of shards.")
    parser.add_argument("--teacher", required=True, help="Hugging Face folder or hub name.")
    parser.add_argument(
        "--ds_config", default="ds_configs/cpu.json", help="Batch, precision, ZeRO."
    )
    parser.add_argument("--students", type=Path, help="Other students, as many as are measured.")
    parser.add_argument("--turns", type=int, default=12, help="Timed steps of each group.")
    parser.add_argument("--json", type=Path, default=RESULTS, help="Figures; a .md stands beside.")
    parser.add_argument("--local_rank", type=int, default=-1, help="Set by the launcher.")
    options = parser.parse_args()
    students = {f"seed-{n}": {"student_seed": n} for n in range(max(SIZES))}
    if options.students:
        students = json.loads(options.students.read_text())
    device = start_ranks()
    alone = [Trainer(options, {name: own}, device) for name, own in students.items()]
    together = {
        size: Trainer(options, dict([*students.items()][:size]), device)
        for size in SIZES
        if size <= len(students)
    }
    rows = measure(together, alone, options.turns)
    say(table(rows))
    if is_main_rank():
        plan = together[max(together)].plan
        write_report(options.json, record(options, plan, rows), table(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
