"""Ray itself: started inside this program, or joined where it runs.

Without an address Ray runs inside this program and ends with it, however it ends. It listens on all
interfaces whatever it is told, but lets in nobody without a token, made for this one grid.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.grids.cluster import Cluster, last_line
from finetune.grids.settings import GridSettings
from finetune.grids.worker import Promise
from potstill.errors import InputError, TrainingError
from potstill.files import write_text

OBJECT_STORE_BYTES = 80 * 2**20  # results are small; Ray's own choice is a third of the memory
STARTS = 3  # of Ray in this program
LONGEST_SOCKET_FOLDER = 40  # characters: the paths of Ray's sockets must stay below 107
TEMPORARY = ".ray"  # in the grid's folder: where Ray keeps its sockets and logs
TOKEN = ".seen-"  # a file there that every node must see
PREFIX = "potstill-ray-"
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray puts the address of the network in the place of 127.0.0.1, and breaks when that changes."""


@contextmanager
def connected(settings: GridSettings, output: Path, paths: Sequence[Path]) -> Iterator[Cluster]:
    """Workers on an embedded Ray, or on the cluster at `--address`; all of it ends with the block.

    Args:
        paths: what every node must see where this one does.

    Raises:
        InputError: Ray is not installed, or no such cluster can be joined.
        TrainingError: Ray does not start on this machine.
    """
    ray = _ray()
    for left in output.glob(f"{TOKEN}*"):  # of a grid that was killed; the folder is this one's
        left.unlink()
    promise = Promise(output / f"{TOKEN}{uuid.uuid4().hex}", tuple(map(str, paths)))
    write_text(promise.token, promise.token.name)
    try:
        with _joined(ray, settings, output):
            cluster = Cluster(ray, settings.threads, promise, settings.workers)
            try:
                yield cluster
            finally:
                cluster.dismiss()
    finally:
        promise.token.unlink(missing_ok=True)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that Ray runs here
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError(
            f"a grid runs on Ray, which is not installed ({error}): pip install -e .[cluster]"
        ) from error
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # the grid itself tells what matters
    return ray


@contextmanager
def _joined(ray: Any, settings: GridSettings, output: Path) -> Iterator[None]:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    temporary, handler = None, signal.getsignal(signal.SIGTERM)
    try:
        if settings.address is not None:
            _join(ray, settings.address, quiet)
        else:
            temporary = _temporary_folder(output)
            _embed(ray, settings, temporary, quiet)
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place
        yield
    finally:
        ray.shutdown()
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            (output / TEMPORARY).unlink(missing_ok=True)


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises whatever its parts raise, Exception itself too
        raise InputError(
            f"--address {address}: no cluster could be joined ({last_line(error)}); start the "
            "grid on a machine of the cluster"
        ) from error


def _embed(ray: Any, settings: GridSettings, temporary: Path, quiet: dict[str, Any]) -> None:
    """Start Ray in this program; on a busy machine it may take longer than Ray itself waits."""
    for start in range(1, STARTS + 1):
        try:
            _start_here(ray, settings, temporary, quiet)
            return
        except Exception as error:  # as for a cluster
            ray.shutdown()
            if start == STARTS:
                raise TrainingError(
                    f"Ray cannot start on this machine ({last_line(error)}); start the same "
                    "command again when it is less busy"
                ) from error


def _start_here(ray: Any, settings: GridSettings, temporary: Path, quiet: dict[str, Any]) -> None:
    """Start Ray once; threads are set for the processes that it starts."""
    gpus = _gpus()
    workers = settings.workers or gpus or max(1, _cores() // settings.threads)
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    # what Ray asks of all who connect; by itself it would keep one for good in the home folder
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's own is 15: behind all other programs
    ray.init(
        address="local",
        num_cpus=workers * settings.threads,
        num_gpus=min(workers, gpus),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
        _temp_dir=str(temporary),
        **quiet,
    )


def check_machine(settings: GridSettings) -> None:
    """Find out before anything is written whether trials can run.

    Raises:
        InputError: Ray is not installed, or there are fewer GPUs than workers.
    """
    _ray()
    gpus, workers = _gpus(), settings.workers or 1
    if settings.address is None and 0 < gpus < workers:
        raise InputError(
            f"--workers {workers}: a trial takes a GPU of its own, and this machine has {gpus}; "
            f"give at most {gpus}, or hide them (CUDA_VISIBLE_DEVICES=) to use the cores"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _temporary_folder(output: Path) -> Path:
    """A new folder for Ray; removes that of a grid which was killed before it could."""
    note = output / TEMPORARY
    if note.exists():
        former = Path(note.read_text(encoding="utf-8").strip())
        if former.name.startswith(PREFIX):
            shutil.rmtree(former, ignore_errors=True)
    short = len(tempfile.gettempdir()) <= LONGEST_SOCKET_FOLDER
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=None if short else "/tmp"))
    write_text(note, f"{folder}\n")
    return folder
