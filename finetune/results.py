"""The folder of a fine-tuning run: config.json names the run, result.json is there once it is done.

OUTPUT/config.json     settings, and the fingerprints of model and data
OUTPUT/log.jsonl       what the Trainer logged, a JSON object a line
OUTPUT/model/          the fine-tuned model and its tokenizer
OUTPUT/result.json     scores; written last, so that its presence says that all is there
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from potstill.errors import InputError
from potstill.files import write_json, write_text

PLACES = ("model", "data", "train_file", "validation_file")  # may move; the fingerprints may not
# What potstill/files.py writes beside, and what stays of it where a process was killed.
LEFTOVER = re.compile(r"\.(model|config\.json|log\.jsonl|result\.json)\.\d+\.(part|old)")


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
    """Write log.jsonl, then result.json: with it the run counts as finished."""
    write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    write_json(folder / "result.json", result)


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Make `folder` this run's, or find that it already is; clears what a killed run left.

    Raises:
        InputError: it holds another run (the differing settings are named) or other files.
    """
    path = folder / "config.json"
    if path.exists():
        _same_run(folder, _read_json(path), json.loads(json.dumps(config)))
    elif folder.exists() and not _only_leftovers(folder):
        raise InputError(
            f"--output {folder}: not empty and not a fine-tuning run; give a new folder"
        )
    else:
        write_json(path, config)
    _remove_leftovers(folder)


def _only_leftovers(folder: Path) -> bool:
    return folder.is_dir() and all(LEFTOVER.fullmatch(path.name) for path in folder.iterdir())


def _remove_leftovers(folder: Path) -> None:
    for path in list(folder.iterdir()):
        if not LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _same_run(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    names = [name for name in (*here, *(set(there) - set(here))) if name not in PLACES]
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise InputError(
            f"--output {folder}: another run's folder ({'; '.join(differing)}); give a new folder"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); remove the folder") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; remove the folder")
    return content
