"""A head for the real teacher, which has none: two ways to get one, and how good each is.

    python benchmarks/mlm_head.py --output runs/head

`frozen` trains the MLM head alone on the frozen encoder (`--objective mlm --freeze encoder`),
`whole` all of the model from the same start. Same data, steps and batch; the held-out MLM loss of
both goes into `results/mlm-head.{json,md}`. Parts continue where they stopped.
"""

import argparse
import json
from pathlib import Path

from common import (
    DATA,
    RESULTS,
    ROOT,
    execute,
    launch,
    metrics,
    packaged_teacher,
    shard,
    without,
    write_ds_config,
    write_report,
)

WAYS = {"frozen": ["--freeze", "encoder", "--lr", "1e-3"], "whole": ["--lr", "3e-4"]}
ROWS = 128  # a step: 16,384 tokens


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="folder of shards and runs")
    parser.add_argument("--shards", type=Path, help="shards of the corpus, if they exist")
    parser.add_argument("--ds_config", type=Path, default=ROOT / "ds_configs" / "cpu_bf16.json")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    chosen = parser.parse_args()
    output = chosen.output.absolute()
    vocabulary = DATA / "vocab" / "bert-base-uncased"
    shards = chosen.shards or shard(DATA / "corpus", vocabulary, output / "shards")
    sizes = write_ds_config(chosen.ds_config, output / "ds_config.json", ROWS, chosen.ranks)
    report = {}
    for way in chosen.ways.split(","):
        folder = output / way
        execute(
            launch(chosen.ranks, "pretrain/run.py")
            + ["--ds_config", str(sizes), "--data", str(shards), "--objective", "mlm", *WAYS[way]]
            + ["--student", str(packaged_teacher()), "--dropout", "0", "--log_every", "10"]
            + ["--max_steps", str(chosen.steps), "--validation_rows", "512"]
            + ["--output", str(folder)]
        )
        lines = [line for line in metrics(folder) if line["kind"] == "validation"]
        train = [line for line in metrics(folder) if line["kind"] == "train"]
        report[way] = {
            "before": lines[0]["terms"]["mlm"],
            "after": lines[-1]["terms"]["mlm"],
            "tokens": train[-1]["tokens"],
            "seconds": train[-1]["seconds"],
            "environment": without(folder / "environment.json", "command"),
        }
    rows = [
        f"| {way} | {r['before']:.2f} | {r['after']:.2f} | {r['tokens']:,} | {r['seconds']:.0f} |"
        for way, r in report.items()
    ]
    head = ["| trained | held-out MLM loss before | after | tokens | seconds |"]
    head.append("|---|---:|---:|---:|---:|")
    text = "\n".join(head + rows) + "\n"
    write_report(chosen.results / "mlm-head.json", report, text)
    print(json.dumps(report) if chosen.json else text)


if __name__ == "__main__":
    main()
