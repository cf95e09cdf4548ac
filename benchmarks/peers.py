"""Steps of other people's code, taken from where the user has it, to be measured against.

- MiniLMv2: the class `MiniLM` of Bloomberg's minilmv2.bb, alone (its package imports much that the
  step does not need). Eager attention, encoders without MLM heads, the library Trainer's default
  optimiser, which under these versions is fused AdamW.
- DistilBERT: `Distiller.step` of Hugging Face's research project, with its own optimiser, clipping
  and schedule, weights 5, 2, 1 and temperature 2 as in its README. `git` is stubbed where it is not
  installed: the code only prints a commit by it. Its KL is our cross-entropy less a constant.
- TextBrewer: `GeneralDistiller.train_on_batch` with a `hidden_mse` match of the last layers, on
  encoders without MLM heads and SDPA attention; unfused AdamW, as in its examples.
"""

import contextlib
import importlib
import importlib.util
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bare_step import Learning
from naive import LibraryStep, labels
from torch import Tensor

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.config import ObjectiveConfig


def check_checkout(folder: Path, flag: str, file: str) -> None:
    """Refuse a folder that does not hold the public code.

    Raises:
        InputError: `file` is not in it.
    """
    if not (folder / file).is_file():
        raise InputError(f"{flag} {folder}: {file} is not there; give a checkout of the code")


class MiniLMv2Step(LibraryStep):
    """A step of the public MiniLMv2 code in `folder`."""

    def __init__(
        self, learning: Learning, autocast: bool, device: torch.device, folder: Path
    ) -> None:
        super().__init__(learning, autocast, device, fused=True)
        path = folder / "minilmv2" / "minilmv2.py"
        spec = importlib.util.spec_from_file_location("public_minilmv2", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        heads = ObjectiveConfig(objective=learning.objective, **learning.flags).relation_heads
        self.both = module.MiniLM(
            teacher=self.teacher.base_model,
            student=self.student.base_model,
            L=learning.pair.teacher[0],
            M=learning.pair.student[0],
            relations={(kind, kind): 1 / 3 for kind in (1, 2, 3)},
            A_r=heads,
        )

    def _loss(self, batch: Batch) -> Tensor:
        types = torch.zeros_like(batch.input_ids)
        loss: Tensor = self.both(batch.input_ids, types, batch.valid.long())[0]
        return loss


RELEASED: dict[str, Any] = {
    # where and how it runs
    "dump_path": "",
    "n_gpu": 0,
    "multi_gpu": False,
    "fp16": False,
    "is_master": False,  # the master writes tensorboard files
    "log_interval": 10**9,
    "checkpoint_interval": 10**9,
    # its batches: those of one short epoch, so that its schedule has steps for any benchmark
    "group_by_size": False,
    "batch_size": 1,
    "n_epoch": 10**6,
    "gradient_accumulation_steps": 1,
    "mlm": True,
    "mlm_mask_prop": 0.15,
    "word_mask": 0.8,
    "word_keep": 0.1,
    "word_rand": 0.1,
    # its README's weights, its parser's other defaults
    "alpha_ce": 5.0,
    "alpha_mlm": 2.0,
    "alpha_cos": 1.0,
    "alpha_clm": 0.0,
    "alpha_mse": 0.0,
    "learning_rate": 5e-4,
    "adam_epsilon": 1e-6,
    "weight_decay": 0.0,
    "warmup_prop": 0.05,
    "max_grad_norm": 5.0,
}
"""What the public code's parser would give it."""


class OneBatch(list[None]):
    """As much of a data set as `Distiller` asks for before its first step."""

    batch_sequences = None


class DistilBertStep(LibraryStep):
    """A step of the public DistilBERT code in `folder`."""

    def __init__(
        self, learning: Learning, autocast: bool, device: torch.device, folder: Path
    ) -> None:
        super().__init__(learning, autocast, device, "sdpa", output_hidden_states=True)
        chosen = ObjectiveConfig(objective=learning.objective, **learning.flags).defaulted
        settings = Namespace(
            **RELEASED,
            temperature=chosen["kd_temperature"],
            restrict_ce_to_mask=chosen["kd_positions"] == "masked",
        )
        with _importable(folder):
            code = importlib.import_module("distiller")
        none = torch.zeros(learning.pair.vocab)
        self.distiller = code.Distiller(
            settings, OneBatch([None]), none, self.student, self.teacher
        )
        self.optimizer = self.distiller.optimizer

    def _loss(self, batch: Batch) -> Tensor:
        """The loss that it was about to optimise."""
        kept: list[Tensor] = []
        self.distiller.optimize = kept.append
        try:
            self._take(batch)
        finally:
            del self.distiller.optimize
        return kept[0]

    def step(self, batch: Batch) -> Tensor:
        """One update by its own code."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            self._take(batch)
        return torch.tensor(self.distiller.last_loss)

    def _take(self, batch: Batch) -> None:
        self.distiller.step(batch.input_ids, batch.valid, labels(batch))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """A block in which the modules of a folder of scripts can be imported by their bare names."""
    stubbed = importlib.util.find_spec("git") is None
    sys.path.insert(0, str(folder))
    if stubbed:
        sys.modules["git"] = ModuleType("git")
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if stubbed:
            del sys.modules["git"]


def has_textbrewer() -> bool:
    """Whether TextBrewer can be imported."""
    return importlib.util.find_spec("textbrewer") is not None


class TextBrewerStep(LibraryStep):
    """A step of TextBrewer's `GeneralDistiller` on the last hidden states."""

    def __init__(self, learning: Learning, autocast: bool, device: torch.device) -> None:
        super().__init__(learning, autocast, device, "sdpa", output_hidden_states=True)
        textbrewer: Any = importlib.import_module("textbrewer")
        match = {"feature": "hidden", "loss": "hidden_mse", "weight": 1}
        match |= {"layer_T": learning.pair.teacher[0], "layer_S": learning.pair.student[0]}
        self._folder = tempfile.TemporaryDirectory()  # it writes its log there
        place = {"output_dir": self._folder.name, "log_dir": self._folder.name}
        self.distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(**place, device=device),
            textbrewer.DistillationConfig(intermediate_matches=[match]),
            self.teacher.base_model,
            self.student.base_model,
            self._adapt,
            self._adapt,
        )

    @staticmethod
    def _adapt(batch: dict[str, Tensor], outputs: Any) -> dict[str, Any]:
        return {"hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}

    def _loss(self, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.valid.long()}
        loss: Tensor = self.distiller.train_on_batch(inputs, {})[0]
        return loss
