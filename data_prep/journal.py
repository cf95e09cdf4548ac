"""A run's working folder: finished shards under working names, and the journal to go on from.

The journal is one file, replaced atomically behind every finished shard, so that a run that was
killed at any instant goes on with the very state it had there.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpus import Position
from data_prep.shard_format import (
    MANIFEST,
    TOKENIZER_FOLDER,
    TRAIN,
    VALIDATION,
    ShardFile,
    damage,
    read_manifest,
    read_versioned,
    shard_image,
)
from potstill.console import progress
from potstill.errors import InputError
from potstill.files import write_bytes, write_sealed_json
from potstill.lock import Lock, hold

WORKING_FOLDER = ".sharding"
DIGEST_BYTES = 32  # the journal's SHA-256, before what it holds


@dataclass
class State:
    """Where a run stands: everything but the tokens that wait in the packers."""

    position: Position = Position()
    documents: int = 0  # with at least one token
    open_split: str = ""  # of the document that goes on behind the position, if one does
    documents_by_source: list[int] = field(default_factory=list)
    skipped_texts: int = 0
    shards: list[ShardFile] = field(default_factory=list)  # names are working names
    padding: dict[str, int] = field(default_factory=lambda: {TRAIN: 0, VALIDATION: 0})
    begun: dict[str, bool] = field(default_factory=dict)
    finished: bool = False


class Journal:
    """The working folder `.sharding` inside an output folder."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / WORKING_FOLDER
        self.learned_tokenizer = self.folder / "tokenizer"
        self._journal = self.folder / "journal"
        self._settings = self.folder / "settings.json"
        self._lock_file = self.folder / "lock"
        self._lock: Lock | None = None
        self._made_output = False

    def is_complete(self, settings: dict[str, Any]) -> bool:
        """Whether the output holds the finished shards of these very settings.

        Raises:
            InputError: the folder holds another run, or something else, or is damaged.
        """
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"--output {self.output} is a file; give a folder")
        complete = (self.output / MANIFEST).exists()
        if complete or self._journal.exists():
            self._compare(settings)
            if complete:
                read_manifest(self.output)
        elif self.output.exists():
            foreign = [p.name for p in self.output.iterdir() if not _is_ours(p)]
            if foreign:
                raise InputError(
                    f"--output {self.output} is not empty (it holds {sorted(foreign)[0]}); "
                    "give a folder of its own"
                )
        return complete

    def _compare(self, settings: dict[str, Any]) -> None:
        if not self._settings.exists():
            raise InputError(
                f"--output {self.output} holds shards whose settings are unknown; give another"
            )
        earlier = self._earlier()
        for name, wanted in _plain(settings).items():
            was = earlier.get(name)
            if was != wanted and not self._may_change(name, was, wanted, settings):
                raise InputError(
                    f"--output {self.output} belongs to another run: {name} was "
                    f"{_short(was, wanted)}, now {_short(wanted, was)}; "
                    "give another folder"
                )

    def _earlier(self) -> dict[str, Any]:
        """The settings of the run that the folder holds."""
        try:
            return read_versioned(self._settings)
        except (OSError, ValueError) as error:
            raise self._damaged(self._settings, error) from error

    def _damaged(self, path: Path, error: Exception) -> InputError:
        """A file that tells what the shards are; they themselves may be good."""
        return InputError(f"{path} cannot be used ({error}); give another --output")

    def _may_change(self, name: str, was: Any, wanted: Any, settings: dict[str, Any]) -> bool:
        """Whether all that is sharded so far is the same in spite of this difference.

        A corpus is mended in this way: of the source at the journal's place what was read is
        compared when it is read again, of those behind it nothing counts yet.
        """
        if name == "on_bad_text":
            return (was, wanted) == ("stop", "skip")  # there was no bad text yet
        if name != "sources" or settings["train_tokenizer"] or (self.output / MANIFEST).exists():
            return False  # a vocabulary was learned from all sources
        state = self.load()[0]
        done = state.position.source
        return (
            not state.finished
            and was[:done] == wanted[:done]
            and [_named(source) for source in was] == [_named(source) for source in wanted]
        )

    def _kept(self, settings: dict[str, Any]) -> set[str]:
        """The names in the working folder that a run of these settings goes on from."""
        if self._journal.exists():  # compared already, in `is_complete`
            shards = {file.name for file in self.load()[0].shards}
            names = {self._journal.name, self._settings.name, self.learned_tokenizer.name}
            return {self._lock_file.name} | names | shards
        if self._settings.exists() and self._earlier() == _plain(settings):
            return {self._lock_file.name, self._settings.name, self.learned_tokenizer.name}
        return {self._lock_file.name}

    def begin(self, settings: dict[str, Any]) -> bool:
        """Make the working folder, or take up that of a stopped run with these settings.

        Returns:
            Whether there is work: False if another process has finished it meanwhile.

        Raises:
            InputError: the folder cannot be made, another process works in it, or it holds another
                run by now.
        """
        try:
            self._made_output = not self.output.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._hold()
        except OSError as error:
            raise InputError(
                f"--output {self.output} cannot be written ({error.strerror}); give another"
            ) from error
        if self.is_complete(settings):  # what was seen before the lock was held may be old
            return False
        kept = self._kept(settings)
        old = [path for path in self.folder.iterdir() if path.name not in kept]
        for path in old + [path for path in self.output.iterdir() if _is_left_over(path)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_sealed_json(self._settings, settings)
        return True

    def _hold(self) -> Lock:
        """The lock; a refused run that ends at this moment may have removed it with its folder."""
        self._lock_file.touch()
        before = self._lock_file.stat()
        busy = f"another process is sharding into {self.output}; wait for it, or give another"
        lock = hold(self._lock_file, busy)
        try:
            if os.path.samestat(before, self._lock_file.stat()):
                return lock
        except FileNotFoundError:
            pass
        lock.release()
        raise InputError(f"another process just left {self.output}; run the same command again")

    def add_shard(self, state: State, split: str, rows: np.ndarray) -> None:
        """Write a shard under its working name; it counts once the journal is saved."""
        image = shard_image(rows)
        number = sum(file.split == split for file in state.shards)
        name = f"{split}-{number:05d}.h5"
        write_bytes(self.folder / name, image)
        digest = hashlib.sha256(image).hexdigest()
        state.shards.append(ShardFile(name, split, len(rows), digest))

    def save(self, state: State, waiting: dict[str, np.ndarray]) -> None:
        """Replace the journal by this state and the waiting tokens of each split."""
        image = io.BytesIO()
        encoded = np.frombuffer(json.dumps(asdict(state)).encode(), dtype=np.uint8)
        np.savez(image, state=encoded, **waiting)  # type: ignore[arg-type]
        content = image.getvalue()
        write_bytes(self._journal, hashlib.sha256(content).digest() + content)

    def load(self) -> tuple[State, dict[str, np.ndarray]]:
        """The last saved state and the waiting tokens; a fresh state without a journal.

        Raises:
            InputError: the journal is not as it was written.
        """
        if not self._journal.exists():
            return State(), {}
        saved = self._journal.read_bytes()
        digest, content = saved[:DIGEST_BYTES], saved[DIGEST_BYTES:]
        if hashlib.sha256(content).digest() != digest:
            raise self._damaged(self._journal, ValueError("its checksum does not fit"))
        with np.load(io.BytesIO(content)) as arrays:
            waiting = {split: arrays[split] for split in (TRAIN, VALIDATION)}
            fields = json.loads(arrays["state"].tobytes())
        fields["position"] = Position(**fields["position"])
        fields["shards"] = [ShardFile(**shard) for shard in fields["shards"]]
        return State(**fields), waiting

    def check_shards(self, state: State) -> None:
        """Compare the finished shards with their checksums, before a run goes on behind them.

        Raises:
            InputError: one is missing or damaged.
        """
        places = [
            (self.folder, file) if (self.folder / file.name).exists() else (self.output, final)
            for file, final in zip(state.shards, self._named(state), strict=True)
        ]
        for folder, file in progress(places, desc="checking shards", unit=" files", delay=5.0):
            if fault := damage(folder, file):
                raise InputError(fault)

    def name_shards(self, state: State) -> list[ShardFile]:
        """Give the shards their final names; may be repeated when it was interrupted."""
        named = self._named(state)
        for file, final in zip(state.shards, named, strict=True):
            if (self.folder / file.name).exists():
                os.replace(self.folder / file.name, self.output / final.name)
        return [file for split in (TRAIN, VALIDATION) for file in named if file.split == split]

    def _named(self, state: State) -> list[ShardFile]:
        """The shards, in the order of the journal, with their final names."""
        totals = Counter(file.split for file in state.shards)
        return [
            replace(file, name=f"{Path(file.name).stem}-of-{totals[file.split]:05d}.h5")
            for file in state.shards
        ]

    def close(self) -> None:
        """Drop what only a continuation needs; the settings and the lock stay."""
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.learned_tokenizer, ignore_errors=True)

    def undo(self) -> None:
        """Remove the working folder of a refused run that has nothing to go on from."""
        needed = (self._journal, self.learned_tokenizer, self.output / MANIFEST)
        if self._lock is None or any(path.exists() for path in needed):
            return
        shutil.rmtree(self.folder)
        if self._made_output:
            self.output.rmdir()

    def release(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _is_ours(path: Path) -> bool:
    return path.name == WORKING_FOLDER or _is_left_over(path)


def _is_left_over(path: Path) -> bool:
    """Whether a killed run was about to write this into the output folder."""
    names = "|".join(map(re.escape, (TOKENIZER_FOLDER, MANIFEST)))
    return re.fullmatch(rf"\.({names})\.\d+\.(part|old)", path.name) is not None


def _named(source: dict[str, Any]) -> tuple[Any, Any]:
    return source["name"], source["dataset"]


def _plain(settings: dict[str, Any]) -> Any:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


def _short(value: Any, other: Any) -> str:
    """A value for a message; of two lists only the first entry that differs."""
    if isinstance(value, list):
        rest = other if isinstance(other, list) else []
        differing = [v for place, v in enumerate(value) if place >= len(rest) or rest[place] != v]
        return _short(differing[0], None) if differing else "shorter"
    return repr(value)
