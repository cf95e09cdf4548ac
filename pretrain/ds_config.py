"""The DeepSpeed config: read, completed, checked before anything long starts."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

from potstill.errors import InputError

REFUSED = {
    "scheduler": "the learning-rate schedule stands in --lr, --warmup and --schedule",
    "bfloat16": "write bf16",
    "torch_autocast": "write bf16 or fp16, in which teacher and student run whole",
}
MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
TRIANGLE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@dataclass(frozen=True)
class BatchSizes:
    """global batch = micro-batch x accumulation x ranks, in sequences."""

    global_batch: int
    micro_batch: int
    accumulation: int


def read_ds_config(path: Path) -> dict[str, Any]:
    """The config as it stands in the file.

    Raises:
        InputError: missing or malformed, or a section that belongs to the run's own flags.
    """
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--ds_config {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"--ds_config {path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"--ds_config {path}: must be a JSON object")
    automatic = list(_automatic(config))
    if automatic:
        raise InputError(
            f'--ds_config {path}: {", ".join(automatic)} is "auto", which only the Hugging Face '
            "Trainer fills in; give a value"
        )
    for section, remedy in REFUSED.items():
        if section in config:
            raise InputError(f"--ds_config {path}: section {section!r} is not supported; {remedy}")
    for section in ("bf16", "fp16", "zero_optimization", "optimizer", *MONITORS):
        if not isinstance(config.get(section, {}), dict):
            raise InputError(f"--ds_config {path}: section {section!r} must be a JSON object")
    return config


def _automatic(section: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of all values "auto", at any depth."""
    for name, value in section.items():
        if value == "auto":
            yield prefix + name
        elif isinstance(value, dict):
            yield from _automatic(value, f"{prefix}{name}.")


def batch_sizes(config: dict[str, Any], world_size: int, path: Path) -> BatchSizes:
    """The batch sizes on `world_size` ranks; one or two of the three may be left out.

    Raises:
        InputError: not positive numbers, or they do not multiply out.
    """
    given = {name: config[name] for name in TRIANGLE if name in config}
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"--ds_config {path}: {name} {value!r} must be a positive number")
    total, micro, accumulation = (given.get(name) for name in TRIANGLE)
    if micro is None and total is None:
        raise InputError(f"--ds_config {path}: give {TRIANGLE[1]} (sequences per device at once)")
    if micro is None:
        assert total is not None
        micro = total // (world_size * (accumulation or 1))
    if accumulation is None:
        accumulation = max(1, total // (micro * world_size)) if total and micro else 1
    product = micro * accumulation * world_size
    if product == 0 or (total is not None and total != product):
        raise InputError(
            f"--ds_config {path}: batch sizes do not multiply out: {TRIANGLE[0]} {total} is not "
            f"{TRIANGLE[1]} {micro} x {TRIANGLE[2]} {accumulation} x {world_size} ranks"
            + (f" = {product}" if product else "")
            + f"; change {TRIANGLE[2]}, or leave {TRIANGLE[0]} out"
        )
    return BatchSizes(product, micro, accumulation)


def resolve_ds_config(
    config: dict[str, Any], sizes: BatchSizes, run_folder: Path | None
) -> dict[str, Any]:
    """The config that DeepSpeed gets: sizes filled in, monitors in the run's folder.

    Without a folder (a dry run, which writes nothing) there are no monitors.
    """
    numbers = (sizes.global_batch, sizes.micro_batch, sizes.accumulation)
    filled = dict(zip(TRIANGLE, numbers, strict=True))
    resolved = {**config, **filled}
    if run_folder is None:
        return {name: value for name, value in resolved.items() if name not in MONITORS}
    for section in ("tensorboard", "csv_monitor"):
        monitor = config.get(section)
        if monitor and monitor.get("enabled"):
            place = {"output_path": str(run_folder / section), "job_name": "."}
            resolved[section] = {**place, **monitor}
    return resolved


def check_with_deepspeed(resolved: dict[str, Any], path: Path) -> None:
    """Let DeepSpeed parse the config now, not after models have been loaded.

    Raises:
        InputError: a key or value that this version of DeepSpeed refuses, in its words.
    """
    faults = (DeepSpeedConfigError, ValueError, AssertionError, KeyError, TypeError)
    try:
        DeepSpeedConfig(copy.deepcopy(resolved))
    except (*faults, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--ds_config {path}: DeepSpeed {deepspeed.__version__} refuses it: {reason}; "
            "ds_configs/ has configs that work"
        ) from error


def precision(config: dict[str, Any]) -> torch.dtype:
    """The precision that teacher and student run in."""
    for section, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(section, {}).get("enabled"):
            return dtype
    return torch.float32
