"""Token ids that several runs share: one folder per set of rows, tokenizer and way of cutting.

FOLDER/KEY/    a folder of the `datasets` library; KEY is a SHA-256 of all that decides the ids
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from potstill.errors import InputError
from potstill.files import is_leftover, whole_folder
from potstill.lock import hold_soon

PATIENCE_SECONDS = 2 * 3600.0  # more than any task takes to tokenise


def key_of(*parts: Any) -> str:
    """A SHA-256 of values that JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def cached(folder: Path, key: str, make: Callable[[], Dataset]) -> Dataset:
    """What `make` gives, from `folder` where a run left it there before.

    Of runs that need it at once, one makes it and the others wait.

    Raises:
        InputError: what is there is damaged, or another run takes hours to make it.
        OSError: it cannot be written.
    """
    place = folder / key
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        message = f"{place}: another run makes these token ids; wait for it"
        with hold_soon(folder / f".{key}.lock", message, PATIENCE_SECONDS):
            if not place.is_dir():
                _remove_leftovers(folder, key)
                with whole_folder(place) as beside:
                    make().save_to_disk(beside)
    try:
        kept = load_from_disk(place)
    except Exception as error:  # whatever the library makes of a damaged file
        raise InputError(f"{place}: damaged token ids ({error}); remove the folder") from error
    assert isinstance(kept, Dataset)
    return kept


def _remove_leftovers(folder: Path, key: str) -> None:
    """Remove what runs left that were killed while they made `key`; others may be at theirs."""
    for path in folder.iterdir():
        if is_leftover(path, key):
            shutil.rmtree(path)
