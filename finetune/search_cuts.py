"""Compare cuts of stored knowledge: what are students worth by the bytes that they learnt from?

python finetune/search_cuts.py --data shards --teacher T --objective hid-seq --student_layers 3 \\
    --ds_config ds_configs/cpu_bf16.json --keeps 1l_1t_0.05h,1l_10t_0.1h,2l_50t --steps 500 \\
    --tasks sst2,mrpc --task_data glue --output search
python finetune/search_cuts.py … --budget_hours 8      stops before the hours are over

Each cut is stored once and learnt from by a student for each seed, the cheapest cut first. Run the
same command again after any interruption: what is done is never done again. The curve is
OUTPUT/curve.svg, its table OUTPUT/summary.md.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import transformers

from data_prep.shard_format import read_manifest
from finetune.search.curve import write_curve
from finetune.search.folder import claim, describe, extended
from finetune.search.points import Point, points_of
from finetune.search.results import read_points, write_tables
from finetune.search.runs import Runner
from finetune.search.settings import SearchSettings, parse
from finetune.search.students import check_students
from potstill.console import program, progress, say
from potstill.errors import PotstillError, TrainingError
from potstill.signals import Signalled, Stopped, raised_signals


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the search of the command line; `arguments` stands in for it."""
    try:
        with raised_signals():
            settings = parse(arguments)
            transformers.utils.logging.disable_progress_bar()  # of loading weights: it breaks ours
            manifest = read_manifest(Path(settings.data))
            layers = check_students(settings, manifest)
            points = points_of(settings, layers, manifest.seq_length)
            runner = Runner(settings, manifest, layers)
            runner.check(points)
            search, output = describe(settings), Path(os.path.abspath(settings.output))
            if settings.dry_run:
                extended(output, search)
                say("\n".join(point.name for point in points))
                return
            with claim(output, search):
                run(settings, runner, points, output)
    except Signalled as signalled:
        kept = "what is done is kept: run the same command again, and it goes on"
        raise Stopped(signalled.number, kept) from None


def run(settings: SearchSettings, runner: Runner, points: Sequence[Point], output: Path) -> None:
    """Do what is not done, one point after the other, the tables and the curve behind each.

    Raises:
        TrainingError: points failed, or the hours were over before all were done.
    """
    waiting = [point for point in points if not runner.is_done(point)]
    say(f"{len(points)} points, {len(points) - len(waiting)} of them finished before")
    end = time.monotonic() + 3600 * (settings.budget_hours or float("inf"))
    failed, tried = 0, 0
    with progress(total=len(points), initial=len(points) - len(waiting), desc="points") as bar:
        for point in waiting:
            if end - time.monotonic() < runner.longest(points):
                break
            failed += not attempt(runner, point)
            tried += 1
            show(output)
            bar.update()
    show(output)
    say(f"curve: {output / 'curve.svg'}; tables: summary.md, results.csv, results.json beside it")
    if failed or tried < len(waiting):
        raise TrainingError(unfinished(failed, len(waiting) - tried))


def attempt(runner: Runner, point: Point) -> bool:
    """Whether a point came to its end; if not, that and why is told and written."""
    try:
        runner.run(point)
    except (PotstillError, RuntimeError) as error:  # torch raises the latter where memory ends
        reason = " ".join(str(error).split())[:1000]
        say(f"{point.name}: failed: {reason}")
        runner.fail(point, reason)
        return False
    return True


def show(output: Path) -> None:
    """Write the tables, and draw the curve, of what is finished."""
    points = read_points(output)
    write_tables(output, points)
    if points:
        write_curve(output, points)


def unfinished(failed: int, left: int) -> str:
    """What the program ends with where not all was done."""
    parts = [f"{failed} points failed (see summary.md)"] if failed else []
    parts += [f"--budget_hours is over with {left} points left"] if left else []
    return f"{', '.join(parts)}; start the same command again to go on"


if __name__ == "__main__":
    main()
