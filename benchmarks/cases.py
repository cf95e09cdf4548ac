"""What `step` and `memory` compare: the cases, and for each of them ours and a rival's steps.

The rival is the public code of the paper where it is there, otherwise the naive step (`naive`,
`peers`). Both start from the same weights, see the same masked rows, and learn the same: `agree`
refuses a rival whose gradient is another one.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from bare_step import BareStep, Learning, Pair, Precision, random_batch
from naive import LibraryStep, NaiveStep
from peers import DistilBertStep, MiniLMv2Step, TextBrewerStep, check_checkout, has_textbrewer
from torch import Tensor, nn

from potstill.errors import InputError, PotstillError
from pretrain.batches import Batch

SMALL, BASE = Pair((6, 384), (3, 384)), Pair((12, 768), (6, 768))
TINY = Pair((2, 48), (1, 48), heads=4, vocab=211)
AGREEMENT = 1e-3
"""How far a rival's gradient may be from ours: float32 sums in another order are off by 1e-6."""

RivalStep = Callable[[Learning, bool, torch.device], LibraryStep]


class Step(Protocol):
    """One variant of a case."""

    student: nn.Module

    def loss(self, batch: Batch) -> Tensor:
        """A scalar with its graph."""

    def step(self, batch: Batch) -> Tensor:
        """One optimiser update; the loss, detached."""


@dataclass(frozen=True)
class Case:
    """An objective on a pair of models, with its flags, and whose code it may be measured against.

    `peer` is "minilmv2", "distilbert", "textbrewer" or "".
    """

    pair: Pair
    objective: str
    peer: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as "att-mse 12x768-6x768"."""
        where = "".join(f" {value}" for value in self.flags.values())
        return f"{self.objective}{where} {self.pair}"

    def learning(self, dropout: float) -> Learning:
        """What a step of it teaches."""
        return Learning(self.pair, self.objective, self.flags, dropout)


CASES = (
    Case(SMALL, "att-mse"),
    Case(BASE, "att-mse"),
    Case(SMALL, "minilmv2", "minilmv2"),
    Case(BASE, "minilmv2", "minilmv2"),
    Case(SMALL, "distilbert", "distilbert", {"kd_positions": "masked"}),
    Case(SMALL, "distilbert", "distilbert", {"kd_positions": "all"}),
    Case(SMALL, "hid-seq", "textbrewer"),
)


class Rival(NamedTuple):
    """Whose code a case is measured against."""

    name: str
    build: RivalStep


def add_arguments(parser: ArgumentParser) -> None:
    """The flags that `step` and `memory` share."""
    parser.add_argument("--only", default="", help="Cases that have this in their names.")
    parser.add_argument("--length", type=int, default=128, help="Tokens of a row.")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--minilmv2", type=Path, help="A checkout of the public MiniLMv2 code.")
    parser.add_argument("--distilbert", type=Path, help="The folder of the public DistilBERT code.")
    parser.add_argument("--tiny", action="store_true", help="Tiny models, few short rows: a test.")
    parser.add_argument("--json", type=Path, help="Write the figures there, the table beside it.")


def check_peers(options: Namespace) -> None:
    """Refuse folders without the public code in them.

    Raises:
        InputError: the code is not there.
    """
    if options.minilmv2:
        check_checkout(options.minilmv2, "--minilmv2", "minilmv2/minilmv2.py")
    if options.distilbert:
        check_checkout(options.distilbert, "--distilbert", "distiller.py")


def chosen_cases(options: Namespace) -> list[Case]:
    """The cases of `--only`, with tiny models under `--tiny`.

    Raises:
        InputError: there is none.
    """
    there = [case for case in CASES if not options.tiny or case.pair == SMALL]
    found = [case for case in there if options.only in case.name]
    if not found:
        names = ", ".join(case.name for case in there)
        raise InputError(f"--only {options.only!r} is in no case's name; those are: {names}")
    if not options.tiny:
        return found
    options.length, options.batch = 16, 2
    return [replace(case, pair=TINY) for case in found]


def rival_of(case: Case, options: Namespace) -> Rival:
    """The public code where it is there, otherwise the naive step."""
    if case.peer == "minilmv2" and options.minilmv2:
        return Rival("public MiniLMv2", partial(MiniLMv2Step, folder=options.minilmv2))
    if case.peer == "distilbert" and options.distilbert:
        return Rival("public DistilBERT", partial(DistilBertStep, folder=options.distilbert))
    if case.peer == "textbrewer" and has_textbrewer():
        return Rival("TextBrewer", TextBrewerStep)
    return Rival("naive", NaiveStep)


def variants(
    case: Case,
    rival: Rival,
    options: Namespace,
    device: torch.device,
    more: Mapping[str, Mapping[str, bool]],
) -> dict[str, Callable[[], Step]]:
    """What builds each step of a case, by name: ours and the rival's, each in two precisions.

    Args:
        more: further steps of ours in bfloat16, by name, with what they are told.
    """
    learning = case.learning(options.dropout)

    def ours(precision: Precision, **settings: bool) -> Step:
        return BareStep(
            learning, precision, options.batch, options.length, device=device, **settings
        )

    built: dict[str, Callable[[], Step]] = {
        f"{rival.name} fp32": partial(rival.build, learning, False, device),
        f"{rival.name} autocast": partial(rival.build, learning, True, device),
        "ours fp32": partial(ours, "fp32"),
        "ours bf16": partial(ours, "bf16"),
    }
    return built | {name: partial(ours, "bf16", **settings) for name, settings in more.items()}


def agree(case: Case, rival: Rival, length: int, device: torch.device) -> float:
    """How far the rival's gradient is from ours, over the norm of ours, in float32 on two rows.

    Raises:
        PotstillError: more than `AGREEMENT`: times of the two would say nothing.
    """
    learning, batch = case.learning(0.0), random_batch(case.pair.vocab, 2, length).to(device)
    wanted = gradients(BareStep(learning, "fp32", 2, length, device=device), batch)
    given = gradients(rival.build(learning, False, device), batch)
    off = torch.stack([(given[n] - wanted[n]).norm() for n in wanted]).norm()
    size = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    difference = float(off / size)
    if not difference < AGREEMENT:
        raise PotstillError(
            f"{rival.name} learns something else under {case.name}: its gradient is "
            f"{difference:.2g} of ours away, and {AGREEMENT} is allowed; try another version of it"
        )
    return difference


def gradients(step: Step, batch: Batch) -> dict[str, Tensor]:
    """The gradient of a step's loss with respect to all of the student, 0 where none comes."""
    parameters = dict(step.student.named_parameters())
    reached = [p for p in parameters.values() if p.requires_grad]
    found = torch.autograd.grad(step.loss(batch), reached, allow_unused=True)
    known = {id(p): g for p, g in zip(reached, found, strict=True) if g is not None}
    return {n: known.get(id(p), torch.zeros_like(p)) for n, p in parameters.items()}
