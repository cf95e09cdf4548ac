"""A grid killed over and over: does every trial finish once, and are the tables the unbroken ones'?

    python benchmarks/grid_chaos.py --kills 20 --output runs/chaos

The same grid (the real teacher on rows of RTE and MRPC) runs once in peace, then in another folder
where SIGKILL comes at a random moment, from the first import on and within a share of the time that
the whole takes: to the driver, to a worker, or to the driver's whole group of processes; after the
last kill it may finish. A worker's trial is computed in halves when it runs again, whose dropout is
another, so the trials that say so (`accumulation` above 1) are left out of the comparison and
counted.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from common import DATA, RESULTS, ROOT, machine, packaged_teacher, write_report

from finetune.results import read_result

TABLES = ("results.csv", "results.json", "summary.md")
KINDS = ("driver", "worker", "group")
WORKER = "ray::Worker"
GONE_SECONDS = 90.0  # within which every process must be gone


def command(output: Path, chosen: argparse.Namespace) -> list[str]:
    """The grid: 2 tasks, 3 learning rates, and the seeds."""
    flags = ["--model", f"teacher={packaged_teacher()}", "--tasks", "rte,mrpc"]
    flags += ["--lr", "3e-5,5e-5,8e-5", "--batch_size", "16", "--epochs", "1"]
    flags += ["--seeds", str(chosen.seeds), "--workers", str(chosen.workers)]
    flags += ["--data", str(DATA / "glue"), "--precision", "fp32"]
    flags += ["--max_train_rows", str(chosen.rows), "--max_validation_rows", str(chosen.rows)]
    return [sys.executable, "finetune/grid.py", *flags, "--output", str(output)]


def start(output: Path, chosen: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """The grid in a group of its own, its words in a file beside its folder."""
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            command(output, chosen),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )


def kill(grid: "subprocess.Popen[bytes]", kind: str, dice: random.Random) -> str:
    """Kill what `kind` names, if it is there; what was killed."""
    if kind == "worker":
        try:
            family = psutil.Process(grid.pid).children(recursive=True)
            workers = [process for process in family if process.name().startswith(WORKER)]
            if not workers:
                return "nothing"
            dice.choice(workers).kill()
        except psutil.NoSuchProcess:  # it ended by itself in between
            return "nothing"
    elif kind == "group":
        os.killpg(grid.pid, signal.SIGKILL)
    else:
        grid.kill()
    return kind


def gone(family: Sequence[psutil.Process]) -> bool:
    """Whether all processes of a killed grid end by themselves in time."""
    _, alive = psutil.wait_procs(family, timeout=GONE_SECONDS)
    return not alive


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    """Which file every finished result is: a trial that runs again would write another."""
    found = {path: path.stat() for path in output.glob("trials/*/*/*/result.json")}
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def chaos(output: Path, chosen: argparse.Namespace, trials: int, life: float) -> dict[str, Any]:
    """Kill the grid `--kills` times, then let it finish; what was seen.

    Args:
        trials: of the whole grid.
        life: seconds after which it is killed at the latest.
    """
    dice = random.Random(chosen.seed)
    counts: dict[str, int] = dict.fromkeys((*KINDS, "nothing"), 0)
    rewritten, left, in_time, finished = 0, 0, 0, stamps(output)
    grid = start(output, chosen)
    while sum(counts[kind] for kind in KINDS) < chosen.kills and counts["nothing"] < 1000:
        time.sleep(dice.uniform(0, life))
        if grid.poll() is not None:  # it finished, or ends with the driver
            grid = start(output, chosen)
            continue
        family = psutil.Process(grid.pid).children(recursive=True)
        killed = kill(grid, dice.choice(chosen.kinds.split(",")), dice)
        counts[killed] += 1
        if killed in ("driver", "group"):
            grid.wait()
            left += not gone(family)
            grid = start(output, chosen)
        now = stamps(output)
        rewritten += sum(now.get(path) != stamp for path, stamp in finished.items())
        finished = now
        in_time += killed in KINDS and len(now) < trials
    status = grid.wait() or start(output, chosen).wait()
    now = stamps(output)
    rewritten += sum(now.get(path) != stamp for path, stamp in finished.items())
    return {
        "kills": counts,
        "kills_before_all_trials_were_done": in_time,
        "status": status,
        "finished": len(now),
        "run_again_though_finished": rewritten,
        "starts_that_left_processes": left,
    }


def scores(output: Path) -> dict[str, Any]:
    """Every score of each finished trial, epoch by epoch, and in how many parts it was computed."""
    found = {}
    for folder in sorted(output.glob("trials/*/*/*/")):
        result = read_result(folder)
        if result is not None:
            name = str(folder.relative_to(output))
            found[name] = (result["settings"]["accumulation"], result["epochs"])
    return found


def compare(whole: Path, broken: Path) -> dict[str, Any]:
    """Trials and tables of the two grids beside each other."""
    ours, theirs = scores(whole), scores(broken)
    halved = [name for name, (parts, _) in theirs.items() if parts > 1]
    differing = [name for name in ours if name not in halved and ours[name] != theirs.get(name)]
    same = [  # a grid that did not end well may have none
        (broken / name).is_file() and (whole / name).read_bytes() == (broken / name).read_bytes()
        for name in TABLES
    ]
    return {
        "trials": len(ours),
        "computed_in_halves": len(halved),
        "others_that_differ": len(differing),
        "tables_equal": all(same),
    }


def table(report: dict[str, Any]) -> str:
    """What was seen as Markdown."""
    rows = {**report["chaos"]["kills"], **report["chaos"], **report["compared"]}
    rows.pop("kills")
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    return "\n".join(["| what | seen |", "|---|---:|", *lines]) + "\n"


def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the grids")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS), help="what may be killed, with commas")
    parser.add_argument("--rows", type=int, default=400, help="training and validation rows a task")
    parser.add_argument("--seeds", type=int, default=10, help="of each of the 6 configurations")
    parser.add_argument("--life", type=float, default=0.2, help="share of the time of the whole")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what is killed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    if chosen.output.exists():
        parser.error(f"--output {chosen.output}: exists; give a new folder")
    if wrong := [kind for kind in chosen.kinds.split(",") if kind not in KINDS]:
        parser.error(f"--kinds {wrong[0]!r}: give some of {','.join(KINDS)}")
    chosen.output.mkdir(parents=True)
    began = time.perf_counter()
    if start(chosen.output / "whole", chosen).wait():
        sys.exit(f"the unbroken grid failed: see {chosen.output / 'whole.log'}")
    lasts = time.perf_counter() - began
    report = {
        "machine": machine(torch.device("cpu")),
        "rows": chosen.rows,
        "unbroken_seconds": lasts,
        "chaos": chaos(chosen.output / "broken", chosen, 6 * chosen.seeds, chosen.life * lasts),
        "compared": compare(chosen.output / "whole", chosen.output / "broken"),
    }
    write_report(chosen.results / "grid-chaos.json", report, table(report))
    print(json.dumps(report, indent=2), table(report), sep="\n")


if __name__ == "__main__":
    main()
