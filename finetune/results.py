"""The folder of a fine-tuning run: config.json names the run, result.json is there once it is done.

OUTPUT/config.json     settings of the latest start, and the fingerprints of model and data
OUTPUT/log.jsonl       what the Trainer logged, a JSON object a line
OUTPUT/model/          the fine-tuned model and its tokenizer
OUTPUT/predictions.json, nbest.json    SQuAD: the answers after the last epoch
OUTPUT/result.json     scores; written last, so that its presence says that all is there
OUTPUT/.lock           held by the process that runs there
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from potstill.errors import InputError, TrainingError
from potstill.files import is_leftover, remove_leftovers, write_json, write_text
from potstill.lock import Lock, hold
from potstill.secrets import redacted

PLACES = ("model", "data", "train_file", "validation_file")  # may move; the fingerprints may not
ELSEWHERE = (*PLACES, "accumulation")  # the settings that may differ: an update stays what it is
OWN = ("model", "config.json", "log.jsonl", "result.json", "predictions.json", "nbest.json")
LOCK = ".lock"
INTERMEDIATE, PREDICTION = "intermediate", "prediction"  # stages in a distillation's log


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None for one that is not finished.

    Raises:
        InputError: result.json is there but cannot be read.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    return _read_json(path)


def write_result(folder: Path, result: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> None:
    """Write log.jsonl, then result.json without secrets: with it the run counts as finished.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """
    with writing(folder):
        write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
        write_json(folder / "result.json", redacted(result))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written ends the run with a line.

    Raises:
        TrainingError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{folder}: cannot be written ({error}); make room there and start the same "
            "command again"
        ) from error


def check_output(folder: Path) -> None:
    """Find out before anything long whether a run can live in `folder`.

    Raises:
        InputError: it cannot be written, it holds other files, or a run whose files are damaged.
    """
    check_writable(folder)
    if (folder / "config.json").exists():
        _read_json(folder / "config.json")
        read_result(folder)
    elif folder.exists() and not _only_leftovers(folder):
        raise InputError(
            f"--output {folder}: not empty and not a fine-tuning run; give a new folder"
        )


def check_writable(folder: Path, flag: str = "--output") -> None:
    """Raise an InputError where `folder` is none, or can neither be written nor made."""
    places = (folder, *folder.absolute().parents)
    try:
        there = next(place for place in places if _exists(place))
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}; give another folder") from error
    if not there.is_dir():
        raise InputError(f"{flag} {folder}: {there} is no folder; give another one")
    if not os.access(there, os.W_OK):
        raise InputError(f"{flag} {folder}: the folder cannot be written; give another one")


def _exists(place: Path) -> bool:
    """`Path.exists`, which tells nothing of a name that is too long."""
    try:
        place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def claim(folder: Path, config: Mapping[str, Any]) -> Lock:
    """Make `folder` this run's, or find that it already is; clears what a killed run left.

    Returns:
        The lock on the folder, to be kept as long as the run writes there.

    Raises:
        InputError: as `check_output`, or it holds another run (the differing settings are named),
            or another process runs there.
        TrainingError: it cannot be written.
    """
    check_output(folder)
    here = redacted(json.loads(json.dumps(config)))
    _is_this_run(folder, here)  # another run's folder does not even get a lock
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = hold(
        folder / LOCK,
        f"--output {folder}: another process fine-tunes there; wait for it, or give a new folder",
    )
    if not (_is_this_run(folder, here) and (folder / "result.json").exists()):
        with writing(folder):
            write_json(folder / "config.json", here)
    remove_leftovers(folder, *OWN)
    return lock


def _only_leftovers(folder: Path) -> bool:
    return all(path.name == LOCK or is_leftover(path, *OWN) for path in folder.iterdir())


def _is_this_run(folder: Path, here: dict[str, Any]) -> bool:
    """Whether its config.json is `here`; False without one. Raises an InputError for another."""
    path = folder / "config.json"
    if not path.exists():
        return False
    there = redacted(_read_json(path))
    names = [name for name in (*here, *(set(there) - set(here))) if name not in ELSEWHERE]
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise InputError(
            f"--output {folder}: another run's folder ({'; '.join(differing)}); give a new folder"
        )
    return True


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove the folder") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; remove the folder")
    return content
