"""How long a model takes for rows of 128 tokens: torch and onnxruntime, batch 1 and 32.

All models and runtimes are timed in turn, again and again, so that a machine that slows down does
so for all of them; the median counts. The exported model must answer as the one in torch does.
"""

import importlib.util
import logging
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.classifier import load_classifier
from potstill.console import progress
from potstill.errors import TrainingError

LENGTH = 128  # tokens of a row
BATCHES = (1, 32)
REPEATS, FEWEST, SECONDS = 20, 3, 20.0  # of one case: at most 20, after 20 seconds 3 will do
LARGEST_DIFFERENCE = 1e-4  # between the logits of torch and of the exported model
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
NO_ONNX = "not measured: pip install -e .[report]"

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One thing to time: `run` answers a batch, and returns when the answer is there."""

    model: str
    name: str
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def enough(self) -> bool:
        """Whether it was timed often, or long, enough."""
        count = len(self.seconds)
        return count >= REPEATS or (count >= FEWEST and sum(self.seconds) >= SECONDS)

    def time(self) -> None:
        """Run it once more."""
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)


def case_names() -> list[str]:
    """What a report has a column for on this machine, with or without onnxruntime."""
    runtimes = ["torch fp32", "onnxruntime fp32"]
    if torch.cuda.is_available():
        runtimes += ["torch fp32 on GPU", "torch bf16 on GPU"]
    return [f"{runtime}, batch {batch}" for runtime in runtimes for batch in BATCHES]


def has_onnx() -> bool:
    """Whether the packages of the extra `report` are installed."""
    return all(importlib.util.find_spec(name) for name in ONNX_PACKAGES)


def latencies(models: Mapping[str, Path], threads: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of every model and case; without onnxruntime its cases are left out.

    Args:
        models: folders by name. threads: of the CPU, for both runtimes.

    Raises:
        InputError: a folder holds no model that can be used.
        TrainingError: an exported model answers otherwise than the one in torch.
    """
    with _threads(threads), tempfile.TemporaryDirectory() as room:
        cases = []
        for name, folder in progress(list(models.items()), desc="loading models"):
            cases += _cases(name, folder, threads, Path(room))
        _time_in_turn(cases)
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for case in cases:
        found[case.model][case.name] = 1000 * statistics.median(case.seconds)
    return dict(found)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_in_turn(cases: Sequence[Case]) -> None:
    for case in cases:
        case.run()  # warm-up
    for _ in progress(range(REPEATS), desc="timing models"):
        for case in cases:
            if not case.enough:
                case.time()


def inputs(model: Any, batch: int, lengths: Sequence[int] = ()) -> Inputs:
    """Rows of random ids (batch, 128), all real tokens unless `lengths` says how many are."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (batch, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, length:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _cases(name: str, folder: Path, threads: int, room: Path) -> list[Case]:
    """All cases of a model, as a classifier of two classes."""
    model = load_classifier(folder, ("0", "1"), LENGTH, seed=0).model.eval()
    answers: dict[str, Callable[[Inputs], Any]] = {"torch fp32": _in_torch(model)}
    if has_onnx():
        answers["onnxruntime fp32"] = exported(model, room, threads)
    cases = [
        Case(name, f"{runtime}, batch {batch}", _bound(answer, inputs(model, batch)))
        for runtime, answer in answers.items()
        for batch in BATCHES
    ]
    return cases + (_gpu_cases(name, folder) if torch.cuda.is_available() else [])


def _bound(answer: Callable[[Inputs], Any], rows: Inputs) -> Callable[[], Any]:
    return lambda: answer(rows)


def _in_torch(model: Any) -> Callable[[Inputs], Tensor]:
    def answer(rows: Inputs) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(**rows).logits
        return logits

    return answer


def _gpu_cases(name: str, folder: Path) -> list[Case]:
    """The cases on the GPU: the answer is waited for, the rows are there already."""
    cases = []
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = load_classifier(folder, ("0", "1"), LENGTH, seed=0).model.eval()
        answer = _in_torch(model.to("cuda", dtype))
        for batch in BATCHES:
            rows = {key: value.cuda() for key, value in inputs(model, batch).items()}
            run = _waited_for(_bound(answer, rows))
            cases.append(Case(name, f"torch {label} on GPU, batch {batch}", run))
    return cases


def _waited_for(run: Callable[[], Any]) -> Callable[[], None]:
    def waited() -> None:
        run()
        torch.cuda.synchronize()

    return waited


def exported(model: Any, room: Path, threads: int) -> Callable[[Inputs], np.ndarray]:
    """The model in onnxruntime, exported by torch for any batch of 128 tokens.

    Raises:
        TrainingError: its logits differ from torch's by more than 1e-4 of their size, on full rows
            or on padded ones.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory(dir=room) as folder:  # a session keeps what it has read
        path = Path(folder) / "model.onnx"
        _export(model, path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def answer(rows: Inputs) -> np.ndarray:
        logits: np.ndarray = session.run(None, {key: t.numpy() for key, t in rows.items()})[0]
        return logits

    for rows in (inputs(model, 1), inputs(model, 3, lengths=(LENGTH, 7, 60))):
        _check_same(_in_torch(model)(rows).numpy(), answer(rows))
    return answer


def _export(model: Any, path: Path) -> None:
    """Write the model as ONNX, quietly: torch tells of packages that it does not need."""
    batch = {0: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings(), _only_critical("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (),
            path,
            kwargs=inputs(model, 2),
            dynamic_shapes={"input_ids": batch, "attention_mask": batch},
            dynamo=True,
            verbose=False,
        )


@contextmanager
def _only_critical(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _check_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = float(np.abs(ours - theirs).max())
    if not difference <= LARGEST_DIFFERENCE * max(1.0, float(np.abs(ours).max())):
        raise TrainingError(
            f"the exported model's logits differ from torch's by {difference:.2g}; run again with "
            "--no_latency, and report the versions of torch and onnxruntime"
        )
