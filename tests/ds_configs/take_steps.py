"""Started by test_ds_configs.py: train a line with every config named, print what came of it."""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn

from pretrain.engine import unname_shared_memory

STEPS = 3


def train(config: dict) -> dict:
    """Losses of a few steps of AdamW towards `y = 0`, and what the engine made of the config."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    accumulation, losses = engine.gradient_accumulation_steps(), []
    inputs = torch.ones(2, 4, dtype=next(model.parameters()).dtype)
    for _ in range(STEPS * accumulation):
        loss = engine(inputs).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    facts = {"losses": losses[::accumulation], "global_batch": engine.train_batch_size()}
    return facts | {"steps": engine.global_steps, "skipped": engine.skipped_steps}


def main() -> None:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    unname_shared_memory()
    paths = [Path(name) for name in sys.argv[1:] if name.endswith(".json")]
    results = {}
    for path in paths:
        config = json.loads(path.read_text())
        results[path.stem] = train({**config, "tensorboard": {"enabled": False}})
    if os.environ["RANK"] == "0":
        print("RESULTS", json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
