"""Teacher's features of a whole task, kept once for all runs of that teacher on those rows.

FOLDER/store.json        whose features of what these are: sealed, never changed
FOLDER/hidden-4.bin      one feature of all tokens (4: the layer), row behind row without padding:
                         (tokens, width) in bfloat16 or float32; logits.bin: float32 (rows, outputs)
FOLDER/hidden-4.json     its size and SHA-256, sealed; written last, so all is there
FOLDER/.lock             held while features are added; another run waits for it
"""

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.distillation.batches import TaskRows
from finetune.distillation.models import LiveTeacher
from finetune.results import check_writable, writing
from potstill.console import progress, say
from potstill.errors import InputError
from potstill.files import (
    is_leftover,
    read_sealed_json,
    remove_leftovers,
    sha256_of,
    write_sealed_json,
)
from pretrain.batches import Batch
from pretrain.features import Feature

VERSION = 1
IDENTITY, LOCK = "store.json", ".lock"
LOGITS = Feature("logits", "all")
"""The teacher's outputs; the same name as an MLM head's, of which a store has none."""

ROWS = 64  # computed at a time


class Entry(NamedTuple):
    """One feature's file, and the width of a head (0: it has no heads)."""

    values: NDArray[Any]
    head: int


class StoredTeacher:
    """Gives the features that a store holds; the teacher itself does not run."""

    def __init__(self, entries: Mapping[Feature, Entry], rows: TaskRows) -> None:
        self._entries = entries
        self._ends = np.cumsum(rows.lengths)
        self._starts = self._ends - np.array(rows.lengths)

    def features(
        self, batch: Batch, rows: Sequence[int], wanted: Set[Feature]
    ) -> dict[Feature, Tensor]:
        """As `LiveTeacher.features`; 0 where there is padding, which no objective counts."""
        return {feature: self._feature(feature, batch, rows) for feature in wanted}

    def logits(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """Its outputs, float32 (B, outputs)."""
        kept = np.array(self._entries[LOGITS].values[list(rows)])
        return torch.from_numpy(kept).to(batch.valid.device)

    def _feature(self, feature: Feature, batch: Batch, rows: Sequence[int]) -> Tensor:
        values, head = self._entries[feature]
        padded = np.zeros((*batch.valid.shape, values.shape[1]), values.dtype)
        for place, row in enumerate(rows):
            own = values[self._starts[row] : self._ends[row]]
            padded[place, : len(own)] = own
        whole = torch.from_numpy(padded)
        if values.dtype == np.int16:  # NumPy has no bfloat16: these are its bits
            whole = whole.view(torch.bfloat16)
        whole = whole.to(batch.valid.device)
        return whole if not head else whole.view(*whole.shape[:2], -1, head).transpose(1, 2)


def open_store(
    folder: Path,
    identity: Mapping[str, Any],
    wanted: Iterable[Feature],
    teacher: LiveTeacher,
    rows: TaskRows,
) -> StoredTeacher:
    """The wanted features (`LOGITS` too) from `folder`; what is not there yet is computed into it.

    Of several processes that come at once, one computes and the others wait for it.

    Args:
        identity: what decides the features, JSON: fingerprints of teacher and rows, precision.

    Raises:
        InputError: it holds the features of another teacher, of other rows or in another precision
            (what differs is named), it is damaged, or no store.
        TrainingError: the disk is full, or the folder cannot be written.
    """
    features = sorted(wanted, key=_name)
    _check_identity(folder, identity)
    with writing(folder), _locked(folder):
        _check_identity(folder, identity)
        if not (folder / IDENTITY).exists():
            write_sealed_json(folder / IDENTITY, {"version": VERSION, **identity})
        remove_leftovers(folder)
        missing = [f for f in features if not (folder / f"{_name(f)}.json").exists()]
        if missing:
            say(f"{folder}: storing the teacher's {', '.join(map(_name, missing))}")
            _compute(folder, missing, teacher, rows)
    return StoredTeacher({feature: _read(folder, feature) for feature in features}, rows)


def _name(feature: Feature) -> str:
    return "logits" if feature == LOGITS else f"{feature.kind}-{feature.at}"


def check_store(folder: Path) -> None:
    """Find out before anything long whether features can be kept in `folder`.

    Raises:
        InputError: it cannot be written, or holds other files or a damaged store.
    """
    check_writable(folder, "--teacher_features")
    if (folder / IDENTITY).exists():
        _sealed(folder / IDENTITY)
        return
    others = [*folder.iterdir()] if folder.exists() else []
    if not all(path.name == LOCK or is_leftover(path) for path in others):
        raise InputError(
            f"--teacher_features {folder}: not empty and no store of features; give a new folder"
        )


def _check_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    check_store(folder)
    path = folder / IDENTITY
    if not path.exists():
        return
    there, here = _sealed(path), {"version": VERSION, **identity}
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise InputError(
            f"--teacher_features {folder}: features of something else "
            f"({'; '.join(differing)}); give a new folder"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the store, waiting for whoever has it; the system drops the lock with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _compute(
    folder: Path, missing: Sequence[Feature], teacher: LiveTeacher, rows: TaskRows
) -> None:
    """Run the teacher once over all rows and add the missing features."""
    ends = np.cumsum(rows.lengths)
    files: dict[Feature, _Part] = {}
    try:
        for numbers in progress(rows.by_length(ROWS), desc="teacher"):
            batch = rows.batch(numbers)
            found = _found(teacher, batch, numbers, missing)
            for feature, (values, head) in found.items():
                if feature not in files:
                    files[feature] = _Part(folder, feature, rows, values, head)
                place = files[feature].values
                for row, own in zip(numbers, values, strict=True):
                    if feature == LOGITS:
                        place[row] = own
                    else:
                        place[ends[row] - rows.lengths[row] : ends[row]] = own[: rows.lengths[row]]
        for part in files.values():
            part.finish()
    finally:
        for part in files.values():
            part.discard()


def _found(
    teacher: LiveTeacher, batch: Batch, numbers: Sequence[int], missing: Sequence[Feature]
) -> dict[Feature, tuple[NDArray[Any], int]]:
    """Features of a batch as arrays (B, L, width) and widths of a head; logits (B, outputs)."""
    on_device = batch.to(teacher.device)
    wanted = frozenset(missing) - {LOGITS}
    found = {}
    for feature, value in teacher.features(on_device, numbers, wanted).items():
        head = value.shape[-1] if feature.kind != "hidden" else 0
        found[feature] = (_bits(value.transpose(1, 2).flatten(2) if head else value), head)
    if LOGITS in missing:
        found[LOGITS] = (_bits(teacher.logits(on_device, numbers)), 0)
    return found


def _bits(values: Tensor) -> NDArray[Any]:
    values = values.contiguous().cpu()
    whole: NDArray[Any] = (
        values.view(torch.int16) if values.dtype == torch.bfloat16 else values
    ).numpy()
    return whole


class _Part:
    """A feature's file on its way: all of its disk space is taken before anything is written."""

    def __init__(
        self, folder: Path, feature: Feature, rows: TaskRows, first: NDArray[Any], head: int
    ) -> None:
        self._path, self._json = folder / f"{_name(feature)}.bin", folder / f"{_name(feature)}.json"
        self._beside = folder / f".{self._path.name}.{os.getpid()}.part"
        number = len(rows.lengths) if feature == LOGITS else sum(rows.lengths)
        shape = (number, first.shape[-1])
        with open(self._beside, "wb") as file:  # a full disk would kill who writes to a map of it
            try:
                os.posix_fallocate(file.fileno(), 0, number * first.shape[-1] * first.itemsize)
            except OSError:
                self.discard()  # what there was of the disk is given back
                raise
        self.values = np.memmap(self._beside, first.dtype, "r+", shape=shape)
        self._facts = {"shape": list(shape), "dtype": _DTYPES[first.dtype.str], "head": head}

    def finish(self) -> None:
        """Let the file appear, then what says that it is whole."""
        self.values.flush()
        with open(self._beside, "rb") as file:
            os.fsync(file.fileno())
        facts = {**self._facts, "sha256": sha256_of(self._beside)}
        os.replace(self._beside, self._path)
        write_sealed_json(self._json, facts)  # flushes the folder too

    def discard(self) -> None:
        """Remove what did not appear."""
        self._beside.unlink(missing_ok=True)


_DTYPES = {"<f4": "float32", "<i2": "bfloat16"}


def _read(folder: Path, feature: Feature) -> Entry:
    """A feature's file as a map, its bytes checked.

    Raises:
        InputError: it is damaged.
    """
    path = folder / f"{_name(feature)}.bin"
    facts = _sealed(folder / f"{_name(feature)}.json")
    kind = {name: code for code, name in _DTYPES.items()}[facts["dtype"]]
    if not path.exists() or sha256_of(path) != facts["sha256"]:
        raise InputError(f"{path}: damaged or missing; remove {folder} and run again")
    return Entry(np.memmap(path, kind, "r", shape=tuple(facts["shape"])), facts["head"])


def _sealed(path: Path) -> dict[str, Any]:
    try:
        return read_sealed_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; remove {path.parent} and run again") from error
