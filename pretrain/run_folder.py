"""Whose run a folder holds, where it goes on, and how its batch was cut."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.shard_format import MANIFEST
from potstill.console import say
from potstill.errors import InputError
from potstill.files import is_leftover, sha256_of
from potstill.lock import Lock, hold
from potstill.secrets import redacted
from pretrain.batches import BATCHES_VERSION
from pretrain.checkpoint import RECORD as CHECKPOINT_RECORD
from pretrain.checkpoint import checkpoints_in, newest_whole, read_record, verify_checkpoint
from pretrain.config import Config
from pretrain.ds_config import BatchSizes, batch_sizes, precision
from pretrain.knowledge.format import IDENTITY as KNOWLEDGE_IDENTITY
from pretrain.knowledge.format import MANIFEST as KNOWLEDGE_MANIFEST
from pretrain.students import Member, Stop, where_stopped

RECORD = "config.json"
LOCK = ".lock"
OWN = (RECORD, "ds_config.json", "environment.json", KNOWLEDGE_IDENTITY)
"""What a start writes first."""
CHECKPOINTS = "checkpoints"


def keep_global_batch(
    sizes: BatchSizes, ds_config: dict[str, Any], config: Config, world_size: int
) -> tuple[BatchSizes, int]:
    """The sizes with which a run goes on: on another number of ranks its batch is cut anew.

    A ds_config that gives sequences per device would otherwise make it another run's batch.

    Returns:
        The sizes, and the number of ranks that the run was begun on.

    Raises:
        InputError: so many ranks cannot share the run's batch.
    """
    output, path = Path(str(config.run.output)), Path(str(config.run.ds_config))
    begun = None if config.run.dry_run else _begun(output / RECORD)
    if begun is None:
        return sizes, world_size
    begun_on, recorded = begun
    whole = batch_sizes(ds_config, begun_on, path).global_batch
    if sizes.global_batch in (recorded, whole):  # recorded: its ds_config was cut anew by hand
        return sizes, begun_on
    share, rest = divmod(whole, world_size)
    if rest or not share:
        raise InputError(
            f"--output {output}: its batch of {whole} rows cannot be shared by {world_size} ranks "
            "alike; start it on a number of ranks that divides it"
        )
    micro = max(n for n in range(1, sizes.micro_batch + 1) if share % n == 0)
    say(
        f"note: the batch stays at {whole} rows, as on {begun_on} ranks at the beginning: "
        f"{micro} x {share // micro} micro-batches x {world_size} ranks"
    )
    return BatchSizes(whole, micro, share // micro), begun_on


def _begun(record: Path) -> tuple[int, int | None] | None:
    """The ranks that the folder's run was begun on, and its batch; None for a fresh one."""
    try:
        value = json.loads(record.read_text())
        ranks, batch = value["begun_on_ranks"], dict(value["identity"]).get("global_batch")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except KeyError as error:
        raise InputError(f"{record} is not that of a run; give another --output") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{record} is unreadable ({error!r}); give another --output") from error
    if type(ranks) is not int or ranks < 1:
        raise InputError(f"{record}: begun_on_ranks is {ranks!r}; give another --output")
    return ranks, batch


def identity_of(config: Config, sizes: BatchSizes, ds_config: dict[str, Any]) -> dict[str, Any]:
    """What makes it this run: its settings, the shards' content, batch and precision."""
    identity = {
        **config.identity(),
        "data": data_identity(Path(str(config.data.data))),
        "knowledge": knowledge_identity(config.teacher.knowledge),
        "batches_version": BATCHES_VERSION,
        "global_batch": sizes.global_batch,
        "precision": str(precision(ds_config)),
    }
    return redacted(identity)  # as it will stand in the record


def check_folders(
    config: Config,
    whole: dict[str, Any],
    members: Sequence[Member],
    identities: Sequence[dict[str, Any]],
) -> tuple[dict[str, Path | None], dict[str, Stop]]:
    """Where each student goes on (None: from its beginning), and those that stopped, by name.

    Rank 0 looks. A folder with a run is held from here on, so that nothing changes behind its
    back; a fresh one once all is checked.

    Raises:
        InputError: a folder belongs to another run, or is something else.
    """
    if config.run.dry_run:
        return {member.name: None for member in members}, {}
    _check_folder(Path(str(config.run.output)), whole)
    for member, identity in zip(members, identities, strict=True):
        with member.blamed():
            _check_folder(member.folder, identity)
    if (Path(str(config.run.output)) / RECORD).exists():
        hold_folder(Path(str(config.run.output)))
    stops = {member.name: where_stopped(member) for member in members}
    stopped = {name: stop for name, stop in stops.items() if stop is not None}
    going_on = [member for member in members if member.name not in stopped]
    found = find_checkpoints(going_on, config.run.resume)
    return {m.name: path for m, path in zip(going_on, found, strict=True)}, stopped


