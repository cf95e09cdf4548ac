"""Malformed input for `pretrain/extract.py`: flags, models, shards, output folders."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.common import Case
from tests.chaos.mutated_models import damaged_model
from tests.chaos.mutations import (
    ODD_NUMBERS,
    ODD_VALUES,
    damage_text,
    damaged_shards,
    files_of,
    odd_path,
    odd_text,
)
from tests.launch import Materials, flags, make_materials

Given = dict[str, Any]
WHOLE = (
    *("layers", "hidden", "head_size", "ffn", "rows", "micro_batch", "validation_rows", "seed"),
)
CONFLICTS: list[Given] = [
    {"hidden": 18},
    {"hidden": 64},
    {"layers": 5},
    {"ffn": 65},
    {"head_size": 8},
    {"method": "etd-imp"},
    {"ablation": "rev-fnn"},
    {"method": "etd-rand", "ablation": "rev-all"},
    {"method": "etd-impt", "data": None},
    {"depth": "random"},
    {"depth": "1,9"},
    {"depth": "1,2,3"},
    {"mlm_probability": 0},
    {"mlm_probability": "nan"},
    {"mlm_probability": "inf"},
    {"layers": 2**62},
    {"hidden": 2**62},
    {"ffn": 10**30},
]


def build(chance: random.Random, folder: Path) -> Case:
    """A case in `folder`, which is made; a function of the random numbers alone.

    Shards and a teacher are made beside it, once in a process.
    """
    materials = make_materials(folder.parent)
    folder.mkdir(parents=True)
    made = chance.choice(KINDS)(chance, materials, folder)
    return made if isinstance(made, Case) else case(materials, folder, made)


def case(
    materials: Materials, folder: Path, changes: Given, more: tuple[str, ...] = (), **told: Any
) -> Case:
    """An extraction that would work, but for the changed flags."""
    given = {
        "teacher": materials.teacher,
        "data": materials.shards,
        "layers": 2,
        "hidden": 16,
        "rows": 8,
        "validation_rows": 4,
        "method": "etd-impt",
        "output": folder / "student",
    } | changes
    argv = [*flags(**given), *more]
    return Case(argv, files_of(folder, materials.shards, materials.teacher), **told)


def _flag(chance: random.Random, materials: Materials, folder: Path) -> Case | Given:
    kind = chance.randrange(6)
    if kind == 0:
        return {chance.choice(WHOLE): chance.choice([*ODD_NUMBERS, "-3", "1.5", "9" * 30])}
    if kind == 1:
        return chance.choice(CONFLICTS)
    if kind == 2:
        return {chance.choice(("teacher", "layers", "hidden", "method", "output")): None}
    if kind == 3:
        text = odd_text(chance, "1 2 4 , first last 0 - 99999999999 uniform ٢")
        return case(materials, folder, {}, (f"--depth={text}",), may_pass=True)
    if kind == 4:
        name = chance.choice(("data", "teacher", "output"))
        return {name: chance.choice(("/" + "n" * 300, "a/" * 3000, "\udcff"))}
    more = chance.choice((("--width", "3"), ("--seed", "1", "--seed", "-2"), ("--layers",), ("x",)))
    return case(materials, folder, {}, more)


def _model(chance: random.Random, materials: Materials, folder: Path) -> Case:
    model, may_pass = damaged_model(chance, materials.teacher, folder)
    return case(materials, folder, {"teacher": model}, may_pass=may_pass)


def _data(chance: random.Random, materials: Materials, folder: Path) -> Given:
    return {"data": damaged_shards(chance, materials.shards, folder)}


def _output(chance: random.Random, materials: Materials, folder: Path) -> Case:
    used, record = folder / "used", folder / "used" / "extraction.json"
    if chance.random() < 0.3:
        place = odd_path(chance, folder, lambda path: path.write_text("x"))
        return case(materials, folder, {"output": place}, may_pass=place.name == "nowhere")
    used.mkdir()
    record.write_text(json.dumps({"identity": chance.choice(ODD_VALUES)}))
    if chance.random() < 0.4:
        damage_text(chance, record)
    return case(materials, folder, {"output": used})


KINDS: tuple[Callable[[random.Random, Materials, Path], Case | Given], ...] = (
    *(_flag, _flag, _model, _model, _data, _output),
)
