"""Cuts of stored knowledge: `1l_10t_0.1h` keeps 1 layer, 10 tokens and 10 % of the neurons.

Cut are hidden states, along depth, length and width ("Marginal Utility Diminishes", section 3),
and scores of attention along depth and length. Whatever is not kept never counts.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from potstill.errors import InputError
from pretrain.batches import Batch

LengthChoice = Literal["left_first", "attention", "attention_no_sep"]
WidthChoice = Literal["uniform_mask", "rand_mask", "importance"]
_NUMBERS = {"l": "[0-9]{1,9}", "t": "[0-9]{1,9}", "h": r"[0-9]{0,9}\.?[0-9]{1,9}"}


@dataclass(frozen=True)
class Cut:
    """What is kept of a teacher's knowledge; None is all of it.

    Attributes:
        layers: how many pairs of a uniform mapping, the topmost ones.
        tokens: of a row, at most. width: the share of neurons, above 0 up to 1.
        depth: the teacher layer that the mapping ends at (8 for `t_top8`); None: the last one.
        length, neurons: which tokens and neurons are kept.
    """

    layers: int | None = None
    tokens: int | None = None
    width: float | None = None
    depth: int | None = None
    length: LengthChoice = "left_first"
    neurons: WidthChoice = "uniform_mask"

    @property
    def whole(self) -> bool:
        """Whether the features of the mapped layers are stored as they are."""
        return self.tokens is None and self.width is None

    def slots(self, length: int) -> int:
        """T: how many tokens of a row of `length` are kept, at most."""
        return length if self.tokens is None else min(self.tokens, length)

    def kept_neurons(self, hidden: int) -> int:
        """W: how many of `hidden` neurons are kept."""
        return hidden if self.width is None else max(1, round(self.width * hidden))


def parse_cut(
    keep: str | None = None,
    depth: str | None = None,
    length: str | None = None,
    neurons: str | None = None,
) -> Cut:
    """The cut of `--keep`, `--keep_depth`, `--keep_length` and `--keep_width`.

    Raises:
        InputError: malformed, out of range, or a choice of what `keep` does not cut.
    """
    numbers = _numbers(keep) if keep is not None else {}
    for flag, choice, unit, example in (
        ("--keep_depth", depth, "l", "1l"),
        ("--keep_length", length, "t", "10t"),
        ("--keep_width", neurons, "h", "0.1h"),
    ):
        if choice is not None and unit not in numbers:
            found = "is missing" if keep is None else f"{keep} has no part in {unit}"
            raise InputError(
                f"{flag} {choice} chooses what to keep, but --keep {found}, which says how much; "
                f"give for example --keep {example}, or drop {flag}"
            )
    return Cut(
        layers=int(numbers["l"]) if "l" in numbers else None,
        tokens=int(numbers["t"]) if "t" in numbers else None,
        width=float(numbers["h"]) if "h" in numbers else None,
        depth=None if depth is None else _last_layer(depth),
        length=_choice("--keep_length", length or "left_first", LengthChoice),
        neurons=_choice("--keep_width", neurons or "uniform_mask", WidthChoice),
    )


def _numbers(keep: str) -> dict[str, str]:
    """The numbers of `1l_10t_0.1h` by their unit."""
    parts = keep.split("_")
    units = [part[-1:] for part in parts]
    in_order = [unit for unit in _NUMBERS if unit in units] == units
    if not in_order or not all(
        re.fullmatch(_NUMBERS[unit], part[:-1]) for unit, part in zip(units, parts, strict=True)
    ):
        raise InputError(
            f"--keep {keep!r} is not layers, tokens and a share of neurons, such as 1l_10t_0.1h; "
            "parts may be left out, but keep that order"
        )
    for unit, part in zip(units, parts, strict=True):
        if not 0 < float(part[:-1]) <= (1 if unit == "h" else float("inf")):
            allowed = "above 0, up to 1" if unit == "h" else "at least 1"
            raise InputError(f"--keep {keep}: {part} must be {allowed}; leave it out to keep all")
    return {unit: part[:-1] for unit, part in zip(units, parts, strict=True)}


def _last_layer(depth: str) -> int:
    match = re.fullmatch("t_top([1-9][0-9]{0,8})", depth)
    if match is None:
        raise InputError(
            f"--keep_depth {depth!r} is not t_top and the teacher layer that the mapping ends at, "
            "such as t_top8 or t_top12"
        )
    return int(match[1])


def _choice(flag: str, value: str, kind: Any) -> Any:
    if value not in get_args(kind):
        raise InputError(f"{flag} {value!r} is none of {', '.join(get_args(kind))}")
    return value


def mapped_layers(cut: Cut, student_layers: int | None, teacher_layers: int) -> str | None:
    """What `--layers` is under a cut in depth, `STUDENT:TEACHER,…`; None where there is none.

    Of a mapping of student layer m to teacher layer floor(m N' / M), with N' the layer that it
    ends at, the topmost pairs.

    Args:
        student_layers: M; None where it is not known, which only the last pair can do without.

    Raises:
        InputError: more pairs than the student has layers, a layer that the teacher has not, or
            M is not known.
    """
    if cut.layers is None:
        return None
    last = teacher_layers if cut.depth is None else cut.depth
    if last > teacher_layers:
        raise InputError(
            f"--keep_depth t_top{last}: the teacher has only {teacher_layers} layers; give "
            f"t_top{teacher_layers} or less"
        )
    if cut.layers == 1 and last == teacher_layers:
        return "last"
    if student_layers is None:
        raise InputError(
            f"--keep {cut.layers}l up to teacher layer {last} is for students of one depth; give "
            "it: --student_layers"
        )
    if cut.layers > student_layers:
        raise InputError(
            f"--keep {cut.layers}l: a student of {student_layers} layers learns from at most "
            f"{student_layers}; keep fewer, or raise --student_layers"
        )
    first = student_layers - cut.layers + 1
    pairs = [(m, m * last // student_layers) for m in range(first, student_layers + 1)]
    return ",".join(f"{own}:{other}" for own, other in pairs)


def eligible(batch: Batch, choice: LengthChoice, sep_id: int) -> Tensor:
    """Which tokens of a batch may be kept: bool (B, L). sep_id: that of [SEP]."""
    if choice == "attention_no_sep":
        return batch.valid & (batch.input_ids != sep_id)
    return batch.valid


class KeptCounts(NamedTuple):
    """What a batch holds of units that are kept; names as in `Batch.counts`."""

    kept_tokens: int
    kept_pairs: int


def kept_counts(batch: Batch, cut: Cut, sep_id: int) -> KeptCounts:
    """How many tokens of a batch are kept, and pairs of a kept query and a valid key.

    Args:
        batch: on the CPU. sep_id: that of [SEP].
    """
    length = batch.valid.shape[1]
    kept = eligible(batch, cut.length, sep_id).sum(dim=1).clamp(max=cut.slots(length))
    return KeptCounts(int(kept.sum()), int((kept * batch.valid.sum(dim=1)).sum()))
