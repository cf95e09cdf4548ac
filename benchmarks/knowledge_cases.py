"""What `knowledge_speed` compares: pairs of models, what is stored for them, and real trainers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bare_step import Pair
from common import ROOT, write_ds_config
from knowledge_store import Way, few_rows, store_knowledge, words
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from data_prep.shard_format import TOKENIZER_FOLDER, TRAIN, VALIDATION, ShardReader
from pretrain.batches import Slices, TrainingBatches, training_batches
from pretrain.checkpoint import CheckpointWriter
from pretrain.config import parse_config
from pretrain.engine import build_run
from pretrain.loop import Loop
from pretrain.masking import shard_masking
from pretrain.plan import make_plan
from pretrain.signals import Signals

WHOLE = Way("whole, bf16", {"dtype": "bf16"})
"""What a live teacher gives under a bf16 ds_config, bit by bit."""
_TENTH = Way("1l_10t_0.1h, int8", {"dtype": "int8", "keep": "1l_10t_0.1h"})
_TOKENS = Way("1l_10t, bf16", {"dtype": "bf16", "keep": "1l_10t"})
_TOP = Way("top 50", {"logits_top_k": 50})
WAYS: dict[str, tuple[Way, ...]] = {
    "hid-seq": (WHOLE, _TENTH),
    "hid-cls": (WHOLE,),
    "att-mse": (WHOLE, _TOKENS),
    "att-kl": (WHOLE, _TOKENS),
    "minilmv2": (WHOLE,),
    "vanilla-kd": (WHOLE, _TOP),
}
RANDOM = ("12x768-4x312", "12x768-6x384", "12x768-6x768")
REAL = "6x384-3x384"


class Stored(NamedTuple):
    """One knowledge: whose, for what, and in which way."""

    teacher: str
    objective: str
    way: str


@dataclass(frozen=True)
class Case:
    """A pair of models and an objective. teacher: its folder, named for people."""

    pair: Pair
    objective: str
    teacher: Path
    title: str

    @property
    def name(self) -> str:
        """Such as "att-mse 12x768-4x312"."""
        return f"{self.objective} {self.pair}"

    @property
    def student(self) -> dict[str, Any]:
        """Flags of run.py: the student's shape, and what it learns."""
        layers, hidden = self.pair.student
        flags: dict[str, Any] = {
            "student_layers": layers,
            "student_hidden": hidden,
            "student_ffn": 4 * hidden,
        }
        flags |= {"student_heads": self.pair.heads, "objective": self.objective}
        if self.objective == "minilmv2":  # 48 heads do not divide a width of 312
            both = (n for n in (48, 24, 12, 4) if not (hidden % n or self.pair.teacher[1] % n))
            flags["relation_heads"] = next(both)
        return flags

    def stored(self, way: Way) -> Stored:
        """Which knowledge of its teacher it learns from."""
        return Stored(self.title, self.objective, way.name)


class Places:
    """Folders of one measurement: a few rows, ds_configs, and knowledge, stored when asked for.

    Attributes:
        rows: of a micro-batch. stored: the folders of what is stored by now.
    """

    def __init__(
        self, folder: Path, data: Path, rows: int, micro_batch: int, device: torch.device
    ) -> None:
        self.folder, self.rows, self.device = folder, micro_batch, device
        self.data = few_rows(data, folder / "rows", {TRAIN: rows, VALIDATION: micro_batch})
        self.stored: dict[Stored, Path] = {}

    def sizes(self, accumulation: int) -> Path:
        """The device's ZeRO-1 ds_config in bfloat16 with so many micro-batches a step."""
        name = "cpu_bf16" if self.device.type == "cpu" else "zero1_bf16"
        source = ROOT / "ds_configs" / f"{name}.json"
        path = self.folder / f"ds-{accumulation}.json"
        return write_ds_config(source, path, self.rows * accumulation, 1, self.rows)

    def knowledge(self, case: Case, way: Way) -> Path:
        """The folder of what a case's teacher knows, in one way."""
        key = case.stored(way)
        if key not in self.stored:
            flags: dict[str, Any] = {
                "ds_config": self.sizes(1),
                "teacher": case.teacher,
                "data": self.data,
            }
            flags |= {"objective": case.objective, **way.flags}
            self.stored[key] = self.folder / f"knowledge-{len(self.stored)}"
            store_knowledge(flags, self.stored[key], self.device)
        return self.stored[key]


class Trainer:
    """One student that takes steps of the real loop, and writes nothing.

    Its loader makes groups of a turn's micro-batches, so that what a turn uses it also reads.

    Args:
        knowledge: None lets it learn from the live teacher.
        steps: of a turn. accumulation: micro-batches of a step.
    """

    def __init__(
        self, case: Case, places: Places, knowledge: Path | None, steps: int, accumulation: int
    ) -> None:
        source = {"knowledge": knowledge} if knowledge else {"teacher": case.teacher, "copies": 1}
        given = {"data": places.data, "ds_config": places.sizes(accumulation), "max_steps": 10**6}
        given |= {"log_every": 10**6, "output": places.folder / "run", **case.student}
        config = parse_config([*words(given | source), "--no_check_shards", "--dry_run"])
        plan = make_plan(config, places.device)
        self.loop = Loop(*build_run(plan, places.device, Signals(), CheckpointWriter()))
        self._steps = steps
        masking = shard_masking(places.data, config.data.mlm_probability, config.run.seed)
        reader = plan.knowledge.reader() if plan.knowledge is not None else None
        pad, slices = plan.manifest.special_ids["pad"], Slices(places.rows, accumulation, 0, 1)
        shards = ShardReader(places.data, TRAIN)
        batches = TrainingBatches(shards, masking, pad, slices, config.run.seed, 1, reader)
        batches.group = steps * accumulation
        self._batches = training_batches(batches, 0, 0, pin=False)

    def turn(self) -> None:
        """The steps of one turn."""
        for _ in range(self._steps):
            self.loop.step(self._batches)

    def loss(self) -> float:
        """Of its last step."""
        (learner,) = self.loop.run.learners
        return learner.loss()[0]


def random_teacher(pair: Pair, data: Path, folder: Path) -> Path:
    """A BERT with random weights, with the tokenizer of shards."""
    tokenizer = AutoTokenizer.from_pretrained(data / TOKENIZER_FOLDER)
    layers, hidden = pair.teacher
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=pair.heads,
        intermediate_size=4 * hidden,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
