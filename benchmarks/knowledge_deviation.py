"""What does the precision of stored knowledge change in what a student learns?

    python benchmarks/knowledge_deviation.py --data SHARDS --head_teacher runs/head/frozen/student

The real teacher (packaged, 6x384) gives its features of real rows in float32; they go through the
very entries of `pretrain.knowledge`, encoded and decoded again, in every precision, and for `kd`
also as the likeliest tokens alone (`--head_teacher`, which has a trained MLM head). A student of
half the layers, with random weights, compares loss and gradient with those of float32 knowledge:
at the start, and again after `--steps` steps of AdamW on float32 knowledge, where it has come
closer to the teacher. (The loss of `kd` on the likeliest tokens is another number by design, since
all others count as one; its gradient can be compared.) Under the objectives of `--trained`,
students also take all of these steps on each precision, from equal weights, on equal rows: their
held-out losses are measured against float32 knowledge alike. No dropout, so that nothing else
differs.

About 15 minutes on one core. Writes `results/knowledge-deviation.{json,md}`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, packaged_teacher, write_report
from knowledge_study import MEASURED, SHARE, Make, Study, Taught, make_study
from torch import Tensor

from potstill.console import program, progress
from potstill.errors import InputError
from pretrain.config import ScheduleConfig
from pretrain.features import Feature
from pretrain.knowledge.codecs import Precision, get_codec
from pretrain.knowledge.entries import Entry
from pretrain.knowledge.hidden import Whole
from pretrain.knowledge.top_logits import TopK, WholeLogits
from pretrain.masking import most_masked
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.step import Distillation

OBJECTIVES = ("hid-seq", "hid-cls", "cos", "att-mse", "att-kl", "val-kl", "minilmv2", "kd")
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp16", "int8", "fp8")
TOP = (16, 50, 128)
EXACT = "fp32"


def ways(name: str, study: Study) -> dict[str, Make]:
    """How the features of an objective are stored, by name."""
    shape, length = study.teacher.shape, study.manifest.seq_length
    slots = most_masked(SHARE, length)

    def whole(precision: Precision) -> Make:
        def make(feature: Feature) -> Entry:
            if feature.kind == "logits":
                return WholeLogits(feature, get_codec(precision), slots, shape.vocab)
            heads = 1 if feature.kind == "hidden" else shape.heads
            return Whole(feature, precision, length, shape.hidden, heads)

        return make

    def top(k: int) -> Make:
        return lambda feature: TopK(feature, slots, shape.vocab, k, 1.0)

    found = {str(precision): whole(precision) for precision in PRECISIONS}
    return found | ({f"top {k}": top(k) for k in TOP if k < shape.vocab} if name == "kd" else {})


def gradient(study: Study, module: Distillation, given: Sequence[Taught]) -> tuple[float, Tensor]:
    """Mean loss and gradient, float64 (parameters,), over some batches."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    losses = [study.loss(module, one) for one in given]
    loss = torch.stack(losses).mean()
    parts = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([part.flatten().double() for part in parts])


def deviations(
    study: Study, module: Distillation, makes: dict[str, Make]
) -> dict[str, dict[str, float]]:
    """Of each way from float32 knowledge: of the loss and the gradient, over their size."""
    loss, wanted = gradient(study, module, study.measured)
    found = {}
    for name, make in makes.items():
        other, given = gradient(study, module, study.stored(study.measured, make))
        found[name] = {
            "loss": other / loss - 1,
            "gradient": float((given - wanted).norm() / wanted.norm()),
            "cosine": float(given @ wanted / (given.norm() * wanted.norm())),
        }
    return found


def train(study: Study, make: Make | None, title: str) -> Distillation:
    """A student after all steps on float32 knowledge, or on what storage makes of it."""
    module, settings = study.student(), ScheduleConfig(max_steps=len(study.training))
    optimizer = build_optimizer(parameter_groups(module, settings.weight_decay), settings)
    for one in progress(study.training, desc=title, unit="step", leave=False):
        given = one if make is None else study.stored([one], make)[0]
        study.loss(module, given).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module


@torch.no_grad()
def held_out_loss(study: Study, module: Distillation) -> float:
    """The mean loss on held-out rows against float32 knowledge."""
    return float(torch.stack([study.loss(module, one) for one in study.held_out]).mean())


def measure(name: str, source: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one objective."""
    study = make_study(name, source, options)
    makes = ways(name, study)
    start = study.student()
    done = train(study, None, f"{name} {EXACT}")
    losses = {EXACT: held_out_loss(study, done)}
    for way, make in makes.items() if name in options.trained else ():
        losses[way] = held_out_loss(study, train(study, make, f"{name} {way}"))
    return {
        "objective": name,
        "at_the_start": deviations(study, start, makes),
        "after_steps": deviations(study, done, makes),
        "held_out_before": held_out_loss(study, start),
        "held_out": losses,
    }


def table(report: dict[str, Any]) -> str:
    """Both tables as Markdown."""
    steps = report["settings"]["steps"]
    lines = [
        "| objective | stored | loss, at the start | gradient | cosine "
        f"| loss, after {steps} steps | gradient | cosine |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        for way, start in row["at_the_start"].items():
            figures = " | ".join(cells(own) for own in (start, row["after_steps"][way]))
            lines.append(f"| {row['objective']} | {way} | {figures} |")
    lines += [
        "",
        f"| objective | trained on | held-out loss after {steps} steps | over that of {EXACT} |",
        "|---|---|---:|---:|",
    ]
    for row in report["rows"]:
        if list(row["held_out"]) == [EXACT]:  # trained on nothing that it could be compared with
            continue
        exact = row["held_out"][EXACT]
        lines.append(f"| {row['objective']} | nothing yet | {row['held_out_before']:.6g} | |")
        for way, loss in row["held_out"].items():
            lines.append(f"| {row['objective']} | {way} | {loss:.6g} | {loss / exact - 1:+.2%} |")
    return "\n".join(lines) + "\n"


def cells(own: dict[str, float]) -> str:
    """Relative deviations, and the angle as what its cosine lacks to 1."""
    return f"{own['loss']:+.1e} | {own['gradient']:.1e} | 1 - {max(0.0, 1 - own['cosine']):.0e}"


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", type=Path, required=True, help="shards with the teacher's vocabulary")
    add("--teacher", type=Path, help="Default: the packaged one.")
    add("--head_teacher", type=Path, help="of kd, with a trained MLM head; leave out to go without")
    add("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    add("--trained", nargs="*", choices=OBJECTIVES, default=["hid-seq", "att-mse"])
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=4, help="rows of a step")
    add("--held_out", type=int, default=8, help="batches of held-out rows")
    add("--json", type=Path, default=RESULTS / "knowledge-deviation.json", help="figures; .md too")
    options = parser.parse_args()
    if options.steps < 1 or options.held_out < MEASURED:
        raise InputError(f"give --steps of at least 1 and --held_out of at least {MEASURED}")
    torch.set_num_threads(1)
    rows = []
    for name in options.objectives:
        source = options.head_teacher if name == "kd" else options.teacher or packaged_teacher()
        if source is not None:
            rows.append(measure(name, str(source), options))
    settings = {n: getattr(options, n) for n in ("steps", "batch", "held_out")}
    report = {"machine": machine(torch.device("cpu")), "settings": settings, "rows": rows}
    write_report(options.json, report, table(report))
    print(table(report))


if __name__ == "__main__":
    main()
