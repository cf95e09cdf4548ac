"""The table of what came of the parts, and their file."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import machine, write_report
from pretrain.environment import git_commit
from tests.chaos.common import Outcome

HEAD = ("part", "seed", "asked", "passed", "seconds", "commit", "details")


def read_report(path: Path | None) -> dict[str, Any]:
    """An earlier report: what is known of each part, by name; or an empty one."""
    if path is None or not path.exists():
        return {}
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def is_done(report: dict[str, Any], part: str, seed: int, count: int) -> bool:
    """Whether a report has a part with this seed and count, of this commit and without failures."""
    if part not in report or report[part]["failures"]:
        return False
    done = report[part]
    made = (done["seed"], done["asked"], _commit(done["machine"]["commit"]))
    return made == (seed, count, _commit(git_commit() or "unknown"))


def _commit(told: str) -> str:
    """A commit alone: the report itself may be what is changed in the tree."""
    return told.partition("+")[0]


def add(
    path: Path | None, report: dict[str, Any], name: str, seed: int, seconds: float, out: Outcome
) -> None:
    """Add a part's outcome and the machine, and write the file at once, its table beside it."""
    where = {**machine(torch.device("cpu")), "clock": "wall"}
    report[name] = {**asdict(out), "seed": seed, "seconds": round(seconds), "machine": where}
    if path is not None:
        write_report(path, report, table(report, report) + "\n")


def table(report: dict[str, Any], parts: Iterable[str]) -> str:
    """One Markdown table of the parts."""
    rows = [HEAD, ("---", *["---:"] * 4, "---", "---")]
    for name in parts:
        part = report[name]
        details = "; ".join(f"{what}: {figure}" for what, figure in part["details"].items())
        figures = (part[column] for column in HEAD[1:5])
        commit = part["machine"]["commit"][:10]
        rows.append((name, *(f"{figure:,}" for figure in figures), commit, details))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
