"""The folder of a search: what it is about, and which of its stages are done.

OUTPUT/search.json                      the settings that all its students share
OUTPUT/knowledge/CUT/                   by pretrain/cache_knowledge.py
OUTPUT/untrained/seed-0/                students as they start
OUTPUT/students/CUT/                    by pretrain/run.py, one run for all seeds
OUTPUT/held_out/CUT/                    likewise, validation alone
OUTPUT/finetuned/CUT/TASK-SEED/         by finetune/trial.py
OUTPUT/records/CUT/STAGE.json           seconds and figures of a stage that is done
OUTPUT/records/CUT/failed.json          why its last stage failed; it is tried again
OUTPUT/logs/CUT-STAGE.log               what its program printed
OUTPUT/results.json results.csv summary.md curve.svg curve.png
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetune.classifier import fingerprint
from finetune.results import LOCK, check_writable, writing
from finetune.search.points import Point
from finetune.search.settings import SearchSettings
from finetune.tasks import load
from potstill.errors import InputError
from potstill.files import is_leftover, remove_leftovers, write_json
from potstill.lock import Lock, hold
from pretrain.ds_config import read_ds_config
from pretrain.run_folder import data_identity

SEARCH_FILE, RECORDS, FAILED = "search.json", "records", "failed"
FREE = {  # what may differ when a search goes on: what it grows by, and where things lie
    *("output", "data", "teacher", "ds_config", "task_data", "budget_hours", "dry_run"),
    *("keeps", "depths", "lengths", "widths", "keep_depth", "keep_length", "keep_width", "tasks"),
}

TUNING = ("max_length", "task_rows", "epochs", "task_lr", "task_batch_size")
"""Settings that count only beside tasks."""


def describe(settings: SearchSettings) -> dict[str, Any]:
    """The content of search.json: every setting that counts, and fingerprints of what it reads.

    Raises:
        InputError: the rows of a task, or a file, cannot be used.
    """
    shared = {n: value for n, value in asdict(settings).items() if n not in FREE}
    teacher = Path(settings.teacher)
    # Its keys in order, so that only what it says counts.
    ds_config = json.dumps(read_ds_config(Path(settings.ds_config)), sort_keys=True)
    tasks = {task: load(settings.task_settings(task)).sha256 for task in settings.task_names}
    return {
        "settings": shared,
        "teacher": fingerprint(teacher) if teacher.is_dir() else settings.teacher,
        "shards_sha256": data_identity(Path(settings.data)),
        "ds_config_sha256": hashlib.sha256(ds_config.encode()).hexdigest(),
        "tasks": tasks,
    }


def extended(output: Path, search: Mapping[str, Any]) -> Mapping[str, Any]:
    """What search.json will hold: the search, with the tasks of the one that is there.

    Raises:
        InputError: `output` cannot be written, holds something else, or another search (what
            differs is named).
    """
    check_writable(output)
    there = _read(output)
    return search if there is None else _merged(output, there, search)


def claim(output: Path, search: Mapping[str, Any]) -> Lock:
    """Make `output` this search's, or extend by tasks the one that is there.

    Returns:
        The lock on the folder, to be kept as long as the search runs.

    Raises:
        InputError: as `extended`, or another process runs there.
        TrainingError: it cannot be written.
    """
    extended(output, search)  # before anything is made
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    lock = hold(
        output / LOCK,
        f"--output {output}: another search runs there; wait for it, or give a new folder",
    )
    try:
        own = extended(output, search)  # again: another process may have been here first
        with writing(output):
            write_json(output / SEARCH_FILE, own)
            remove_leftovers(output / RECORDS)
    except BaseException:
        lock.release()
        raise
    return lock


def _read(output: Path) -> dict[str, Any] | None:
    path = output / SEARCH_FILE
    if path.exists():
        return read_own(path)
    others = [p for p in output.iterdir() if p.name != LOCK] if output.is_dir() else []
    if not all(is_leftover(path, SEARCH_FILE) for path in others):
        raise InputError(f"--output {output}: not empty and no search; give a new folder")
    return None


def _merged(output: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """The search that is there with the tasks of both; without tasks no fine-tuning differs."""
    tuned = here if here["tasks"] else there
    idle = () if there["tasks"] and here["tasks"] else TUNING
    before, now = (
        {**one["settings"], **{n: one[n] for n in one if n not in ("settings", "tasks")}}
        for one in (there, here)
    )
    differing = [
        f"{name} is {json.dumps(before.get(name))} there and {json.dumps(value)} here"
        for name, value in now.items()
        if name not in idle and before.get(name) != value
    ]
    differing += [
        f"the rows of {task} are others"
        for task, sha256 in here["tasks"].items()
        if there["tasks"].get(task, sha256) != sha256
    ]
    if differing:
        raise InputError(
            f"--output {output}: another search's folder ({'; '.join(differing)}); give a new one"
        )
    settings = here["settings"] | {name: tuned["settings"][name] for name in TUNING}
    return {**here, "settings": settings, "tasks": {**there["tasks"], **here["tasks"]}}


def read_own(path: Path) -> dict[str, Any]:
    """A JSON object that a search wrote.

    Raises:
        InputError: it is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove it") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object; remove it")
    return value


class Records:
    """Which stages of a cut are done, and what they found."""

    def __init__(self, output: Path, point: Point) -> None:
        self.folder = output / RECORDS / point.name
        self._facts = {"keep": point.keep, "choices": dict(point.choices)}

    def get(self, stage: str) -> dict[str, Any] | None:
        """The record of a stage; None for one that is not done.

        Raises:
            InputError: it is damaged.
        """
        path = self.folder / f"{stage}.json"
        return read_own(path) if path.exists() else None

    def done(self, stage: str, act: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The record of a stage, which is done now if it was not before.

        Args:
            act: does it; what it gives becomes the record, together with its seconds.
        """
        found = self.get(stage)
        if found is not None:
            return found
        start = time.monotonic()
        facts = act()
        record = {**self._facts, **facts, "seconds": round(time.monotonic() - start, 3)}
        self._write(stage, record)
        return record

    def fail(self, reason: str) -> None:
        """Write why the cut did not come to its end."""
        self._write(FAILED, {**self._facts, "reason": reason})

    def clear(self) -> None:
        """Forget a failure, since the cut is tried again."""
        with writing(self.folder):
            (self.folder / f"{FAILED}.json").unlink(missing_ok=True)

    def _write(self, stage: str, record: Mapping[str, Any]) -> None:
        with writing(self.folder):
            write_json(self.folder / f"{stage}.json", record)