def find_checkpoints(members: Sequence[Member], resume: str) -> tuple[Path | None, ...]:
    """Where each student goes on: all at the newest step of which every one has a whole checkpoint.

    Raises:
        InputError: what `--resume` asks for cannot be had, or all checkpoints are damaged.
    """
    if len(members) == 1:
        return (_find_checkpoint(resume, members[0].folder),)
    folders = [member.folder / CHECKPOINTS for member in members]
    if resume == "never":
        for member in members:
            _find_checkpoint(resume, member.folder)
    names = [{path.name for path in checkpoints_in(folder)} for folder in folders]
    common = sorted(set.intersection(*names), reverse=True) if names else []
    for name in common:
        try:
            for folder in folders:
                verify_checkpoint(folder / name)
            return tuple(folder / name for folder in folders)
        except InputError as error:
            say(f"note: {error}; going on from an older checkpoint")
    if common:
        raise InputError(
            f"--output {members[0].config.run.output}: no step has a whole checkpoint of every "
            "student; remove the folder to begin the run again, or give another --output"
        )
    return (None,) * len(members)


def _find_checkpoint(resume: str, run_folder: Path) -> Path | None:
    """The checkpoint that `--resume` means, or None for a fresh start.

    A path is where the run begins; once the run has a newer checkpoint of its own, that one.
    """
    if resume == "never":
        found = checkpoints_in(run_folder / CHECKPOINTS)
        if found:
            raise InputError(
                f"--resume never, but {run_folder} already holds {found[-1].name}; give another "
                "--output, or --resume auto to continue"
            )
        return None
    if resume == "auto":
        return newest_whole(run_folder / CHECKPOINTS)
    if not (Path(resume) / CHECKPOINT_RECORD).is_file():
        raise InputError(
            f"--resume {resume}: no whole checkpoint there; give a folder such as "
            "RUN/checkpoints/step-00001000"
        )
    given = verify_checkpoint(Path(resume)).progress.step
    try:
        newest = newest_whole(run_folder / CHECKPOINTS)
    except InputError:  # all of the run's own are damaged: that is what the path is for
        newest = None
    own_is_newer = newest is not None and read_record(newest).progress.step > given
    return newest if own_is_newer else Path(resume)


def later_checkpoints(member: Member, start: Path | None) -> list[Path]:
    """A student's checkpoints behind the one that its group goes on from."""
    found = checkpoints_in(member.folder / CHECKPOINTS)
    return [path for path in found if start is None or path.name > start.name]


def _check_folder(folder: Path, identity: dict[str, Any]) -> None:
    holds(folder / RECORD, identity, "run")
    check_writable(folder, folder)


def data_identity(folder: Path) -> str:
    """What makes shards these: the digest of their manifest, which has each file's checksum."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def knowledge_identity(folder: str | None) -> str | None:
    """What makes stored knowledge this: the digest of its manifest; None where there is none."""
    return None if folder is None else sha256_of(Path(folder) / KNOWLEDGE_MANIFEST)


def holds(record: Path, identity: dict[str, Any], kind: str) -> bool:
    """Whether the folder of this record has this very run (`kind`); otherwise it is empty.

    Raises:
        InputError: it has another one, or something else.
    """
    folder = record.parent
    if not record.exists():
        if os.path.lexists(folder) and (not folder.is_dir() or not _is_fresh(folder)):
            raise InputError(
                f"--output {folder} is not empty and holds no {kind}; give another folder"
            )
        return False
    try:
        before = dict(json.loads(record.read_text())["identity"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{record} is unreadable ({error!r}); give another --output") from error
    changed = sorted(n for n in identity if identity[n] != before.get(n))
    if changed:
        name = changed[0]
        raise InputError(
            f"--output {folder} holds another {kind}: {', '.join(changed)} differ "
            f"({name} was {before.get(name)!r}, is {identity[name]!r}); give another --output"
        )
    return True


def _is_fresh(folder: Path) -> bool:
    """Whether nothing stands there but the lock and the leftovers of a start that was killed."""
    return all(path.name == LOCK or is_leftover(path, *OWN) for path in folder.iterdir())


_held: tuple[Path, Lock] | None = None  # a lock ends when its file is closed


def hold_folder(output: Path) -> None:
    """Take the folder for this process, on rank 0; what it holds already it holds on.

    Raises:
        InputError: another process writes into it.
    """
    global _held
    if _held is not None and _held[0] == output.absolute():
        return
    release_folder()
    output.mkdir(parents=True, exist_ok=True)
    what = f"--output {output}: another process writes into this folder"
    _held = output.absolute(), hold(output / LOCK, f"{what}; wait for it, or give another")


def release_folder() -> None:
    """Let another process have the folder."""
    global _held
    if _held is not None:
        _held[1].release()
    _held = None


def check_writable(output: Path, place: Path) -> None:
    """Refuse an output for which `place`, or the folder that it will be made in, is locked.

    Raises:
        InputError: no permission to write.
    """
    there = next(p for p in (place, *place.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise InputError(f"--output {output}: {there} is no folder; give another")
    if not os.access(there, os.W_OK):
        raise InputError(f"--output {output}: the folder cannot be written")


def describe_newest(output: Path) -> str:
    """What is safe on disk of a run that ends in trouble, for a message."""
    found = sorted(output.glob(f"**/{CHECKPOINTS}/step-*/{CHECKPOINT_RECORD}"))
    if not found:
        return "no checkpoint has been written yet"
    return f"the last whole checkpoint is {max(path.parent.name for path in found)}"
