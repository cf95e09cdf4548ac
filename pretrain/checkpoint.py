"""Checkpoints: the whole state in safetensors, and a sealed record with a checksum of every file.

A folder `step-00000500` holds

    weights.safetensors     float32 master weights, projections, contrastive memory, frozen parts
    optimizer.safetensors   the optimiser's states, by STATE/PARAMETER
    checkpoint.json         progress, loss scale, identity of the run, the probe's losses, checksums

It appears by being renamed, so that one that is there is whole, and it is independent of world
size and ZeRO stage: a student's state is small enough to stand in one place, and DeepSpeed's own
files, pickles cut by rank, open only on as many ranks and under the stage that wrote them. Order,
masks and dropout are pure functions of seed and step, which stand in the record: there is no random
state, nor a position in the data, to save besides.
"""

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from potstill.console import is_main_rank, say
from potstill.errors import InputError
from potstill.files import read_sealed_json, sha256_of, whole_folder, write_sealed_json
from pretrain.engine_state import EngineState

RECORD = "checkpoint.json"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
FORMAT = 1
_GROUPS = {WEIGHTS: ("weights", "buffers", "frozen"), OPTIMIZER: ("moments",)}


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: finished steps. tokens, flops: of all ranks so far. seconds: of training.
        validated: the step of the last validation, -1 for none.
        skipped_in_a_row: the last updates that were left out because they were not finite.
        rolled_back: how often the run went back to an earlier checkpoint.
    """

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    validated: int = -1
    skipped_in_a_row: int = 0
    rolled_back: int = 0


@dataclass(frozen=True)
class Record:
    """What `checkpoint.json` says.

    Attributes:
        progress: where the run was. world_size, zero_stage: how it ran; it may go on otherwise.
        identity: of the run, from `run_folder.identity_of`.
        probe: each unweighted term of the loss on a few fixed rows. probe_rows: their digest.
        numbers, scale, skipped, optimizer: of `EngineState`.
    """

    progress: Progress
    world_size: int
    zero_stage: int
    identity: dict[str, Any]
    probe: dict[str, float]
    probe_rows: str
    numbers: dict[str, float]
    scale: dict[str, float]
    skipped: int
    optimizer: str


def name_of(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


class CheckpointWriter:
    """Writes checkpoints behind training's back, one after another; rank 0 alone has work.

    Attributes:
        ended: when the last one stood, on `time.perf_counter`'s clock.
    """

    def __init__(self) -> None:
        self.ended = 0.0
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: list[Future[None]] = []

    def begin(
        self, folder: Path, state: EngineState, frozen: Mapping[str, Tensor], record: Record
    ) -> None:
        """Start to write `folder`; the tensors must not change any more."""
        tensors = {"weights": state.weights, "buffers": state.buffers, "moments": state.moments}
        whole = {**tensors, "frozen": dict(frozen)}
        self._under_way.append(self._thread.submit(self._write, folder, whole, record))

    def _write(self, *what: Any) -> None:
        _write(*what)
        self.ended = time.perf_counter()

    def is_done(self) -> bool:
        """Whether nothing is being written; also if writing failed."""
        return all(write.done() for write in self._under_way)

    def has_failed(self) -> bool:
        """Whether a write has ended with an error, which `settle` tells."""
        return any(write.done() and write.exception() for write in self._under_way)

    def wait_briefly(self, seconds: float) -> None:
        """Give what is being written a last chance, when the process is about to be ended."""
        wait(self._under_way, seconds)

    def settle(self) -> str | None:
        """Wait for what is being written; why it cannot be, None if it stands.

        Earlier checkpoints are as they were.
        """
        writes, self._under_way = self._under_way, []
        for fault in (write.exception() for write in writes):
            if fault is not None:
                reason = fault.strerror if isinstance(fault, OSError) else None
                return f"the checkpoint cannot be written ({reason or repr(fault)})"
        return None


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], record: Record) -> None:
    with whole_folder(folder) as beside:
        files = {}
        for name, groups in _GROUPS.items():
            path = beside / name
            named = {f"{g}/{key}": t for g in groups for key, t in tensors[g].items()}
            with disk_errors(path):
                save_file({key: tensor.contiguous() for key, tensor in named.items()}, path)
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        _write_record(beside, record, files)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A block in which what safetensors says of a full disk is an `OSError`, as elsewhere."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def _write_record(folder: Path, record: Record, files: Mapping[str, Any]) -> None:
    write_sealed_json(folder / RECORD, {"format": FORMAT, **asdict(record), "files": dict(files)})


def update_progress(folder: Path, progress: Progress) -> None:
    """Say that only a validation came since this checkpoint: its weights are the same."""
    record, files = _read(folder)
    _write_record(folder, Record(**{**vars(record), "progress": progress}), files)


def remove_checkpoints(old: Sequence[Path]) -> None:
    """Remove checkpoints; rank 0 does it."""
    for checkpoint in old if is_main_rank() else ():
        gone = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}.old")
        os.replace(checkpoint, gone)  # first: what is left half deleted is no checkpoint
        shutil.rmtree(gone)


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first, whether damaged or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_record(checkpoint: Path) -> Record:
    """What a checkpoint says of itself.

    Raises:
        InputError: the record is missing, damaged or of another version.
    """
    return _read(checkpoint)[0]


def _read(checkpoint: Path) -> tuple[Record, dict[str, Any]]:
    path = checkpoint / RECORD
    try:
        value = read_sealed_json(path)
        if value.pop("format") != FORMAT:
            raise ValueError("it was written by another version of Potstill")
        files = value.pop("files")
        if set(files) != set(_GROUPS):
            raise ValueError("it names other files")
        return Record(**{**value, "progress": Progress(**value["progress"])}), files
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is unreadable ({error}); remove {checkpoint}") from error


def verify_checkpoint(checkpoint: Path) -> Record:
    """Compare every file of a checkpoint with its checksum.

    Raises:
        InputError: a file is missing, of another size, or damaged.
    """
    record, files = _read(checkpoint)
    for name, facts in files.items():
        path = checkpoint / name
        try:
            whole = path.stat().st_size == facts["bytes"] and sha256_of(path) == facts["sha256"]
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})") from error
        if not whole:
            raise InputError(f"{path} is damaged: it is not as it was written")
    return record


def load_state(checkpoint: Path) -> tuple[EngineState, dict[str, Tensor]]:
    """The state of a checkpoint, complete, and the parameters that were frozen, by name.

    Raises:
        InputError: it cannot be read.
    """
    record = read_record(checkpoint)
    groups: dict[str, dict[str, Tensor]] = {g: {} for names in _GROUPS.values() for g in names}
    for name in _GROUPS:
        try:
            tensors = load_file(checkpoint / name)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{checkpoint / name} cannot be read ({error})") from error
        for key, tensor in tensors.items():
            group, _, rest = key.partition("/")
            groups[group][rest] = tensor
    state = EngineState(
        weights=groups["weights"],
        buffers=groups["buffers"],
        moments=groups["moments"],
        numbers=record.numbers,
        scale=record.scale,
        skipped=record.skipped,
        optimizer=record.optimizer,
    )
    return state, groups["frozen"]


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is not damaged; damaged ones are named.

    Raises:
        InputError: there are checkpoints, and all of them are damaged.
    """
    found = checkpoints_in(folder)
    faults = []
    for checkpoint in reversed(found):
        try:
            verify_checkpoint(checkpoint)
            return checkpoint
        except InputError as error:
            faults.append(str(error))
            say(f"note: {error}; going on from an older checkpoint")
    if found:
        raise InputError(
            f"{folder}: no checkpoint is whole ({faults[0]}); remove the folder to begin the run "
            "again, or give another --output"
        )
    return None
