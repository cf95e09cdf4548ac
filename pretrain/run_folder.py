"""Whose run a folder holds, and where it goes on."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.shard_format import MANIFEST
from potstill.errors import InputError
from pretrain.batches import BATCHES_VERSION
from pretrain.config import Config
from pretrain.ds_config import BatchSizes, precision
from pretrain.students import Member, Stop, find_checkpoints, where_stopped

RECORD = "config.json"


def identity_of(config: Config, sizes: BatchSizes, ds_config: dict[str, Any]) -> dict[str, Any]:
    """What makes it this run: its settings, the shards' content, batch, precision and ZeRO."""
    return {
        **config.identity(),
        "data": data_identity(Path(str(config.data.data))),
        "batches_version": BATCHES_VERSION,
        "global_batch": sizes.global_batch,
        "precision": str(precision(ds_config)),
        "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0),
    }


def check_folders(
    config: Config,
    whole: dict[str, Any],
    members: Sequence[Member],
    identities: Sequence[dict[str, Any]],
) -> tuple[dict[str, Path | None], dict[str, Stop]]:
    """Where each student goes on (None: from its beginning), and those that stopped, by name.

    Raises:
        InputError: a folder belongs to another run, or is something else.
    """
    if config.run.dry_run:
        return {member.name: None for member in members}, {}
    _check_folder(Path(str(config.run.output)), whole)
    for member, identity in zip(members, identities, strict=True):
        with member.blamed():
            _check_folder(member.folder, identity)
    stops = {member.name: where_stopped(member) for member in members}
    stopped = {name: stop for name, stop in stops.items() if stop is not None}
    going_on = [member for member in members if member.name not in stopped]
    found = find_checkpoints(going_on, config.run.resume)
    return {m.name: path for m, path in zip(going_on, found, strict=True)}, stopped


def _check_folder(folder: Path, identity: dict[str, Any]) -> None:
    holds(folder / RECORD, identity, "run")
    check_writable(folder, folder)


def data_identity(folder: Path) -> str:
    """What makes shards these: the digest of their manifest, which has each file's checksum."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def holds(record: Path, identity: dict[str, Any], kind: str) -> bool:
    """Whether the folder of this record has this very run (`kind`); otherwise it is empty.

    Raises:
        InputError: it has another one, or something else.
    """
    folder = record.parent
    if not record.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"--output {folder} is not empty and holds no {kind}; give another folder"
            )
        return False
    try:
        before = json.loads(record.read_text())["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{record} is unreadable ({error!r}); give another --output") from error
    changed = sorted(n for n in identity if identity[n] != before.get(n))
    if changed:
        name = changed[0]
        raise InputError(
            f"--output {folder} holds another {kind}: {', '.join(changed)} differ "
            f"({name} was {before.get(name)!r}, is {identity[name]!r}); give another --output"
        )
    return True


def check_writable(output: Path, place: Path) -> None:
    """Refuse an output for which `place`, or the folder that it will be made in, is locked.

    Raises:
        InputError: no permission to write.
    """
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise InputError(f"--output {output}: the folder cannot be written")
