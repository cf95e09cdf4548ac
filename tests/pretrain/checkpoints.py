"""Small whole checkpoints, for tests of how they are found, verified and refused."""

from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import CheckpointWriter, Progress, Record, name_of
from pretrain.engine_state import EngineState


def tiny_state(seed: int = 0) -> EngineState:
    """The state of a model of one matrix and one bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"student.a.weight": (3, 5), "student.a.bias": (5,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return EngineState(
        weights=weights,
        buffers={"projections.memory": torch.arange(6).reshape(2, 3)},
        moments={f"exp_avg/{name}": weight / 2 for name, weight in weights.items()},
        numbers={"step": 7.0},
        scale={},
        skipped=1,
        optimizer="AdamW",
    )


def write_checkpoint(checkpoints: Path, step: int, **changes: Any) -> Path:
    """A whole checkpoint of a step in a run's folder of checkpoints; `changes` to its record."""
    state, folder = tiny_state(step), checkpoints / name_of(step)
    facts: dict[str, Any] = {
        "progress": Progress(step=step, tokens=10 * step, seconds=1.5),
        "world_size": 2,
        "zero_stage": 1,
        "identity": {"lr": 1e-3},
        "probe": {"kd": 1.25},
        "probe_rows": "0" * 64,
        "numbers": state.numbers,
        "scale": state.scale,
        "skipped": state.skipped,
        "optimizer": state.optimizer,
    }
    writer = CheckpointWriter()
    frozen = {"cls.bias": torch.ones(2)}
    writer.begin(folder, state, frozen, Record(**{**facts, **changes}))
    writer.settle()
    return folder
