"""Bytes of stored knowledge by objective, cut and precision, and what they would buy: nothing runs.

    python benchmarks/knowledge_bytes.py

For a teacher of BERT-base's shape (12 x 768), rows of 128 tokens and the ACL 2023 paper's run of
13.1 billion of them. Bytes are those of the records that `pretrain/cache_knowledge.py` writes;
under zstd, predictions take what `results/knowledge-logits.json` measured on another teacher.
Times and rates are by FLOPs (`pretrain/flops.py`), for a device that does as many a second as a
training of 12 x 768 -> 6 x 768 by Att-MSE takes at `--tokens_per_second`, whatever the student: an
assumption, not a measurement. `docs/knowledge.md` says what follows from it.
Writes `results/knowledge-bytes.{json,md}` and `results/knowledge-saves.md`.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, write_report

from data_prep.shard_format import TRAIN, VALIDATION
from potstill.console import program
from potstill.files import write_text
from pretrain.batches import BATCHES_VERSION
from pretrain.flops import Work, forward_flops, student_flops, training_flops
from pretrain.knowledge.cuts import mapped_layers, parse_cut
from pretrain.knowledge.entries import row_bytes
from pretrain.knowledge.format import Contents
from pretrain.knowledge.layout import features_of, make_entries
from pretrain.knowledge.plan import size_of
from pretrain.models import Shape
from pretrain.objectives import Settings, build_objective, defaults_of
from pretrain.objectives.composite import WeightedSum
from pretrain.student.depth import map_layers

LENGTH, MASKED, VOCAB = 128, 0.15, 30522
TOKENS = 13.1e9
TEACHER = Shape(12, 768, 12, 3072, VOCAB, 512, 768)
STUDENTS = {
    "6x768": Shape(6, 768, 12, 3072, VOCAB, 512, 768),
    "6x384": Shape(6, 384, 12, 1536, VOCAB, 512, 384),
    "4x312": Shape(4, 312, 12, 1200, VOCAB, 512, 312),
}


class Case(NamedTuple):
    """What is stored, in words of flags; `zstd`: bytes a masked position, where they are known."""

    objective: str
    dtype: str = "fp16"
    keep: str = ""
    keep_length: str = ""
    keep_width: str = ""
    top_k: int = 0
    zstd: bool = False

    @property
    def flags(self) -> str:
        """The cut as it is given."""
        chosen = [self.keep, self.keep_length, self.keep_width]
        return ", ".join(filter(None, [*chosen, f"top {self.top_k}" if self.top_k else ""]))

    @property
    def form(self) -> str:
        """The precision on disk; predictions that are cut have their own."""
        logits = "5 bits a pair" if self.top_k else ""
        features = "" if self.top_k and self.objective == "vanilla-kd" else self.dtype
        return ", ".join(filter(None, [features, logits, "zstd" if self.zstd else ""]))


CASES = (
    Case("tinybert"),
    Case("minilmv2"),
    Case("att-mse", "fp32"),
    Case("att-mse"),
    Case("att-mse", "int8"),
    Case("att-mse", "fp16", "10t", "attention"),
    Case("att-mse", "int8", "10t", "attention"),
    Case("hid-seq"),
    Case("hid-seq", "int8"),
    Case("hid-seq", "int8", "0.1h"),
    Case("hid-seq", "int8", "10t", "attention"),
    Case("hid-seq", "int8", "1l_10t_0.1h"),
    Case("hid-seq", "int8", "1l_10t_0.1h", "attention", "rand_mask"),
    Case("hid-seq", "int8", "1l_10t_0.1h", "attention", "importance"),
    Case("hid-cls"),
    Case("hid-cls", "int8"),
    Case("vanilla-kd"),
    Case("vanilla-kd", top_k=128),
    Case("vanilla-kd", top_k=50),
    Case("vanilla-kd", top_k=50, zstd=True),
    Case("distilbert", top_k=50),
)


def objective_of(name: str, student: Shape, mapping: str | None = None) -> WeightedSum:
    """The objective for a student, at the layers of the mapping or at its own."""
    chosen = defaults_of(name)
    pairs = map_layers(mapping or chosen["layers"], student.layers, TEACHER.layers)
    settings = Settings(
        pairs, temperature=chosen["kd_temperature"], positions=chosen["kd_positions"]
    )
    return build_objective(name, settings)


def contents_of(case: Case, student: Shape) -> Contents:
    """What `cache_knowledge.py` would store of a row; what it is of is left out."""
    flags = (case.keep or None, None, case.keep_length or None, case.keep_width or None)
    cut, chosen = parse_cut(*flags), defaults_of(case.objective)
    layers = mapped_layers(cut, student.layers, TEACHER.layers) or chosen["layers"]
    objective = objective_of(case.objective, student, layers)
    for name, term in zip(objective.names, objective.objectives, strict=True):
        term.check_cut(name, cut)
    return Contents(
        teacher="",
        teacher_name="",
        teacher_config={},
        trained_head=True,
        tokenizer="",
        shards="",
        seq_length=LENGTH,
        sep_id=102,
        rows={TRAIN: 1, VALIDATION: 1},
        mlm_probability=MASKED,
        mask_whole_words=False,
        copies=1,
        seed=0,
        batches_version=BATCHES_VERSION,
        objective=case.objective,
        layers=layers,
        features=features_of(objective, cut),
        keep=case.keep,
        keep_depth="",
        keep_length=case.keep_length,
        keep_width=case.keep_width,
        kd_temperature=chosen["kd_temperature"],
        logits_top_k=case.top_k,
        dtype=case.dtype,
        compression="none",
        precision="float32",
        micro_batch=1,
        rows_per_file=1,
    )


def bytes_a_token(case: Case, student: Shape) -> float:
    """Of a row's record over its tokens."""
    plain = row_bytes(make_entries(contents_of(case, student), TEACHER)) / LENGTH
    return plain * zstd_share(case.top_k) if case.zstd else plain


