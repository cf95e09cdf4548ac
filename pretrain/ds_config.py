"""The DeepSpeed config: read, completed, checked before anything long starts."""

import copy
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig

from potstill.errors import InputError
from pretrain.options import describe, fits, read_object

OURS = "Potstill chooses and deals out the rows itself; leave it out"
ONE_AXIS = "ranks share the data only, each with a whole model; leave it out"
GONE = "DeepSpeed has removed it; leave it out"
REFUSED = {
    "scheduler": "the learning-rate schedule stands in --lr, --warmup and --schedule",
    "bfloat16": "write bf16",
    "torch_autocast": "write bf16 or fp16, in which teacher and student run whole",
    "gradient_allreduce_op": "gradients are averaged over the ranks; leave it out",
    **dict.fromkeys(("data_efficiency", "dataloader_drop_last"), OURS),
    **dict.fromkeys(
        (
            *("pipeline", "tensor_parallel", "sequence_parallel_size", "expert_parallel"),
            *("hybrid_engine", "seq_parallel_communication_data_type", "autotuning"),
            *("use_data_before_expert_parallelism", "weight_quantization"),
        ),
        ONE_AXIS,
    ),
    **dict.fromkeys(
        (
            *("amp", "nebula", "compression_training", "quantize_training", "sparse_gradients"),
            *("eigenvalue", "sparse_attention", "elasticity", "graph_harvesting"),
            *("curriculum_learning", "progressive_layer_drop"),
        ),
        GONE,
    ),
}
MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet")
TRIANGLE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
KINDS: dict[str, Any] = {
    **dict.fromkeys((*TRIANGLE, "steps_per_print"), int),
    **dict.fromkeys(("gradient_clipping", "gradient_predivide_factor"), float),
    **dict.fromkeys(
        (
            *("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc"),
            *("prescale_gradients", "disable_allgather", "zero_force_ds_cpu_optimizer"),
            "zero_allow_untested_optimizer",
        ),
        bool,
    ),
    **dict.fromkeys(("communication_data_type", "log_level"), str),
    **dict.fromkeys(
        (
            *("bf16", "fp16", "zero_optimization", "optimizer", "data_types", *MONITORS),
            *("activation_checkpointing", "aio", "checkpoint", "comms_logger", "compile"),
            *("flops_profiler", "timers"),
        ),
        dict,
    ),
}
"""All that may stand in a config, and its JSON type. DeepSpeed itself passes over unknown names."""

MOST_ROWS = 2**24
"""Sequences in a global batch: beyond it, a step would not end in anyone's time."""


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
    written = read_object(path, "--ds_config")
    config = {name: value for name, value in written.items() if value is not None}  # null: absent
    automatic = list(_automatic(config))
    if automatic:
        raise InputError(
            f'--ds_config {path}: {", ".join(automatic)} is "auto", which only the Hugging Face '
            "Trainer fills in; give a value"
        )
    for name, value in config.items():
        _check_entry(name, value, f"--ds_config {path}")
    _check_optimizer(config.get("optimizer"), f"--ds_config {path}")
    _check_offload(config.get("zero_optimization", {}), f"--ds_config {path}")
    return config


def _check_entry(name: str, value: Any, blamed: str) -> None:
    """Refuse a name that DeepSpeed would pass over, and a type that it would bend.

    To it, the string "false" is false; to us it would be true.
    """
    if name in REFUSED:
        raise InputError(f"{blamed}: section {name!r} is not supported; {REFUSED[name]}")
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=3, cutoff=0.4) or sorted(KINDS)
        raise InputError(f"{blamed}: {name!r} is no key of DeepSpeed's; nearest: {', '.join(near)}")
    kind = KINDS[name]
    if kind is dict:
        _check_section(name, value, blamed)
    elif name not in TRIANGLE and not fits(value, kind):  # `batch_sizes` checks those
        raise InputError(f"{blamed}: {name} must be {describe(kind)}, not {value!r}")
    elif kind is float and value < 0:
        raise InputError(f"{blamed}: {name} {value} is negative")


def _check_section(name: str, value: Any, blamed: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{blamed}: section {name!r} must be a JSON object")
    enabled, stage = value.get("enabled", False), value.get("stage", 0)
    if type(enabled) is not bool:
        raise InputError(f"{blamed}: {name}.enabled must be true or false, not {enabled!r}")
    if name == "zero_optimization" and (type(stage) is not int or stage not in range(4)):
        raise InputError(f"{blamed}: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r}")


def _check_optimizer(section: dict[str, Any] | None, blamed: str) -> None:
    """A name and settings that DeepSpeed can hand to an optimiser, for which it would look late."""
    if section is None:
        return
    kind, settings = section.get("type"), section.get("params", {})
    own = (name for name, one in vars(torch.optim).items() if isinstance(one, type))
    known = {*DEEPSPEED_OPTIMIZERS, *own} - {"Optimizer"}
    if not isinstance(kind, str) or not {kind, kind.lower()} & known:
        names = ", ".join(sorted(known, key=str.lower))
        raise InputError(f"{blamed}: optimizer.type {kind!r} is none of {names}")
    if not isinstance(settings, dict):
        raise InputError(f"{blamed}: optimizer.params must be a JSON object")
    for name, value in settings.items():
        if name in ("lr", "eps", "weight_decay") and not (fits(value, float) and value >= 0):
            raise InputError(f"{blamed}: optimizer.params.{name} {value!r} is no number from 0 on")
    betas = settings.get("betas", [0, 0])
    right = isinstance(betas, list) and [fits(b, float) and 0 <= b < 1 for b in betas]
    if right != [True, True]:
        raise InputError(f"{blamed}: optimizer.params.betas {betas!r} are not two shares below 1")


def _check_offload(section: dict[str, Any], blamed: str) -> None:
    """Refuse states on a disk: what a checkpoint gathers must be in memory."""
    for name in ("offload_optimizer", "offload_param"):
        offload = section.get(name)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise InputError(
                f'{blamed}: zero_optimization.{name}.device "nvme" is not supported: checkpoints '
                'cannot read states that are swapped out to a disk; write "cpu"'
            )


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
        if type(value) is not int or not 1 <= value <= MOST_ROWS:
            raise InputError(
                f"--ds_config {path}: {name} {value!r} must be a positive number, at most "
                f"{MOST_ROWS:,}"
            )
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
    if product > MOST_ROWS:
        raise InputError(
            f"--ds_config {path}: a global batch of {product:,} sequences is more than "
            f"{MOST_ROWS:,}; lower {TRIANGLE[2]}"
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
    try:
        DeepSpeedConfig(copy.deepcopy(resolved))
    except Exception as error:  # whatever its parser meets in a value that it did not expect
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
