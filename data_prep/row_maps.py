"""A shard's dataset as a memory map; HDF5 itself only tells where its bytes start."""

import mmap
import resource
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from potstill.errors import InputError


def own_dataset(path: Path, file: Any, name: str) -> Any:
    """The dataset `name` of an open HDF5 file; None where it has none.

    Raises:
        InputError: it lies in other files (a link, external storage, a virtual dataset): HDF5 would
            open any path of this machine that the file names.
    """
    link = file.get(name, getlink=True)
    if link is None:
        return None
    linked = not isinstance(link, h5py.HardLink)
    if linked or not isinstance(file[name], h5py.Dataset) or _is_elsewhere(file[name]):
        raise InputError(f"{path}: {name} is no dataset of its own but leads elsewhere; not read")
    return file[name]


def _is_elsewhere(dataset: Any) -> bool:
    return bool(dataset.is_virtual or dataset.external)


def map_dataset(
    path: Path, name: str, shape: tuple[int, int], dtype: np.dtype[Any]
) -> "np.memmap[Any, Any]":
    """A read-only map of the dataset's bytes.

    Raises:
        InputError: it cannot be read, or is not of that shape and type.
    """
    try:
        with h5py.File(path, "r") as file:
            dataset = own_dataset(path, file, name)
            if dataset is None:
                raise InputError(f"{path} has no dataset {name}; shard again")
            found, offset = (dataset.shape, dataset.dtype), dataset.id.get_offset()
        if found != (shape, dtype) or offset is None:
            raise InputError(
                f"{path} holds {found}, the manifest says {(shape, dtype)}; shard again"
            )
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
        # Else the kernel reads up to megabytes around every row; `expect` says what will be used.
        mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return mapped
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read ({reason}); check it with data_prep/shard.py --verify"
        ) from error


def allow_open_files(shards: int) -> None:
    """Raise the process's own limit as far as it may: a memory map holds its file open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * shards + 512  # both splits, and what else the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
