"""The one table of objectives, and the parser of `--objective`."""

import difflib

from potstill.errors import InputError
from pretrain.models import Shape
from pretrain.objectives.attention import AttKL, AttMSE, ValKL
from pretrain.objectives.base import LayerPair, Objective, Settings
from pretrain.objectives.composite import WeightedSum, parse_expression
from pretrain.objectives.hidden import HidCLS, HidSeq
from pretrain.objectives.prediction import KD, MLM

OBJECTIVES: dict[str, type[Objective]] = {
    "mlm": MLM,
    "kd": KD,
    "hid-cls": HidCLS,
    "hid-seq": HidSeq,
    "att-mse": AttMSE,
    "att-kl": AttKL,
    "val-kl": ValKL,
}

SUMS = {"vanilla-kd": "kd+mlm"}  # ACL 2023, section 3
"""Names that stand for a sum; the terms are logged under their own names."""


def build_objective(expression: str, settings: Settings) -> WeightedSum:
    """The objective of `--objective EXPR`; a name that comes twice adds up its weights.

    Raises:
        InputError: malformed expression, or an unknown name (the nearest ones are given).
    """
    weights: dict[str, float] = {}
    for outer, name in parse_expression(expression):
        _check_name(name)
        for inner, term in parse_expression(SUMS.get(name, name)):
            weights[term] = weights.get(term, 0.0) + outer * inner
    return WeightedSum(
        tuple(weights), tuple(weights.values()), tuple(OBJECTIVES[n](settings) for n in weights)
    )


def _check_name(name: str) -> None:
    known = [*OBJECTIVES, *SUMS]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise InputError(f"--objective: unknown objective {name!r}; nearest: {', '.join(nearest)}")


def check_models(objective: WeightedSum, student: Shape, teacher: Shape) -> None:
    """Refuse a pair of models that the objective cannot compare.

    Raises:
        InputError: head counts or vocabularies differ, or widths differ without a projection.
    """
    for name, term in zip(objective.names, objective.objectives, strict=True):
        layers = [layer for pair in term.settings.pairs for layer in pair]
        if 0 in layers and {"query", "key", "value"} & set(term.needs):
            raise InputError(
                f"--objective {name} compares attention, which layer 0 (the embeddings) has not; "
                "take --layers from 1 on"
            )
        if term.same_heads and student.heads != teacher.heads:
            raise InputError(
                f"--objective {name} compares attention heads one by one, but the student has "
                f"{student.heads} and the teacher {teacher.heads}; give --student_heads "
                f"{teacher.heads}, or wait for minilmv2, which regroups heads and is not here yet"
            )
        if term.uses_teacher and "logits" in term.needs and student.vocab != teacher.vocab:
            raise InputError(
                f"--objective {name} compares logits, but the vocabularies differ: student "
                f"{student.vocab}, teacher {teacher.vocab}"
            )
        if (
            "hidden" in term.needs
            and term.settings.projection == "none"
            and student.hidden != teacher.hidden
        ):
            raise InputError(
                f"--objective {name}: widths differ (student {student.hidden}, teacher "
                f"{teacher.hidden}), so it needs a projection: drop --projection none"
            )


__all__ = ["OBJECTIVES", "SUMS", "LayerPair", "Settings", "build_objective", "check_models"]
