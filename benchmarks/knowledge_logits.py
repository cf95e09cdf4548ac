"""Bytes and fidelity of stored predictions, beside DistillKit's compressor on the same logits.

    python benchmarks/knowledge_logits.py --teacher DIR --data SHARDS --distillkit CHECKOUT

A teacher with a trained MLM head runs over held-out rows. For every number of likeliest tokens:
bytes a position, plain and with zstd on each row's record, and KL(full || stored), what is left
out spread evenly over all other tokens. The same of DistillKit (github.com/arcee-ai/DistillKit):
its own code (at a61c2e7), imported from a checkout, in the two configurations of its README; there
too what is missing from 1 is spread evenly, and zstd is ours. "x 3" are the same logits times
`--sharper`: a head that was trained for a short time is unsure, and a surer one is another case.
Writes `results/knowledge-logits.{json,md}`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard
from common import RESULTS, machine, write_report
from torch import Tensor

from data_prep.shard_format import VALIDATION, ShardReader, read_manifest
from potstill.console import program, progress
from potstill.errors import InputError
from pretrain.attention import choose_attention
from pretrain.batches import NO_LABEL, VALIDATION_EPOCH, Batch, make_batch
from pretrain.encoder import encode
from pretrain.features import Feature, Positions, TopLogits
from pretrain.knowledge.format import ZSTD_LEVEL
from pretrain.knowledge.top_logits import TopK
from pretrain.masking import shard_masking
from pretrain.models import load_encoder

TOKENS = (8, 12, 16, 24, 28, 32, 40, 45, 50, 64, 80, 90, 100, 112, 128)
README = {  # the configurations that DistillKit's README recommends, but for the vocabulary
    "recommended": (128, 16, [0, 1, 2, 3, 4, "sqrt"]),
    "budget": (50, 1, [0, 1, "sqrt"]),
}
Store = Callable[[Tensor, Batch], tuple[list[bytes], TopLogits]]
"""Logits (P, V) -> each row's record, and what it says."""


class Case(NamedTuple):
    """Which logits: at which positions, and times what."""

    positions: Positions
    factor: float


def batches(data: Path, rows: int, micro_batch: int) -> Iterator[Batch]:
    """Masked batches of validation rows, spread over the file.

    Raises:
        InputError: there are fewer rows.
    """
    reader, masking = ShardReader(data, VALIDATION), shard_masking(data, 0.15, seed=0)
    if rows >= reader.rows:
        raise InputError(f"--data {data}: {reader.rows} held-out rows; give --rows below that")
    pad = read_manifest(data).special_ids["pad"]
    chosen = np.linspace(0, reader.rows - 2, rows, dtype=np.int64)  # the last row is padded
    for own in np.split(chosen, range(micro_batch, rows, micro_batch)):
        epochs = np.full_like(own, VALIDATION_EPOCH)
        yield make_batch(reader.read(own), epochs, own, masking, pad)


def potstill_store(positions: Positions, slots: int, vocab: int, k: int) -> Store:
    """Ours."""
    entry = TopK(Feature("logits", positions), slots, vocab, k, 1.0)

    def store(logits: Tensor, batch: Batch) -> tuple[list[bytes], TopLogits]:
        fields = entry.encode({entry.feature: logits}, batch)
        records = [
            b"".join(part[row].tobytes() for part in fields.values())
            for row in range(len(batch.input_ids))
        ]
        tensors = {name: torch.from_numpy(values) for name, values in fields.items()}
        return records, entry.decode(tensors, batch, torch.float32)

    return store


def distillkit_store(slots: int, vocab: int, configuration: str) -> Store:
    """DistillKit's own compressor."""
    from distillkit.compression import (  # type: ignore[import-not-found]
        DistributionQuantizationConfig,
        LogprobCompressor,
    )

    k, exact, terms = README[configuration]
    settings = {"d": vocab, "k": k, "exact_k": exact, "polynomial_terms": terms}
    settings |= {"exact_dtype": "bfloat16", "term_dtype": "float32", "residual_bins": []}
    config = DistributionQuantizationConfig(**settings, delta_encoding=False, error_diffusion=False)
    compressor = LogprobCompressor(config=config)

    def store(logits: Tensor, batch: Batch) -> tuple[list[bytes], TopLogits]:
        packed = compressor.compress(logits.log_softmax(-1)[None])
        ids, logs = compressor.decompress_to_sparse(packed)
        rows = [np.split(part[0].numpy(), len(batch.input_ids)) for part in packed.values()]
        records = [b"".join(part.tobytes() for part in row) for row in zip(*rows, strict=True)]
        mass = logs[0].double().exp().sum(-1)
        rest = (1 - mass).clamp(min=1e-8)  # its `densify` has this floor too
        whole = (mass + rest).log()
        return records, TopLogits(ids[0], logs[0].double() - whole[:, None], rest / whole.exp())

    return store


def divergences(logits: Tensor, top: TopLogits) -> Tensor:
    """KL(full || stored) of each position, float64 (P,); both in nats."""
    logs = logits.double().log_softmax(-1)
    kept = top.log_probabilities > -torch.inf
    stored = top.log_probabilities.double().masked_fill(~kept, 0)
    own = logs.gather(1, top.ids)
    total = (logs.exp() * logs).sum(-1) - (own.exp() * stored).masked_fill(~kept, 0).sum(-1)
    column = torch.where(kept, top.ids, logs.shape[1])
    others = torch.nn.functional.pad(logs.exp(), (0, 1)).scatter_(1, column, 0)[:, :-1].sum(-1)
    each = (top.rest.double() / (logs.shape[1] - kept.sum(-1))).log()
    return total - others * each


