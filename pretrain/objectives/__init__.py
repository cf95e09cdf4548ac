"""The one table of objectives, and the parser of `--objective`."""

import difflib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from potstill.errors import InputError
from pretrain.features import Wanted
from pretrain.models import Shape
from pretrain.objectives.attention import AttKL, AttMSE, MiniLMv2, ValKL
from pretrain.objectives.base import LayerPair, Objective, Relation, Settings, Unit
from pretrain.objectives.composite import Weight, WeightedSum, parse_expression
from pretrain.objectives.contrast import HidCLSContrast
from pretrain.objectives.hidden import Cos, Emb, HidCLS, HidSeq
from pretrain.objectives.pearson import PearsonHeads, PearsonKeys, PearsonQueries
from pretrain.objectives.prediction import KD, MLM

OBJECTIVES: dict[str, type[Objective]] = {
    "mlm": MLM,
    "kd": KD,
    "cos": Cos,
    "hid-cls": HidCLS,
    "hid-cls-contrast": HidCLSContrast,
    "hid-seq": HidSeq,
    "emb": Emb,
    "att-mse": AttMSE,
    "att-kl": AttKL,
    "val-kl": ValKL,
    "minilmv2": MiniLMv2,
    "pearson-keys": PearsonKeys,
    "pearson-queries": PearsonQueries,
    "pearson-heads": PearsonHeads,
}


@dataclass(frozen=True)
class Sum:
    """A name that stands for a sum, and what other flags default to under it."""

    terms: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


SUMS = {
    "vanilla-kd": Sum("kd+mlm"),  # ACL 2023, section 3
    # Weights, temperature and positions of the released script (DistilBERT, section 2).
    "distilbert": Sum("5*kd+2*mlm+cos", {"kd_temperature": 2.0, "kd_positions": "all"}),
    "minilm": Sum("att-kl+val-kl"),  # MiniLM, section 3
    "tinybert": Sum("att-mse+hid-seq+emb", {"layers": "uniform"}),  # TinyBERT, section 3.1
    "etd": Sum("att-mse+hid-seq"),  # Extract then Distill, equation 4
    "pearson": Sum(
        "+".join(f"{1 / 3!r}*pearson-{along}" for along in ("keys", "queries", "heads"))
    ),
}
"""The terms of a sum are logged under their own names."""

DEFAULTS = {"layers": "last", "kd_temperature": 1.0, "kd_positions": "masked"}
"""Flags whose default an objective may change."""


def defaults_of(expression: str) -> dict[str, Any]:
    """What `DEFAULTS` are under an expression.

    Raises:
        InputError: it is malformed.
    """
    named = [SUMS[name].defaults for _, name in parse_expression(expression) if name in SUMS]
    return {flag: value for part in (DEFAULTS, *named) for flag, value in part.items()}


def build_objective(expression: str, settings: Settings) -> WeightedSum:
    """The objective of `--objective EXPR`; a name that comes twice adds up its weights.

    A name is one of `OBJECTIVES` or `SUMS`, or `module.path:Class` of the user's own package.

    Raises:
        InputError: malformed expression, an unknown name (the nearest ones are given), or a class
            that cannot be loaded.
    """
    weights: dict[str, Weight] = {}
    for outer, name in parse_expression(expression):
        inside = parse_expression(SUMS[name].terms) if name in SUMS else [(Weight(1, 1), name)]
        for inner, term in inside:
            weight = outer.times(inner.start)
            weights[term] = weights[term].plus(weight) if term in weights else weight
    if not all(math.isfinite(end) for weight in weights.values() for end in weight):
        raise InputError(f"--objective {expression}: the weights of a term add up to infinity")
    return WeightedSum(
        tuple(weights), tuple(weights.values()), tuple(_class_of(n)(settings) for n in weights)
    )


def _class_of(name: str) -> type[Objective]:
    if ":" in name:
        return _load(name)
    if name not in OBJECTIVES:
        known = [*OBJECTIVES, *SUMS]
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        raise InputError(f"--objective: unknown objective {name!r}; nearest: {', '.join(nearest)}")
    return OBJECTIVES[name]


def _load(name: str) -> type[Objective]:
    """The user's class `module.path:Class`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the user's module does when it is imported
        raise InputError(
            f"--objective {name}: importing {module} failed ({type(error).__name__}: {error}); "
            "install its package, or put its folder on PYTHONPATH"
        ) from error
    if found is None:
        raise InputError(f"--objective {name}: module {module} has no {attribute}")
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise InputError(
            f"--objective {name}: it is no subclass of pretrain.objectives.base.Objective; "
            "docs/objectives.md shows how to write one"
        )
    lacking = sorted(getattr(found, "__abstractmethods__", ()))
    lacking += [part for part in ("needs", "unit") if not hasattr(found, part)]
    if lacking:
        raise InputError(f"--objective {name}: the class lacks {', '.join(lacking)}")
    if found.unit not in get_args(Unit):
        raise InputError(f"--objective {name}: unit {found.unit!r} is none of {get_args(Unit)}")
    if not isinstance(found.needs, tuple):
        raise InputError(f"--objective {name}: needs {found.needs!r} must be a tuple of names")
    if unknown := [kind for kind in found.needs if kind not in get_args(Wanted)]:
        raise InputError(f"--objective {name}: needs {unknown[0]!r}, none of {get_args(Wanted)}")
    return found


def parse_relations(expression: str) -> tuple[Relation, ...]:
    """Relations of `"q-q+k-k+2*q-k"`, their weights divided by the sum of them.

    Raises:
        InputError: malformed, sides other than q, k, v, or a weight that changes over the run.
    """
    sides: Mapping[str, Any] = {"q": "query", "k": "key", "v": "value"}
    parsed = parse_expression(expression, "--relations")
    if any(weight.start != weight.end for weight, _ in parsed):
        raise InputError(f"--relations {expression}: a weight cannot change over the run here")
    terms = [(weight.start, name.split("-")) for weight, name in parsed]
    total = sum(weight for weight, _ in terms)
    if not math.isfinite(total):
        raise InputError(f"--relations {expression}: the weights add up to infinity")
    for _, names in terms:
        if len(names) != 2 or not set(names) <= set(sides):
            raise InputError(
                f"--relations {expression}: {'-'.join(names)!r} is not two of q, k, v with a dash "
                "between them, such as q-q or q-k"
            )
    return tuple(Relation(sides[left], sides[right], w / total) for w, (left, right) in terms)


def check_models(objective: WeightedSum, student: Shape, teacher: Shape) -> None:
    """Refuse a pair of models that the objective cannot compare.

    Raises:
        InputError: head counts or vocabularies differ, or widths differ without a projection.
    """
    for name, term in zip(objective.names, objective.objectives, strict=True):
        term.check(name, student, teacher)


__all__ = [
    "OBJECTIVES",
    "SUMS",
    "LayerPair",
    "Settings",
    "build_objective",
    "check_models",
    "defaults_of",
    "parse_relations",
]
