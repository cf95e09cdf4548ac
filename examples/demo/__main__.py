"""The main job end to end, small, without any model hub.

    python -m examples.demo --output demo

Prose of this Python installation -> shards -> a teacher by MLM -> a student distilled from it
with `deepspeed` -> both, and a random student, fine-tuned on a task -> report.html, results.json.
Every command is printed; what is done is not done again when the demo is started again.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from examples.demo.prose import read_documents
from examples.demo.report import page
from examples.demo.results import collect, show, slug
from examples.demo.stages import Pipeline, Stage
from examples.demo.task import write_task
from potstill.console import program, say
from potstill.files import whole_folder, write_json, write_text

PYTHON = sys.executable
CPU = Path("ds_configs/cpu.json")
PREPARE = "prepare"  # as a first argument: only write the texts


@dataclass(frozen=True)
class Scale:
    """How much is done; the defaults fit ten minutes on two cores."""

    vocabulary: int = 4096
    seq_length: int = 64
    teacher_layers: int = 4
    student_layers: int = 2
    hidden: int = 128
    heads: int = 4
    teacher_steps: int = 1500
    teacher_rows: int = 16  # a step: many small steps take a short run further
    student_steps: int = 200
    teacher_lr: float = 1e-3
    student_lr: float = 1e-3
    objective: str = "att-mse+hid-seq"
    init: str = "uniform"
    epochs: int = 15
    seeds: int = 3  # of fine-tuning; the table gives their mean
    finetune_lr: float = 1e-3


@dataclass(frozen=True)
class Demo:
    """The folders, and the stages in the order in which they run."""

    output: Path
    scale: Scale
    ranks: int

    def path(self, *names: str) -> Path:
        """A path in the demo's folder."""
        return self.output.joinpath(*names)

    def prepare(self) -> Stage:
        """The texts: corpus and task."""
        command = [PYTHON, "-m", "examples.demo", PREPARE, "--output", str(self.path("text"))]
        return Stage("text", "Collect prose from this Python installation", command, threads=1)

    def shard(self) -> Stage:
        """Shards, with a tokenizer of their own."""
        flags = ["--input", str(self.path("text", "corpus.jsonl")), "--output", self.shards]
        flags += ["--train_tokenizer", str(self.scale.vocabulary)]
        flags += ["--seq_length", str(self.scale.seq_length)]
        return Stage("shards", "Shard it", [PYTHON, "data_prep/shard.py", *flags])

    def teacher(self) -> Stage:
        """A teacher, by masked-language modelling."""
        s = self.scale
        flags = ["--objective", "mlm", "--student_layers", str(s.teacher_layers)]
        flags += ["--student_hidden", str(s.hidden), "--student_heads", str(s.heads)]
        # So short a run cannot overfit: no dropout, and more masked words to learn from.
        flags += ["--dropout", "0", "--mlm_probability", "0.3"]
        flags += ["--lr", str(s.teacher_lr), "--max_steps", str(s.teacher_steps)]
        return self._train(
            "teacher", "Train a teacher to fill in masked words", flags, self._teacher_ds_config()
        )

    def _teacher_ds_config(self) -> Path:
        """The ready ds_config with smaller micro-batches."""
        config = json.loads(CPU.read_text())
        config["train_micro_batch_size_per_gpu"] = max(1, self.scale.teacher_rows // self.ranks)
        path = self.path("ds_config.json")
        write_json(path, config)
        return path

    def student(self) -> Stage:
        """A student, distilled."""
        s = self.scale
        flags = ["--teacher", str(self.path("teacher", "student")), "--objective", s.objective]
        flags += ["--student_layers", str(s.student_layers), "--init", s.init]
        flags += ["--lr", str(s.student_lr), "--max_steps", str(s.student_steps)]
        return self._train("student", "Distil a student from it", flags, CPU)

    def finetune(self, name: str, model: Path, seed: int) -> Stage:
        """A model, fine-tuned on the task."""
        s, name = self.scale, f"{name}-{seed}"
        flags = ["--model", str(model), "--train_file", str(self.path("text", "train.jsonl"))]
        flags += ["--validation_file", str(self.path("text", "validation.jsonl"))]
        flags += ["--epochs", str(s.epochs), "--lr", str(s.finetune_lr), "--seed", str(seed)]
        flags += ["--max_length", str(s.seq_length), "--save_model", "False"]
        output = self.path("finetuned", name)
        command = [PYTHON, "finetune/run.py", *flags, "--output", str(output)]
        title, log = f"Fine-tune: {name}", self.path("logs", f"finetune-{name}.txt")
        return Stage(f"finetune-{name}", title, command, threads=1, log=log)

    def random_student(self) -> Path:
        """A model of the student's shape that never saw any text; with the same tokenizer."""
        folder = self.path("random")
        if not folder.exists():
            config = AutoConfig.from_pretrained(self.path("student", "student"))
            torch.manual_seed(1)
            with whole_folder(folder) as beside:
                AutoModelForMaskedLM.from_config(config).save_pretrained(beside)
                shutil.copytree(self.path("shards", "tokenizer"), beside, dirs_exist_ok=True)
        return folder

    @property
    def shards(self) -> str:
        """The folder of the shards."""
        return str(self.path("shards"))

    def _train(self, name: str, title: str, flags: list[str], ds_config: Path) -> Stage:
        launcher = ["deepspeed", "--num_gpus", str(self.ranks)]
        common = ["--ds_config", str(ds_config), "--data", self.shards]
        common += ["--validate_every", "100", "--validation_rows", "512", "--log_every", "5"]
        command = [*launcher, "pretrain/run.py", *common, *flags]
        return Stage(name, title, [*command, "--output", str(self.path(name))])


def prepare(output: Path) -> None:
    """Write the texts: `corpus.jsonl`, `train.jsonl`, `validation.jsonl`."""
    counts = write_task(read_documents(workers=len(os.sched_getaffinity(0))), output)
    say(
        f"{counts['corpus']:,} documents to pretrain on; {counts['train']:,} sentences to "
        f"fine-tune on and {counts['validation']:,} to score on, of modules kept apart"
    )


def run(demo: Demo) -> None:
    """All stages, then numbers and page."""
    pipeline = Pipeline(demo.path("done"))
    for stage in (demo.prepare(), demo.shard(), demo.teacher(), demo.student()):
        pipeline.run(stage)
    models = {
        "teacher": demo.path("teacher", "student"),
        "distilled student": demo.path("student", "student"),
        "random student": demo.random_student(),
    }
    seeds = range(demo.scale.seeds)
    runs = [
        demo.finetune(slug(name), path, seed) for seed in seeds for name, path in models.items()
    ]
    say(f"\nThree models, fine-tuned alike with {demo.scale.seeds} seeds:")
    pipeline.run_together(runs, workers=2)
    results = collect(demo.output, list(models), demo.scale.seeds, pipeline.records)
    write_json(demo.path("results.json"), results)
    write_text(demo.path("report.html"), page(results))
    show(results, demo.output)


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=[PREPARE], help="only collect the texts")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder of all results")
    parser.add_argument("--ranks", type=int, help="default: one a GPU, or 2 on the CPU")
    args = parser.parse_args()
    if args.part == PREPARE:
        prepare(args.output)
    else:
        run(Demo(args.output, Scale(), args.ranks or torch.cuda.device_count() or 2))


if __name__ == "__main__":
    main()