class Tally:
    """What one way of storing takes and loses, batch by batch."""

    def __init__(self, store: Store, masked: bool) -> None:
        self.store, self.masked, self.apart = store, masked, list[Tensor]()
        self.plain = self.packed = 0
        self.zstd = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True)

    def take(self, logits: Tensor, batch: Batch) -> None:
        records, top = self.store(logits, batch)
        self.plain += sum(map(len, records))
        self.packed += sum(len(self.zstd.compress(record)) for record in records)
        used = (
            batch.labels != NO_LABEL if self.masked else torch.ones(len(logits), dtype=torch.bool)
        )
        self.apart.append(divergences(logits, top)[used])

    def figures(self) -> dict[str, float]:
        apart = torch.cat(self.apart)
        return {
            "bytes": self.plain / len(apart),
            "zstd": self.packed / len(apart),
            "kl": float(apart.mean()),
            "kl_p99": float(apart.quantile(0.99)),
        }


@torch.inference_mode()
def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of one case: by name of the way, its figures."""
    encoder = load_encoder(str(options.teacher), "--teacher")
    attention = choose_attention("auto", torch.device("cpu"))
    feature, vocab = Feature("logits", case.positions), encoder.shape.vocab
    rows = options.rows if case.positions == "masked" else options.rows // 4
    given = batches(options.data, rows, 16 if case.positions == "masked" else 4)
    tallies: dict[str, Tally] = {}
    entropy, positions = 0.0, 0
    for batch in progress(given, desc=f"{case.positions} x{case.factor:g}", leave=False):
        logits = encode(encoder.model, batch, {feature}, attention)[feature] * case.factor
        if not batch.full:
            raise InputError(f"--data {options.data}: rows with padding; shard a longer text")
        slots = len(logits) // len(batch.input_ids)
        for name, store in stores(case.positions, slots, vocab, options.distillkit):
            tallies.setdefault(name, Tally(store, case.positions == "masked")).take(logits, batch)
        logs = logits.log_softmax(-1)
        entropy -= float((logs.exp() * logs).sum())
        positions += len(logits)
    figures = {name: tally.figures() for name, tally in tallies.items()}
    return {**case._asdict(), "entropy": entropy / positions, "count": positions, "ways": figures}


def stores(
    positions: Positions, slots: int, vocab: int, distillkit: Path | None
) -> Iterator[tuple[str, Store]]:
    """All that is compared, by name."""
    for k in TOKENS:
        yield f"top {k}", potstill_store(positions, slots, vocab, k)
    for name in README if distillkit else ():
        yield f"DistillKit, {name}", distillkit_store(slots, vocab, name)


def equal_fidelity(ways: dict[str, dict[str, float]]) -> Iterator[tuple[str, str]]:
    """Each of DistillKit's, with the least of ours whose mean KL is no higher."""
    ours = [name for name in ways if name.startswith("top")]
    for name in ways:
        if name.startswith("DistillKit"):
            least = [own for own in ours if ways[own]["kl"] <= ways[name]["kl"]]
            if least:
                yield name, least[0]


def table(cases: Sequence[dict[str, Any]]) -> str:
    """At equal fidelity first; then all figures."""
    lines = [
        "| positions | logits | DistillKit | its KL | bytes | with zstd | ours | KL | bytes "
        "| with zstd | of its bytes | both with zstd |",
        "|---|---|---|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        for name, own in equal_fidelity(case["ways"]):
            its, our = case["ways"][name], case["ways"][own]
            lines.append(
                f"| {_case(case)} | {name.removeprefix('DistillKit, ')} | {_figures(its)} "
                f"| {own} | {_figures(our)} | {our['bytes'] / its['bytes']:.0%} "
                f"| {our['zstd'] / its['zstd']:.0%} |"
            )
    lines += ["", "| positions | logits | stored | bytes | with zstd | mean KL | p99 |"]
    lines += ["|---|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {_case(case)} | {name} | {way['bytes']:.0f} | {way['zstd']:.0f} | {way['kl']:.4f} "
        f"| {way['kl_p99']:.4f} |"
        for case in cases
        for name, way in case["ways"].items()
    ]
    return "\n".join(lines) + "\n"


def _figures(way: dict[str, float]) -> str:
    return f"{way['kl']:.4f} | {way['bytes']:.0f} | {way['zstd']:.0f}"


def _case(case: dict[str, Any]) -> str:
    sharper = "" if case["factor"] == 1 else f"x {case['factor']:g}, "
    return f"{case['positions']} | {sharper}entropy {case['entropy']:.1f}"


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--teacher", type=Path, required=True, help="with a trained MLM head")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--distillkit", type=Path, help="a checkout of it; leave out to go without")
    parser.add_argument("--rows", type=int, default=160, help="a quarter of them at all positions")
    parser.add_argument("--sharper", type=float, default=3.0, help="factor of the logits")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="print the numbers instead")
    options = parser.parse_args()
    if options.rows < 4:
        raise InputError(f"--rows {options.rows}: give at least 4, a quarter is for all positions")
    if options.distillkit:
        sys.path.append(str(options.distillkit))
    places: tuple[Positions, ...] = ("masked", "all")
    cases = [Case(place, factor) for place in places for factor in (1.0, options.sharper)]
    measured = [measure(case, options) for case in cases]
    report = {"machine": machine(torch.device("cpu")), "zstd_level": ZSTD_LEVEL, "cases": measured}
    write_report(options.results / "knowledge-logits.json", report, table(measured))
    print(report if options.json else table(measured))


if __name__ == "__main__":
    main()
