"""Fine-tune models on tasks with every combination of learning rate, batch size, epochs and seed.

python finetune/grid.py --model small/ base=models/base --tasks rte,mrpc --data glue/ --output grid
python finetune/grid.py --model small/ --tasks all --preset htd --data glue/ --output grid
python finetune/grid.py --teacher runs/rte/model --tasks rte --preset htd --data glue/ --output grid
python finetune/grid.py … --address auto                 on a running Ray cluster

Run the same command again after any interruption: finished trials are never run again. The table
is in OUTPUT/summary.md, all scores in OUTPUT/results.csv.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from finetune.grids.check import Survey, survey
from finetune.grids.connection import check_machine, connected
from finetune.grids.distillation import survey_distillations
from finetune.grids.file import claim, describe, withdraw
from finetune.grids.loop import Loop
from finetune.grids.plan import Planned, plan, rows_of
from finetune.grids.settings import GridSettings, parse
from finetune.grids.tables import read_failed, write_tables
from finetune.results import check_writable
from potstill.console import program, say
from potstill.errors import TrainingError
from potstill.signals import Signalled, Stopped
from pretrain.signals import Signals


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the grid of the command line; `arguments` stands in for it."""
    try:
        with Signals() as signals:
            settings = parse(arguments)
            check_writable(Path(settings.output))
            if not settings.dry_run:
                check_machine(settings)
            found = survey(settings) if settings.teacher is None else survey_distillations(settings)
            trials = plan(settings, found)
            if settings.dry_run:
                show(trials, found)
                return
            run(settings, found, trials, signals)
    except Signalled as signalled:
        kept = "finished trials are kept: run the same command again, and it goes on"
        raise Stopped(signalled.number, kept) from None


def run(settings: GridSettings, found: Survey, trials: Sequence[Planned], signals: Signals) -> None:
    """Run what is not finished, and write the tables.

    Raises:
        TrainingError: trials failed; the tables are written all the same.
    """
    output = Path(os.path.abspath(settings.output))
    with claim(output, describe(settings, found)):
        loop = Loop(trials, settings, lambda: signals.pending)
        say(f"{len(trials)} trials, {len(trials) - loop.open} of them finished before")
        if loop.open:
            paths = [model.path for model in found.models.values()]
            paths += [Path(settings.data).absolute()] if settings.data is not None else []
            paths += [task.teacher for task in found.tasks.values() if task.teacher is not None]
            with signals.deferred(), connected(settings, output, paths) as cluster:
                withdraw(output)
                loop.run(cluster)
        write_tables(output)
        say(f"tables: {output / 'summary.md'}, results.csv, results.json")
        if loop.failed:
            raise TrainingError(failures(output, loop.failed))


def failures(output: Path, number: int) -> str:
    """Prints a line for every trial that failed; what the program ends with."""
    for one in read_failed(output):
        say(f"failed: {one['task']} {one['model']} {one['configuration']}: {one['reason']}")
    return (
        f"trials that failed: {number} (see {output / 'summary.md'}); start the same command again "
        "to try them once more"
    )


def show(trials: Sequence[Planned], found: Survey) -> None:
    """Print what the grid would do."""
    for line in rows_of(list(trials), found.tasks):
        say(line)
    total = sum(trial.cost for trial in trials)
    say(f"{len(trials)} trials, together about {total:.2g} FLOP")


if __name__ == "__main__":
    main()
