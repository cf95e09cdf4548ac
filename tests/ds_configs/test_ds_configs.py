"""The ready configs: DeepSpeed takes each, and trains with each that this machine can run."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
CONFIGS = sorted(FOLDER.glob("*.json"))
ON_GPUS = [path for path in CONFIGS if not path.stem.startswith("cpu")]
NAMES = {"ids": lambda path: path.stem}
# No fp16 on the CPU, says DeepSpeed.
RUN_ON_CPU = [path for path in CONFIGS if "fp16" not in path.stem.replace("bf16", "")]


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("path", CONFIGS, **NAMES)
def test_deepspeed_accepts_every_key(path: Path) -> None:
    parsed = DeepSpeedConfig(str(path))
    assert parsed.gradient_clipping == 0.0
    assert parsed.monitor_config.tensorboard.enabled
    assert not parsed.monitor_config.wandb.enabled and not parsed.monitor_config.csv_monitor.enabled


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("path", ON_GPUS, **NAMES)
def test_the_global_batch_is_the_papers_on_any_usual_number_of_gpus(path: Path, ranks: int) -> None:
    config = read(path)
    total, micro = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
    assert total == 1024 and total % (micro * ranks) == 0


@pytest.mark.parametrize("path", ON_GPUS, **NAMES)
def test_gradients_accumulate_in_float32_wherever_deepspeed_can(path: Path) -> None:
    config = read(path)
    accumulated = config.get("data_types", {}).get("grad_accum_dtype")
    assert accumulated == ("fp32" if config["zero_optimization"]["stage"] else None)


@pytest.mark.parametrize("path", CONFIGS, **NAMES)
def test_every_config_is_explained_and_listed(path: Path) -> None:
    lines = path.with_suffix(".md").read_text().splitlines()
    assert lines[0] == f"# {path.stem}" and 4 <= len(lines) <= 12
    assert f"[{path.stem}]({path.stem}.md)" in (FOLDER / "README.md").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(paths: list[Path], ranks: int, folder: Path) -> dict:
    """Train with each config under the launcher; the large batches of GPUs are made small."""
    for path in paths:
        sizes = {"train_batch_size": 4 * ranks, "train_micro_batch_size_per_gpu": 2}
        config = read(path) | (sizes if path in ON_GPUS else {})
        (folder / path.name).write_text(json.dumps(config))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    script = Path(__file__).with_name("take_steps.py")
    command = [*launcher, "--master_port", str(free_port()), str(script)]
    command += [str(folder / path.name) for path in paths]
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where ninja is
    environment = {**os.environ, "PATH": tools, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    found = re.search(r"RESULTS (\{.*\})", done.stdout)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(found.group(1))


@pytest.mark.slow
@pytest.mark.distributed
def test_every_config_trains_as_plain_float32_does(tmp_path: Path) -> None:
    results = train(RUN_ON_CPU, 1, tmp_path)
    exact = results["cpu"]["losses"]
    assert exact[0] > exact[1] > exact[2]
    for name, result in results.items():
        assert (result["steps"], result["skipped"]) == (3, 0), name
        # bf16 has 8 bits; the first steps of ZeRO-0 are up to a quarter shorter (zero0_bf16.md).
        tolerance = 0.1 if name == "zero0_bf16" else 0.03
        assert result["losses"] == pytest.approx(exact, rel=tolerance), name


@pytest.mark.slow
@pytest.mark.distributed
def test_the_cpu_configs_run_on_any_number_of_ranks(tmp_path: Path) -> None:
    paths = [path for path in CONFIGS if path not in ON_GPUS]
    results = train(paths, 2, tmp_path)
    assert {name: result["global_batch"] for name, result in results.items()} == {
        "cpu": 2 * 16,
        "cpu_bf16": 2 * 4 * 16,
    }
    assert all(result["steps"] == 3 for result in results.values())
