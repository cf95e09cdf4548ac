"""Malformed input for `pretrain/run.py`: flags, JSON files, models, shards, output folders."""

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
    change_json,
    damage_text,
    damaged_shards,
    files_of,
    odd_path,
    odd_text,
)
from tests.launch import Materials, flags, make_materials, write_ds_config

Given = dict[str, Any]
WHOLE = (
    *("max_steps", "student_layers", "student_hidden", "student_ffn", "student_heads", "seed"),
    *("relation_heads", "contrast_negatives", "contrast_width", "validate_every", "save_every"),
    *("keep_checkpoints", "log_every", "loader_workers", "validation_rows", "student_seed"),
)
FRACTIONS = (
    *("mlm_probability", "dropout", "kd_temperature", "contrast_temperature", "max_hours"),
    *("warmup", "lr", "adam_beta1", "adam_beta2", "adam_eps", "weight_decay"),
)
CHOICES = (
    *("projection", "kd_positions", "loss_form", "freeze", "schedule", "compile", "fused"),
    *("teacher_precision", "attention", "mask_whole_words", "dry_run", "check_shards"),
)
GRAMMARS = {  # texts with a grammar of their own, and the pieces that it is made of
    "objective": "att-mse kd mlm hid-seq val-kl + + * : - . 0.5 1e9 1e308 0 tinybert etd x os:path",
    "relations": "q-q k-k v-v q-k + * 2 : - q 1e308 0 . x",
    "layers": "1 2 4 : , last uniform 0 99999999999 - ١",
    "init": "1 2 4 , first last random uniform alternate 0 - ٢ 99999999999",
    "finetune_markers": "0.1 0.5 , 1 nan - 0.101 . e",
}
CONFLICTS: list[Given] = [
    {"init": "last", "student": "x"},
    {"student": "x", "student_layers": 2},
    {"freeze": "encoder"},
    {"schedule": "time"},
    {"max_steps": None},
    {"max_steps": None, "max_hours": 1},
    {"objective": "mlm", "mlm_probability": 0},
    {"objective": "att-mse", "teacher": None},
    {"student_heads": 2},
    {"student_hidden": 30},
    {"student_hidden": 2**40},
    {"student_ffn": 2**50},
    {"student_layers": 10**7},
    {"init": "first", "student_hidden": 16},
    {"init": "1,2,3", "student_layers": 2},
    {"layers": "9:9"},
    {"teacher_stream": True},
    {"fused": "apex"},
    {"teacher_precision": "fp8"},
    {"objective": "minilmv2", "relation_heads": 7},
    {"objective": "none.such:Thing"},
    {"objective": "json:loads"},
    {"finetune_markers": "0.101,0.102"},
    {"revision": "x", "teacher": "no-such/model"},
    {"resume": "never-made/checkpoint"},
    {"lr": 0},
]
DS_SECTIONS: list[Given] = [
    {"zero_optimisation": {"stage": 1}},
    {"zero_optimization": {"stage": 4}},
    {"zero_optimization": {"stage": "1"}},
    {"zero_optimization": {"stage": 1, "stge": 2}},
    {"zero_optimization": True},
    {"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}},
    {"train_batch_size": 7},
    {"train_batch_size": "auto"},
    {"train_batch_size": 10**15},
    {"train_micro_batch_size_per_gpu": 10**12},
    {"gradient_accumulation_steps": 0},
    {"gradient_accumulation_steps": 2.0},
    {"gradient_clipping": "auto"},
    {"gradient_clipping": -1},
    {"gradient_clipping": "1.0"},
    {"gradient_clipping": True},
    {"bf16": {"enabled": "true"}},
    {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
    {"bf16": True},
    {"fp16": {"enabled": True, "initial_scale_power": "x"}},
    {"fp16": {"enabled": 1}},
    {"scheduler": {"type": "WarmupLR"}},
    {"amp": {"enabled": True}},
    {"elasticity": {}},
    {"sparse_gradients": True},
    {"optimizer": {"type": "Adamm"}},
    {"optimizer": {"type": 3}},
    {"optimizer": {}},
    {"optimizer": {"type": "AdamW", "params": [1]}},
    {"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}},
    {"optimizer": {"type": "AdamW", "params": {"lr": -1}}},
    {"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}},
    {"communication_data_type": "fp8"},
    {"communication_data_type": 32},
    {"steps_per_print": "often"},
    {"checkpoint": {"tag_validation": 3}},
    {"checkpoint": {"tag_validation": "maybe"}},
    {"data_types": {"keep_in_fp32_modules": 5}},
    {"tensor_parallel": {"autotp_size": 2}},
    {"sequence_parallel_size": 0},
    {"pipeline": 3},
    {"hybrid_engine": {"enabled": True}},
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
    """A run that would work, but for the changed flags."""
    given = defaults(materials, folder) | changes
    argv = [*flags(**{name: value for name, value in given.items()}), *more]
    return Case(argv, files_of(folder, materials.shards, materials.teacher), **told)


def defaults(materials: Materials, folder: Path) -> Given:
    """A run that would work."""
    return {
        "ds_config": write_ds_config(folder / "sound.json"),
        "data": materials.shards,
        "teacher": materials.teacher,
        "objective": "att-mse",
        "max_steps": 2,
        "output": folder / "run",
    }


def _number(chance: random.Random, materials: Materials, folder: Path) -> Given:
    odd = [*ODD_NUMBERS, "-3", "-1e-9"]
    if chance.random() < 0.5:
        return {chance.choice(WHOLE): chance.choice([*odd, "1.5", str(2**63), "-" + "9" * 30])}
    return {chance.choice(FRACTIONS): chance.choice(odd)}


def _choice(chance: random.Random, materials: Materials, folder: Path) -> Given:
    return {chance.choice(CHOICES): chance.choice(["maybe", "", "AUTO", "0.5", "None", "🍺"])}


def _grammar(chance: random.Random, materials: Materials, folder: Path) -> Case:
    name = chance.choice(list(GRAMMARS))
    text = odd_text(chance, GRAMMARS[name])
    return (
        case(materials, folder, {}, (f"--{name}={text}",), may_pass=True)
        if (name != "objective")
        else case(materials, folder, {"objective": None}, (f"--{name}={text}",), may_pass=True)
    )


def _usage(chance: random.Random, materials: Materials, folder: Path) -> Case | Given:
    kind = chance.randrange(7)
    if kind == 0:
        return {chance.choice(("data", "objective", "output", "ds_config", "max_steps")): None}
    if kind == 1:
        return case(materials, folder, {}, (f"--{odd_text(chance, 'lr data x - _ 0 sz')}x", "1"))
    if kind == 2:
        return case(materials, folder, {}, ("--lr", "0.1", "--lr", "0"))  # the last one counts
    if kind == 3:
        return case(materials, folder, {}, (chance.choice(("--teach", "--dat", "--objectiv")), "x"))
    if kind == 4:
        return case(materials, folder, {}, (chance.choice(("--seed", "--lr", "--preset")),))
    if kind == 5:
        return case(materials, folder, {}, ("stray", "words"))
    name = chance.choice(("data", "teacher", "student", "ds_config", "preset", "students"))
    return {name: chance.choice(("/" + "n" * 300, "a/" * 3000, "\udcff\udcfe", "~nobody/x/y", "."))}


def _conflict(chance: random.Random, materials: Materials, folder: Path) -> Given:
    return chance.choice(CONFLICTS)


def _preset(chance: random.Random, materials: Materials, folder: Path) -> Case:
    path = folder / "recipe.json"
    sound = {"about": "x", "settings": {"lr": 1e-3, "init": "last", "student_layers": 2}}
    path.write_text(json.dumps(sound))
    if chance.random() < 0.35:
        damage_text(chance, path)
        return case(materials, folder, {"preset": path})
    if chance.random() < 0.4:
        wrong = chance.choice(
            [
                {"settings": {"lr": chance.choice(["1", None, [], {}, True])}},
                {"settings": {"student_layers": chance.choice(["2", 1.5, [], 2**62, -1])}},
                {"settings": {"learning_rate": 1}},
                {"settings": {"preset": "x"}},
                {"settings": chance.choice([None, 3, [], "lr"])},
                {"extends": chance.choice(["../config", "recipe", 3, [], {}, "", True])},
                {"extend": "x"},
            ]
        )
        path.write_text(json.dumps(sound | wrong))
        return case(materials, folder, {"preset": path})
    change_json(chance, path)
    return case(materials, folder, {"preset": path}, may_pass=True)


def _ds_config(chance: random.Random, materials: Materials, folder: Path) -> Case:
    path = write_ds_config(
        folder / "ds.json",
        zero_optimization={"stage": 1, "overlap_comm": False},
        gradient_clipping=1.0,
        bf16={"enabled": False},
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        tensorboard={"enabled": False},
    )
    if chance.random() < 0.3:
        damage_text(chance, path)
        return case(materials, folder, {"ds_config": path})
    if chance.random() < 0.5:
        write_ds_config(path, **chance.choice(DS_SECTIONS))
        return case(materials, folder, {"ds_config": path})
    change_json(chance, path)
    return case(materials, folder, {"ds_config": path}, may_pass=True)


def _students(chance: random.Random, materials: Materials, folder: Path) -> Case:
    path = folder / "students.json"
    sound: dict[str, Any] = {"a": {"lr": 1e-3, "init": "last"}, "b": {"student_layers": 2}}
    path.write_text(json.dumps(sound))
    if chance.random() < 0.35:
        damage_text(chance, path)
        return case(materials, folder, {"students": path})
    if chance.random() < 0.4:
        name = chance.choice(["../x", "", "a b", "/tmp", ".", "x" * 300, "A", "é", "a\n"])
        setting = chance.choice(["max_steps", "seed", "lrr", "output", "", "teacher"])
        wrong = chance.choice(
            [{name: {}}, {"c": {setting: 1}}, {"c": chance.choice([None, 3, [], "x"])}]
        )
        path.write_text(json.dumps(sound | wrong))
        return case(materials, folder, {"students": path})
    change_json(chance, path)
    return case(materials, folder, {"students": path}, may_pass=True)


def _model(chance: random.Random, materials: Materials, folder: Path) -> Case:
    source = chance.choice((materials.teacher, materials.teacher, materials.headless))
    which = "student" if chance.random() < 0.3 else "teacher"
    model, may_pass = damaged_model(chance, source, folder, which == "teacher")
    return case(materials, folder, {which: model}, may_pass=may_pass)


def _data(chance: random.Random, materials: Materials, folder: Path) -> Given:
    return {"data": damaged_shards(chance, materials.shards, folder)}


def _output(chance: random.Random, materials: Materials, folder: Path) -> Case:
    run, record = folder / "used", folder / "used" / "config.json"
    if chance.random() < 0.3:
        place = odd_path(chance, folder, lambda path: path.write_text("x"))
        return case(materials, folder, {"output": place}, may_pass=place.name == "nowhere")
    run.mkdir()
    identity = chance.choice(ODD_VALUES) if chance.random() < 0.7 else {"seed": 1, "lr": []}
    record.write_text(json.dumps({"begun_on_ranks": 1, "identity": identity}))
    if chance.random() < 0.4:
        damage_text(chance, record)
    elif chance.random() < 0.1:
        record.unlink()
        record.mkdir()
    return case(materials, folder, {"output": run})


def _resume(chance: random.Random, materials: Materials, folder: Path) -> Case:
    place = folder / "checkpoint"
    kind = chance.randrange(5)
    if kind == 0:
        place.write_text("x")
    elif kind > 1:
        place.mkdir()
        (place / "checkpoint.json").write_text(
            json.dumps({"version": 1, "step": 3, "files": {"../../x": {"size": 3, "sha256": "0"}}})
        )
        if kind == 3:
            damage_text(chance, place / "checkpoint.json")
        elif kind == 4:
            change_json(chance, place / "checkpoint.json")
    return case(materials, folder, {"resume": place})


KINDS: tuple[Callable[[random.Random, Materials, Path], Case | Given], ...] = (
    *(_number, _number, _choice, _grammar, _usage, _conflict, _preset, _preset, _ds_config),
    *(_ds_config, _ds_config, _students, _students, _model, _model, _model, _data, _output),
    _resume,
)
