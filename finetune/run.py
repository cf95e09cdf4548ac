"""Fine-tune a model on a GLUE task, SQuAD or own rows, and score it after every epoch.

python finetune/run.py --model student/ --task rte --data glue/ --output runs/rte
python finetune/run.py --model student/ --train_file a.csv --validation_file b.csv --output runs/own
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.settings import parse
from finetune.trial import run_trial
from potstill.console import program, say
from potstill.signals import Signalled, Stopped, raised_signals


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune as the command line says; `arguments` stands in for it."""
    try:
        with raised_signals():
            where, data, settings = parse(arguments)
            report(run_trial(where, data, settings), Path(where.output))
    except Signalled as signalled:
        kept = "no result is kept: run the same command again, and it starts anew"
        raise Stopped(signalled.number, kept) from None


def report(result: Mapping[str, Any], output: Path) -> None:
    """Print the last epoch's scores beside the majority class's."""
    for split, scores in result["last"]["scores"].items():
        for name, value in scores.items():
            constant = result["majority"][split][name]
            say(f"{split} {name} {shown(value)} (majority class {shown(constant)})")
    say(f"result: {output / 'result.json'}")


def shown(value: float | None) -> str:
    """A score in per cent, as the papers print it."""
    return "undefined" if value is None else f"{100 * value:.1f}"


if __name__ == "__main__":
    main()
