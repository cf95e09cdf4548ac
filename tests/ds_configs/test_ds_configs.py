"""The ready configs: DeepSpeed takes each, and trains with each that this machine can run."""

import json
import re
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from tests.forked import Job, forked
from tests.launch import environment

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


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What came of all configs on one rank, and of the CPU's on two: all in one start."""
    folder = tmp_path_factory.mktemp("configs")
    on_cpu = [path for path in CONFIGS if path not in ON_GPUS]
    script = str(Path(__file__).with_name("take_steps.py"))
    jobs = [
        Job(script, ranks, smaller(paths, ranks, folder / str(ranks)))
        for ranks, paths in ((1, RUN_ON_CPU), (2, on_cpu))
    ]
    done = forked(folder / "forked", jobs, environment(folder) | {"DS_ACCELERATOR": "cpu"})
    for ended in done:
        assert not any(ended.statuses), ended.errors[-3000:]
    assert [len(ended.statuses) for ended in done] == [1, 2]
    return [json.loads(re.findall(r"RESULTS (\{.*\})", ended.output)[0]) for ended in done]


def smaller(paths: list[Path], ranks: int, folder: Path) -> list[str]:
    """Copies of configs; the large batches of GPUs are made small."""
    folder.mkdir()
    for path in paths:
        sizes = {"train_batch_size": 4 * ranks, "train_micro_batch_size_per_gpu": 2}
        config = read(path) | (sizes if path in ON_GPUS else {})
        (folder / path.name).write_text(json.dumps(config))
    return [str(folder / path.name) for path in paths]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_config_trains_as_plain_float32_does(results: list[dict]) -> None:
    alone, _ = results
    assert set(alone) == {path.stem for path in RUN_ON_CPU}
    exact = alone["cpu"]["losses"]
    assert exact[0] > exact[1] > exact[2]
    for name, result in alone.items():
        assert (result["steps"], result["skipped"]) == (3, 0), name
        # bf16 has 8 bits; the first steps of ZeRO-0 are up to a quarter shorter (zero0_bf16.md).
        tolerance = 0.1 if name == "zero0_bf16" else 0.03
        assert result["losses"] == pytest.approx(exact, rel=tolerance), name


@pytest.mark.slow
@pytest.mark.distributed
def test_the_cpu_configs_run_on_any_number_of_ranks(results: list[dict]) -> None:
    _, two = results
    assert {name: result["global_batch"] for name, result in two.items()} == {
        "cpu": 2 * 16,
        "cpu_bf16": 2 * 4 * 16,
    }
    assert all(result["steps"] == 3 for result in two.values())