def zstd_share(top_k: int) -> float:
    """What zstd left of masked predictions, where it was measured (the unsure teacher's)."""
    cases = json.loads((RESULTS / "knowledge-logits.json").read_text())["cases"]
    (found,) = [c for c in cases if c["positions"] == "masked" and c["factor"] == 1]
    way: dict[str, float] = found["ways"][f"top {top_k}"]
    return way["zstd"] / way["bytes"]


def figures(case: Case, flops_per_second: float) -> dict[str, Any]:
    """A case's bytes, and rates by FLOPs: bytes a second that the teacher gives, students take."""
    work = Work(512, LENGTH, MASKED)
    rates = {}
    for name, student in STUDENTS.items():
        own = student_flops(objective_of(case.objective, student), student, TEACHER, work)
        rates[name] = bytes_a_token(case, student) * flops_per_second / own
    each = bytes_a_token(case, STUDENTS["6x768"])
    objective = objective_of(case.objective, STUDENTS["6x768"])
    teacher = forward_flops(TEACHER, objective.teacher_features(), LENGTH, MASKED)
    written = each * flops_per_second / teacher
    return {**case._asdict(), "bytes_a_token": each, "write": written, "read": rates}


def savings(name: str, flops_per_second: float) -> dict[str, Any]:
    """By FLOPs: hours of the teacher over the run, and how much faster each student is without."""
    work = Work(512, LENGTH, MASKED)
    objective = objective_of(name, STUDENTS["6x768"])
    teacher = forward_flops(TEACHER, objective.teacher_features(), LENGTH, MASKED)
    ratios = {}
    for student, shape in STUDENTS.items():
        own = objective_of(name, shape)
        both = training_flops(own, shape, TEACHER, work)
        ratios[student] = both / student_flops(own, shape, TEACHER, work)
    hours = TOKENS * teacher / flops_per_second / 3600
    return {"objective": name, "teacher_mflops": teacher / 1e6, "hours": hours, "ratio": ratios}


def bytes_table(rows: list[dict[str, Any]]) -> str:
    """Bytes, and rates by FLOPs, as Markdown."""
    students = " | ".join(f"read for {name}" for name in STUDENTS)
    lines = [
        "| objective | kept | precision | bytes a token | 13.1 B tokens | written by the teacher "
        f"| {students} |",
        "|---|---|---|" + "---:|" * (3 + len(STUDENTS)),
    ]
    for row in rows:
        own = Case(**{name: row[name] for name in Case._fields})
        rates = " | ".join(f"{size_of(rate)}/s" for rate in row["read"].values())
        lines.append(
            f"| {own.objective} | {own.flags or 'all'} | {own.form} "
            f"| {row['bytes_a_token']:,.1f} | {size_of(row['bytes_a_token'] * TOKENS)} "
            f"| {size_of(row['write'])}/s | {rates} |"
        )
    return "\n".join(lines) + "\n"


def savings_table(rows: list[dict[str, Any]]) -> str:
    """What storing saves at best, by FLOPs, as Markdown."""
    students = " | ".join(f"12x768 → {name}" for name in STUDENTS)
    lines = [
        f"| objective | teacher, MFLOP a token | its hours in the run | {students} |",
        "|---|" + "---:|" * (2 + len(STUDENTS)),
    ]
    for row in rows:
        ratios = " | ".join(f"{ratio:.2f}" for ratio in row["ratio"].values())
        lines.append(
            f"| {row['objective']} | {row['teacher_mflops']:.1f} | {row['hours']:.2f} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens_per_second", type=float, default=1e6, help="of Att-MSE, 6x768")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    student, work = STUDENTS["6x768"], Work(512, LENGTH, MASKED)
    a_token = training_flops(objective_of("att-mse", student), student, TEACHER, work)
    speed = a_token * options.tokens_per_second
    rows = [figures(case, speed) for case in CASES]
    saved = [savings(name, speed) for name in dict.fromkeys(case.objective for case in CASES)]
    table = bytes_table(rows)
    report = {"tokens": TOKENS, "flops_per_second": speed, "bytes": rows, "saved": saved}
    write_report(options.results / "knowledge-bytes.json", report, table)
    write_text(options.results / "knowledge-saves.md", savings_table(saved))
    print(table, savings_table(saved), sep="\n", end="")


if __name__ == "__main__":
    main()
