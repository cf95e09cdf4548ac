"""What an extraction is told: the settings of extract.py, help beside every field."""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from data_prep.shard_format import read_manifest
from potstill.errors import InputError
from pretrain.models import check_local
from pretrain.options import check, check_values, option
from pretrain.run_folder import data_identity
from pretrain.student.depth import LIST, NAMED_INITS
from pretrain.student.width import CONSISTENT, LOWEST

IMPORTANCE, RANDOM = "etd-impt", "etd-rand"


def _check_name(flag: str, name: str | None, known: Sequence[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
        raise InputError(f"--{flag} {name!r} is not known; nearest: {', '.join(near)}")


@dataclass(frozen=True)
class ExtractConfig:
    """What an extraction is told."""

    teacher: str | None = option("Teacher: a Hugging Face folder or hub name.")
    revision: str | None = option("Branch, tag or commit of a teacher on the hub.")
    layers: int | None = option("The student's layers.")
    hidden: int | None = option("The student's hidden size, a multiple of the teacher's heads.")
    head_size: int | None = option(
        "Width of a head; Hugging Face encoders have hidden / heads, so it only checks --hidden."
    )
    ffn: int | None = option("Feed-forward size. Default: in the teacher's proportion.")
    method: str | None = option(
        "etd-impt: keep the neurons that matter most to the MLM loss on the first --rows rows (the "
        "teacher needs a trained MLM head). etd-rand: keep random ones; needs no data."
    )
    depth: str = option(
        "Which teacher layers stay: first, last, uniform, alternate, or a list such as 1,8,12.",
        "uniform",
    )
    data: str | None = option(
        "Folder of shards (data_prep/shard.py), with the teacher's tokenizer."
    )
    rows: int = option("Training rows that importance is measured on, from the first.", 10_000)
    micro_batch: int = option("Rows at a time; fewer need less memory.", 32)
    mlm_probability: float = option("Share of tokens to mask.", 0.15)
    validation_rows: int = option("Held-out rows for the MLM loss before and after.", 1_000)
    ablation: str = option(
        "The paper's ablations: rev-ffn, rev-head, rev-hidden or rev-all keep the *least* "
        "important neurons; no-hidden-consistency chooses hidden dimensions layer by layer.",
        CONSISTENT,
    )
    seed: int = option("Of random choices, masks, and a head that the teacher has not.", 0)
    output: str | None = option("Folder of the student; it appears whole or not at all.")
    local_rank: int = option("Set by the launcher.", -1)

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("teacher", "layers", "hidden", "output", "method"):
            check(getattr(self, name) is not None, f"--{name} is missing; see --help")
        _check_name("method", self.method, (IMPORTANCE, RANDOM))
        _check_name("ablation", self.ablation, tuple(LOWEST))
        check(
            self.method == IMPORTANCE or not LOWEST[self.ablation],
            f"--ablation {self.ablation} reverses importance, which --method {RANDOM} does not "
            f"look at; use --method {IMPORTANCE}",
        )
        if not LIST.fullmatch(self.depth):
            _check_name("depth", self.depth, [n for n in NAMED_INITS if n != "random"])
        for name in ("layers", "hidden", "head_size", "ffn", "rows", "micro_batch"):
            value = getattr(self, name)
            check(value is None or value > 0, f"--{name} {value} must be positive")
        check(
            self.validation_rows > 0, f"--validation_rows {self.validation_rows} must be positive"
        )
        check(0 <= self.seed < 2**63, f"--seed {self.seed} must lie in 0 … 2^63 - 1")
        check(
            0 < self.mlm_probability < 1,
            f"--mlm_probability {self.mlm_probability} must lie between 0 and 1",
        )
        check(
            self.data is not None or self.method != IMPORTANCE,
            f"--method {IMPORTANCE} measures importance on text: give --data, a folder of shards "
            f"(data_prep/shard.py), or use --method {RANDOM}",
        )

    def identity(self) -> dict[str, Any]:
        """What makes it this extraction and no other; shards go by their content.

        Raises:
            InputError: `--data` is no folder of shards.
        """
        free = ("micro_batch", "validation_rows", "output", "local_rank")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        if self.data is not None:
            check_local(self.data, "--data")
            read_manifest(Path(self.data))
            settings["data"] = data_identity(Path(self.data))
        return settings


def parse_config(arguments: Sequence[str] | None = None) -> ExtractConfig:
    """Parse the command line.

    Raises:
        InputError: values that no extraction can have, or unknown flags.
        SystemExit: malformed values (status 2), or `--help` (status 0).
    """
    parser = HfArgumentParser(
        (ExtractConfig,),
        prog="extract.py",
        description="Extract a student of any width and depth from a teacher (ETD).",
        epilog="Example: python pretrain/extract.py --teacher google-bert/bert-base-uncased "
        "--layers 6 --hidden 384 --method etd-impt --data shards --output students/etd-6x384. "
        "Then: deepspeed pretrain/run.py --student students/etd-6x384 --objective etd ...",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    config, unknown = parser.parse_args_into_dataclasses(
        args=arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise InputError(f"unknown flags: {' '.join(unknown)}; --help lists all there are")
    return config
