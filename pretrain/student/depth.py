"""Layer choices: which teacher layers a student starts from, and which it learns from."""

import re
from typing import NamedTuple

from potstill.errors import InputError
from pretrain.objectives.base import LayerPair

NAMED_INITS = ("random", "first", "last", "uniform", "alternate")
_LAYER = "[0-9]{1,9}"
LIST = re.compile(f"{_LAYER}(,{_LAYER})*")
_PAIRS = re.compile(f"{_LAYER}:{_LAYER}(,{_LAYER}:{_LAYER})*")


class Flags(NamedTuple):
    """What the calling program's flags for the layer choice and the depth are called."""

    choice: str
    depth: str


TRAINER = Flags("--init", "--student_layers")


def layers_to_copy(
    init: str, student_layers: int, teacher_layers: int, flags: Flags = TRAINER
) -> list[int]:
    """The teacher layers (from 1) that initialise the student's layers, in order.

    `first` is 1..M; `last` N-M+1..N (ETD's "top"); `uniform` floor(iN/M) (ETD, section 3.2);
    `alternate` DistilBERT's released choice; a list such as `1,8,12` is taken as it stands.

    Raises:
        InputError: unknown choice, layers out of range, or a wrong number of them.
    """
    if not 0 < student_layers <= teacher_layers:
        raise InputError(
            f"{flags.depth} {student_layers}: a student that starts from teacher layers needs "
            f"1 to {teacher_layers} layers; use {flags.choice} random for another depth"
        )
    if init == "first":
        return list(range(1, student_layers + 1))
    if init == "last":
        return list(range(teacher_layers - student_layers + 1, teacher_layers + 1))
    if init == "uniform":
        return [i * teacher_layers // student_layers for i in range(1, student_layers + 1)]
    if init == "alternate":
        return _alternate(student_layers, teacher_layers, flags)
    return _explicit(init, student_layers, teacher_layers, flags)


def _alternate(student_layers: int, teacher_layers: int, flags: Flags) -> list[int]:
    """1,3,5,8,10,12 of 12 (DistilBERT's script); other depths: every second one from 1."""
    chosen = [1, 3, 5, 8, 10, 12] if teacher_layers == 12 else [*range(1, teacher_layers + 1, 2)]
    if student_layers != len(chosen):
        raise InputError(
            f"{flags.choice} alternate takes {len(chosen)} of {teacher_layers} teacher layers, but "
            f"the student has {student_layers}; give {flags.depth} {len(chosen)}, or "
            f"{flags.choice} uniform"
        )
    return chosen


def _explicit(init: str, student_layers: int, teacher_layers: int, flags: Flags) -> list[int]:
    if not LIST.fullmatch(init):
        raise InputError(
            f"{flags.choice} {init!r} is neither one of {', '.join(NAMED_INITS)} nor a list such "
            "as 1,8,12"
        )
    chosen = [int(number) for number in init.split(",")]
    if len(chosen) != student_layers:
        raise InputError(
            f"{flags.choice} {init} names {len(chosen)} teacher layers, but the student has "
            f"{student_layers} ({flags.depth})"
        )
    if not all(1 <= number <= teacher_layers for number in chosen):
        raise InputError(f"{flags.choice} {init}: the teacher's layers are 1 to {teacher_layers}")
    return chosen


def map_layers(mapping: str, student_layers: int, teacher_layers: int) -> tuple[LayerPair, ...]:
    """Which student layer learns from which teacher layer.

    `last` pairs the last layers (ACL 2023, task-agnostic); `uniform` student m with teacher
    floor(mN/M) (TinyBERT, ETD); `2:4,6:12` is taken as it stands, 0 being the embeddings.

    Raises:
        InputError: malformed, or layers out of range.
    """
    if mapping == "last":
        return (LayerPair(student_layers, teacher_layers),)
    if mapping == "uniform":
        return tuple(
            LayerPair(m, m * teacher_layers // student_layers) for m in range(1, student_layers + 1)
        )
    if not _PAIRS.fullmatch(mapping):
        raise InputError(f"--layers {mapping!r} is not last, uniform, or pairs such as 2:4,6:12")
    pairs = tuple(LayerPair(*map(int, pair.split(":"))) for pair in mapping.split(","))
    for pair in pairs:
        if pair.student > student_layers or pair.teacher > teacher_layers:
            raise InputError(
                f"--layers {mapping}: {pair.student}:{pair.teacher} is out of range; the student "
                f"has {student_layers} layers and the teacher {teacher_layers}"
            )
    return pairs
