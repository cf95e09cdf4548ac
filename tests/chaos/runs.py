"""The tiny runs that kills, preemptions and changed worlds happen to, and what they leave."""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from potstill.files import read_sealed_json
from tests.chaos.starts import Started, start_run
from tests.launch import (
    SEVERAL,
    START_LIMIT,
    Materials,
    environment,
    flags,
    make_materials,
    write_ds_config,
)

STEPS, SAVE_EVERY, VALIDATE_EVERY = 120, 5, 6
MARKERS = ",".join(f"0.{tenth}" for tenth in range(1, 10))
GLOBAL_BATCH, MICRO_BATCH = 8, 2
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Setup:
    """A kind of run: on how many ranks, started how, under which stage of ZeRO."""

    ranks: int
    stage: int
    launcher: bool = True
    workers: int = 0

    @property
    def name(self) -> str:
        """For folders and failures."""
        started = "deepspeed" if self.launcher else "bare"
        workers = "-loader" if self.workers else ""
        return f"{started}-{self.ranks}-zero{self.stage}{workers}"

    @property
    def plain(self) -> "Setup":
        """The setup whose numbers are the same: who starts ranks and loads rows changes none."""
        return replace(self, launcher=False, workers=0)


def materials_beside(folder: Path) -> Materials:
    """Shards and teachers for all parts, made once, beside their folders."""
    return make_materials(folder.parent)


def arguments(setup: Setup, materials: Materials, run: Path, **changes: Any) -> list[str]:
    """The trainer's flags: losses with projections and a memory, dropout, a line for each step.

    A step is `GLOBAL_BATCH` rows on any number of ranks up to four.
    """
    accumulation = GLOBAL_BATCH // MICRO_BATCH // setup.ranks
    zero = {"stage": setup.stage}
    config = run.parent / f"{setup.name}.json"
    write_ds_config(config, MICRO_BATCH, accumulation, zero_optimization=zero)
    given: dict[str, Any] = {
        "ds_config": config,
        "data": materials.ragged,
        "teacher": materials.teacher,
        "objective": "1:0.5*kd+att-mse+hid-seq+hid-cls-contrast",
        "contrast_negatives": 50,  # the memory goes round, and not in whole steps
        "student_layers": 2,
        "student_hidden": 16,
        "dropout": 0.1,
        "max_steps": STEPS,
        "validate_every": VALIDATE_EVERY,
        "save_every": SAVE_EVERY,
        "finetune_markers": MARKERS,
        "loader_workers": setup.workers,
        "log_every": 1,
        "lr": 2e-3,
        "output": run,
    }
    return flags(**(given | changes))


def start(setup: Setup, materials: Materials, run: Path, log: str, **changes: Any) -> Started:
    """Start a run, or go on with it."""
    words = arguments(setup, materials, run, **changes)
    place = environment(materials.folder)
    return start_run(words, setup.ranks, setup.launcher, place, run.parent / f"{log}.log")


def start_several(
    setup: Setup, materials: Materials, several: Sequence[list[str]], log: Path
) -> Started:
    """Start a setup's ranks once for runs behind one another; each with its flags."""
    path = log.with_suffix(".json")
    path.write_text(json.dumps(several))
    place = environment(materials.folder)
    return start_run([str(path)], setup.ranks, setup.launcher, place, log, SEVERAL)


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's metrics; the last may be torn."""
    path, lines = run / "metrics.jsonl", []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


_STEP = re.compile(rb'\{"kind": "train", "step": (\d+),')


def last_step(run: Path) -> int:
    """The last step in a run's metrics, 0 for none; reads only the end of the file."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20_000))
            found = _STEP.findall(file.read())
    except FileNotFoundError:
        return 0
    return int(found[-1]) if found else 0


def whole_checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints whose `checkpoint.json` is as it was written, ascending."""
    steps = []
    for folder in sorted(run.glob("checkpoints/step-*")):
        try:
            read_sealed_json(folder / "checkpoint.json")
        except (OSError, ValueError):
            continue  # being removed, or not whole
        steps.append(int(folder.name.removeprefix("step-")))
    return steps


