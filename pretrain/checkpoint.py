"""Checkpoints: DeepSpeed's own files, and a mark that says they are whole.

A folder `step-00000500` holds what `engine.save_checkpoint` writes; `complete.json` is written
last, atomically, so a folder without it is the leftover of a run that was killed while saving.
Order, masks and dropout are pure functions of the step, so no random state needs saving.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from potstill.console import is_main_rank
from potstill.errors import InputError
from potstill.files import write_json

MARK = "complete.json"


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: finished steps. tokens, flops: of all ranks so far. seconds: of training.
        validated: the step of the last validation, -1 for none.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    validated: int = -1


def save_checkpoint(engine: Any, folder: Path, progress: Progress) -> Path:
    """Save engine and progress; all ranks call it."""
    name = f"step-{progress.step:08d}"
    whole = folder / name in whole_checkpoints(folder)
    dist.barrier()
    if whole:  # only a validation came since: the weights are the same
        if is_main_rank():
            _mark(folder / name, progress)
        return folder / name
    if is_main_rank():
        shutil.rmtree(folder / name, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    dist.barrier()
    if is_main_rank():
        _mark(folder / name, progress)
    return folder / name


def remove_checkpoints(old: Sequence[Path]) -> None:
    """Remove checkpoints; rank 0 does it."""
    for checkpoint in old if is_main_rank() else ():
        (checkpoint / MARK).unlink()  # first: what is left half deleted is not whole
        shutil.rmtree(checkpoint)


def _mark(checkpoint: Path, progress: Progress) -> None:
    state = {"world_size": dist.get_world_size(), **asdict(progress)}
    write_json(checkpoint / MARK, state)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(mark.parent for mark in folder.glob(f"step-*/{MARK}"))


def find_checkpoint(resume: str, run_folder: Path) -> Path | None:
    """The checkpoint that `--resume` means, or None for a fresh start.

    A path is where the run begins; once the run has a newer checkpoint of its own, that one.

    Raises:
        InputError: `never` in a folder with checkpoints, or a path that is no whole checkpoint.
    """
    newest = whole_checkpoints(run_folder / "checkpoints")[-1:]
    if resume == "auto":
        return newest[0] if newest else None
    if resume == "never":
        if newest:
            raise InputError(
                f"--resume never, but {run_folder} already holds {newest[0].name}; give another "
                "--output, or --resume auto to continue"
            )
        return None
    if not (Path(resume) / MARK).is_file():
        raise InputError(
            f"--resume {resume}: no whole checkpoint there; give a folder such as "
            "RUN/checkpoints/step-00001000"
        )
    own_is_newer = newest and read_progress(newest[0])[0].step > read_progress(Path(resume))[0].step
    return newest[0] if own_is_newer else Path(resume)


def read_progress(checkpoint: Path) -> tuple[Progress, int]:
    """Progress and world size of a checkpoint.

    Raises:
        InputError: its mark is unreadable.
    """
    try:
        state = json.loads((checkpoint / MARK).read_text())
        return Progress(**{name: state[name] for name in asdict(Progress())}), state["world_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{checkpoint / MARK} is unreadable ({error!r}); remove it") from error


def load_checkpoint(engine: Any, checkpoint: Path) -> Progress:
    """Load engine and progress; all ranks call it.

    Raises:
        InputError: the checkpoint is of another world size, or DeepSpeed finds nothing in it.
    """
    progress, world_size = read_progress(checkpoint)
    if world_size != dist.get_world_size():
        raise InputError(
            f"{checkpoint} was saved by {world_size} ranks, this run has {dist.get_world_size()}; "
            f"start it on {world_size}"
        )
    found, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if found is None:
        raise InputError(f"{checkpoint}: DeepSpeed finds no checkpoint in it; remove the folder")
    if engine.global_steps != progress.step:
        raise InputError(
            f"{checkpoint}: DeepSpeed is at step {engine.global_steps} after loading it, "
            f"{MARK} says {progress.step}; remove the folder"
        )
    return progress
