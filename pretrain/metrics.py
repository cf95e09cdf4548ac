"""metrics.jsonl: what a run measured, one JSON object a line."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.console import is_main_rank, say
from potstill.files import write_text


class Metrics:
    """Appends lines on rank 0, and mirrors numbers to monitors.

    Attributes:
        fault: why a line could not be written, None while all could.

    Args:
        path: the file; None writes nothing (a dry run).
        monitor: what else gets the numbers, for example `pretrain.monitors.Monitors`.
    """

    def __init__(self, path: Path | None, monitor: Any = None) -> None:
        self.path = path if is_main_rank() else None
        self.monitor = monitor
        self.fault: str | None = None

    def cut_behind(self, step: int, validated: int) -> None:
        """Drop what a resumed run will write again: lines of steps after `step`, validations after
        that of step `validated`, and torn lines."""
        lines = self._lines()
        if self.path is None or not lines:
            return
        lost = sum(_parsed(line).get("kind") == "train" for line in lines)
        if step < 0 and lost:
            say(f"note: {self.path} has {lost} lines and no checkpoint: they are made again")
        last = {"validation": validated}  # of this very step there may be one behind the checkpoint
        kept = []
        for line in lines:
            entry = _parsed(line)
            if entry and entry["step"] <= min(step, last.get(str(entry.get("kind")), step)):
                kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))

    def last_validation(self, step: int) -> float | None:
        """The loss of the last validation up to a step, on rank 0."""
        losses = [
            float(entry["loss"])
            for entry in map(_parsed, self._lines())
            if entry.get("kind") == "validation" and entry["step"] <= step
        ]
        return losses[-1] if losses else None

    def _lines(self) -> list[str]:
        if self.path is None or not self.path.exists():
            return []
        return self.path.read_text(errors="replace").splitlines()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one line of `kind` train, validation or event, and flush it to the disk."""
        if self.path is None:
            return
        line = json.dumps({"kind": kind, "step": step, **values}, allow_nan=True)
        try:
            with open(self.path, "a") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # the loop ends the run, on all ranks together
            self.fault = f"{self.path} cannot be written ({error.strerror or error})"
            return
        if self.monitor is not None and self.monitor.enabled and kind != "event":
            self.monitor.write_events(
                [(f"{kind}/{name}", value, step) for name, value in _numbers(values)]
            )

    def monitor_failed(self, step: int, name: str, reason: str) -> None:
        """Write that a monitor is left out from now on."""
        self.write("event", step, event="monitor failed", monitor=name, reason=reason)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat.append((prefix + name, float(value)))
    return flat


def _parsed(line: str) -> dict[str, Any]:
    """A line of the file; one that a kill has torn is empty."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else {}