@dataclass(frozen=True)
class Seen:
    """What stands in a run's folder.

    Attributes:
        newest: step of the newest whole checkpoint, None for none. step: the last in the metrics.
        resumes: steps that starts went on from, in order.
    """

    newest: int | None
    step: int
    resumes: tuple[int, ...]

    @classmethod
    def of(cls, run: Path) -> "Seen":
        """Look into a folder, which may not be there yet."""
        lines, whole = read_lines(run), whole_checkpoints(run)
        events = [line for line in lines if line["kind"] == "event"]
        steps = [line["step"] for line in lines if line["kind"] == "train"]
        resumes = tuple(line["step"] for line in events if line["event"] == "resume")
        return cls(whole[-1] if whole else None, steps[-1] if steps else 0, resumes)


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        losses: step, loss and gradient norm of each line. held_out: step and loss.
        weights: digest of each exported model, by its place in the run's folder.
    """

    losses: list[tuple[int, float, float]]
    held_out: list[tuple[int, float]]
    weights: dict[str, str]

    @classmethod
    def of(cls, run: Path) -> "Result":
        """Read a run's folder."""
        lines = read_lines(run)
        train = [line for line in lines if line["kind"] == "train"]
        validation = [line for line in lines if line["kind"] == "validation"]
        exported = sorted([*run.glob(f"student/{WEIGHTS}"), *run.glob(f"markers/*/{WEIGHTS}")])
        return cls(
            [(line["step"], line["loss"], line["grad_norm"]) for line in train],
            [(line["step"], line["loss"]) for line in validation],
            {str(p.relative_to(run)): _digest(p) for p in exported},
        )

    def differences(self, unbroken: "Result") -> list[str]:
        """In what this is not bitwise the unbroken run."""
        faults = []
        steps = [step for step, *_ in self.losses]
        if steps != [step for step, *_ in unbroken.losses]:
            repeated = sorted({step for step in steps if steps.count(step) > 1})
            faults.append(f"{len(steps)} steps in the metrics, repeated {repeated[:5]}")
        pairs = zip(self.losses, unbroken.losses, strict=False)
        other = [mine[0] for mine, theirs in pairs if mine != theirs]
        if other:
            faults.append(f"losses differ from step {other[0]} on")
        if self.held_out != unbroken.held_out:
            faults.append("held-out losses differ")
        names = sorted(self.weights.keys() | unbroken.weights.keys())
        changed = [n for n in names if self.weights.get(n) != unbroken.weights.get(n)]
        return faults + ([f"weights differ: {', '.join(changed)}"] if changed else [])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing happened to: its folder, and the seconds until its first step."""

    run: Path
    result: Result
    first_step_seconds: float


def unbroken(setup: Setup, folder: Path) -> Unbroken:
    """What a setup comes to if nothing happens; run once for all parts beside this one's folder.

    The first start of all builds DeepSpeed's op, which nobody must kill.

    Raises:
        RuntimeError: it did not end well.
    """
    return _unbroken(setup.plain, folder.parent)


@cache
def _unbroken(setup: Setup, base: Path) -> Unbroken:
    place = base / f"unbroken-{setup.name}"
    place.mkdir(parents=True)
    begin, first = time.monotonic(), 0.0
    started = start(setup, make_materials(base), place / "run", "unbroken")
    try:
        while not started.ended() and time.monotonic() - begin < START_LIMIT:
            if not first and last_step(place / "run"):
                first = time.monotonic() - begin
            time.sleep(0.02)
    finally:
        started.end()
    if set(started.statuses()) != {0}:
        raise RuntimeError(f"unbroken {setup.name}: {started.statuses()}, {started.tail(2000)}")
    return Unbroken(place / "run", Result.of(place / "run"), first)


def shares(words: Sequence[str]) -> str:
    """How often each word occurs, in one line: `rank 3, group 2`."""
    counted = {word: words.count(word) for word in words}
    return ", ".join(f"{word} {n}" for word, n in sorted(counted.items(), key=lambda i: -i[1]))
