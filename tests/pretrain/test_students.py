"""What `--students FILE.json` may say, where a group goes on, and what a frozen encoder is."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.errors import InputError, TrainingError
from potstill.files import write_json
from pretrain import run
from pretrain.attention import cpu_attention
from pretrain.config import Config, parse_config
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.plan import make_plan
from pretrain.run_folder import find_checkpoints, later_checkpoints
from pretrain.step import Distillation, freeze_encoder, freeze_unreached, untrained_parts
from pretrain.students import (
    Member,
    Stop,
    check_all_done,
    read_members,
    where_stopped,
)
from pretrain.summary import alone_flops
from tests.launch import Materials, flags, write_ds_config
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain.checkpoints import write_checkpoint
from tests.pretrain.tiny import FAMILIES, ragged_batch, tiny_encoder

COMMON = {"data": "shards", "ds_config": "cpu.json", "max_steps": 10, "output": "out", "lr": 2e-3}


def configure(folder: Path, students: Any, **given: Any) -> Config:
    """A command line with a students' file, which holds an object or this very text."""
    path = folder / "students.json"
    path.write_text(students if isinstance(students, str) else json.dumps(students))
    return parse_config(flags(**(COMMON | {"students": path} | given)))


# --- settings


def test_a_student_is_told_what_a_lone_run_with_its_flags_is_told(tmp_path: Path) -> None:
    own = {"objective": "mlm", "dropout": 0, "student_seed": 4, "init": "uniform", "warmup": 0.5}
    (member,) = read_members(configure(tmp_path, {"a": own}))
    alone = parse_config(flags(**(COMMON | own | {"output": "out/students/a"})))
    assert member.config == alone
    assert member.folder == Path("out/students/a")


def test_settings_stand_on_top_of_the_command_lines(tmp_path: Path) -> None:
    given = {"a": {}, "b": {"lr": 1, "student_layers": None}}
    a, b = read_members(configure(tmp_path, given, objective="mlm", student_layers=2))
    assert (a.config.schedule.lr, a.config.student.student_layers) == (2e-3, 2)
    assert (b.config.schedule.lr, b.config.student.student_layers) == (1.0, None)
    assert isinstance(b.config.schedule.lr, float)


def test_without_the_flag_a_run_is_a_group_of_one() -> None:
    config = parse_config(flags(**COMMON, objective="mlm"))
    (member,) = read_members(config)
    assert (member.name, member.config, member.folder) == ("", config, Path("out"))


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no JSON": ("{", ("not valid JSON",)),
    "a list": ([], ("must be", "at least one student")),
    "no student": ({}, ("at least one student",)),
    "a path for a name": ({"../a": {}}, ("'../a'", "folder's name", "letters")),
    "an empty name": ({"": {}}, ("''", "folder's name")),
    "one folder by case": ({"Small": {}, "small": {}}, ("'Small' and 'small'", "rename")),
    "one name twice": ('{"a": {}, "a": {}}', ("'a' stands there twice",)),
    "one setting twice": ('{"a": {"lr": 1, "lr": 2}}', ("'lr' stands there twice",)),
    "no settings": ({"a": 3}, ("student 'a'", "3 must be an object")),
    "unknown setting": ({"a": {"learning_rat": 1}}, ("student 'a'", "learning_rat", "nearest")),
    "a shared setting": ({"a": {"max_steps": 3}}, ("student 'a'", "max_steps", "common")),
    "the seed of all": ({"a": {"seed": 3}}, ("student 'a'", "common to all", "--seed")),
    "a string for a number": ({"a": {"lr": "1e-3"}}, ("student 'a'", 'lr "1e-3"', "a number")),
    "true for a number": ({"a": {"student_layers": True}}, ("true", "a whole number or null")),
    "a fraction of a layer": ({"a": {"student_layers": 1.5}}, ("1.5", "whole number")),
    "an unknown choice": ({"a": {"projection": "some"}}, ('"some"', '"auto" or "always"')),
    "a value out of range": ({"a": {"dropout": 2}}, ("student 'a'", "--dropout 2.0")),
    "no objective": ({"a": {"objective": None}}, ("student 'a'", "--objective is missing")),
    "a random frozen encoder": ({"a": {"freeze": "encoder"}}, ("student 'a'", "random encoder")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files_are_refused_by_file_student_and_field(case: str, tmp_path: Path) -> None:
    students, facts = REFUSED[case]
    with pytest.raises(InputError) as error:
        read_members(configure(tmp_path, students, objective="mlm"))
    message = str(error.value)
    assert "\n" not in message and f"--students {tmp_path / 'students.json'}" in message
    for fact in facts:
        assert fact in message


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(InputError, match=r"--students nowhere.json: cannot be read"):
        read_members(parse_config(flags(**COMMON, students="nowhere.json")))


def test_a_group_cannot_start_from_one_students_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume some/step-3: .* auto and never"):
        read_members(configure(tmp_path, {"a": {}}, resume="some/step-3"))


def in_this_run(materials: Materials, folder: Path, students: Any, **given: Any) -> list[str]:
    """The command line of a run that would work, but for what is given."""
    path = folder / "students.json"
    path.write_text(json.dumps(students))
    real = dict(data=materials.shards, teacher=materials.teacher, ds_config=folder / "ds.json")
    write_ds_config(folder / "ds.json", **given.pop("sections", {}))
    return flags(**(COMMON | real | {"output": folder / "out", "students": path} | given))


@pytest.mark.parametrize(
    ("students", "given", "facts"),
    [
        ({"a": {"objective": "mlm"}, "b": {"objective": "no"}}, {}, ("'b'", "unknown objective")),
        (
            {"a": {"objective": "att-mse", "student_heads": 2}},
            {},
            ("student 'a'", "--objective att-mse"),
        ),
        ({"a": {"objective": "mlm"}, "b": {"objective": "kd"}}, {"teacher": None}, ("'b'", "kd")),
        (
            {"a": {"objective": "hid-seq", "freeze": "encoder", "init": "first"}},
            {},
            ("student 'a'", "--freeze encoder", "hid-seq", "mlm or kd"),
        ),
        (
            {"a": {"objective": "mlm"}},
            {"sections": {"wandb": {"enabled": True}}},
            ("wandb", "--students", "tensorboard"),
        ),
    ],
    ids=["objective", "heads", "teacher", "frozen", "wandb"],
)
def test_the_program_refuses_a_bad_student_in_one_line(
    materials: Materials,
    one_rank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    students: Any,
    given: dict[str, Any],
    facts: tuple[str, ...],
) -> None:
    monkeypatch.setattr(run, "start_ranks", lambda: torch.device("cpu"))
    monkeypatch.setattr(
        sys, "argv", ["run.py", *in_this_run(materials, tmp_path, students, **given)]
    )
    with pytest.raises(SystemExit) as stop:
        run.main()
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
    for fact in facts:
        assert fact in line


def test_other_students_in_the_folder_are_refused(
    materials: Materials, one_rank: None, tmp_path: Path
) -> None:
    write_json(
        tmp_path / "out" / "config.json", {"identity": {"students": ["a"]}, "begun_on_ranks": 1}
    )
    arguments = in_this_run(materials, tmp_path, {"b": {"objective": "mlm"}})
    with pytest.raises(InputError, match=r"another run: students differ .*\['a'\], is \['b'\]"):
        make_plan(parse_config(arguments), torch.device("cpu"))


def test_the_plan_counts_one_teacher_forward_as_deep_as_any_student_wants(
    materials: Materials, one_rank: None, tmp_path: Path
) -> None:
    """hid-seq of layer 1 and of layer 4: the teacher runs its 4 layers once."""
    students = {n: {"objective": "hid-seq", "layers": f"1:{n[1]}"} for n in ("l1", "l4")}
    plan = make_plan(parse_config(in_this_run(materials, tmp_path, students)), torch.device("cpu"))
    layer = 8 * 32**2 + 4 * 32 * 64 + 4 * 32 * 32
    assert sum(alone_flops(plan, s) for s in plan.students) == 3 * 2 * layer + 5 * layer
    assert plan.flops_per_token == 3 * 2 * layer + 4 * layer


# --- where a group goes on


def members_with(folder: Path, saved: dict[str, list[int]]) -> list[Member]:
    """Students that have checkpoints of these steps."""
    config = configure(folder, {name: {"objective": "mlm"} for name in saved}, output=folder / "o")
    members = read_members(config)
    for member in members:
        for step in saved[member.name]:
            write_checkpoint(member.folder / "checkpoints", step)
    return list(members)


@pytest.mark.parametrize(
    ("saved", "common"),
    [
        ({"a": [8, 16], "b": [8, 16]}, "step-00000016"),
        ({"a": [8, 16], "b": [8]}, "step-00000008"),
        ({"a": [16], "b": [8]}, None),
        ({"a": [8], "b": []}, None),
    ],
)
def test_a_group_goes_on_from_the_newest_common_step(
    tmp_path: Path, saved: dict[str, list[int]], common: str | None
) -> None:
    members = members_with(tmp_path, saved)
    found = find_checkpoints(members, "auto")
    assert [path and path.name for path in found] == [common, common]
    assert [path and path.parts[-3] for path in found] == [common and m.name for m in members]


def test_checkpoints_behind_the_common_step_are_made_again(tmp_path: Path) -> None:
    members = members_with(tmp_path, {"a": [8, 16], "b": [8]})
    starts = find_checkpoints(members, "auto")
    later = [later_checkpoints(m, s) for m, s in zip(members, starts, strict=True)]
    assert [[path.name for path in paths] for paths in later] == [["step-00000016"], []]


def test_a_stopped_student_is_known_by_its_metrics(tmp_path: Path) -> None:
    a, b = members_with(tmp_path, {"a": [8], "b": [8]})
    lines = ['{"kind": "event", "step": 9, "event": "stopped", "loss": NaN}', '{"kind": "ev']
    (a.folder / "metrics.jsonl").write_text("\n".join(lines))
    stop = where_stopped(a)
    assert stop is not None and stop.step == 9 and math.isnan(stop.loss)
    assert where_stopped(b) is None


def test_stopped_students_are_named_at_the_end() -> None:
    check_all_done({})
    with pytest.raises(TrainingError, match=r"stopped b \(step 3, loss nan: .*others? .*done"):
        check_all_done({"b": Stop(3, math.nan)})
    with pytest.raises(TrainingError, match="stopped at step 3, loss inf: .*stays"):
        check_all_done({"": Stop(3, math.inf)})


# --- a frozen encoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_encoder_gets_no_gradient_and_counts_as_trained(family: str) -> None:
    student = tiny_encoder(family, 1)
    objective = build_objective("mlm", Settings((LayerPair(1, 1),)))
    module = Distillation(student, student.shape, objective, cpu_attention)
    batch = ragged_batch((7, 3), pad=student.model.config.pad_token_id)  # type: ignore
    kept = freeze_encoder(module)
    frozen = freeze_unreached(module, {}, batch)
    assert kept == frozen.keys()
    assert untrained_parts({n: v for n, v in frozen.items() if n not in kept}, student.model) == []
    module(batch, {}).sum().backward()
    reached = {n for n, p in module.student.named_parameters() if p.grad is not None}
    assert reached == {n for n, p in module.student.named_parameters() if n not in kept}
    base = {id(p) for p in student.model.base_model.parameters()}  # type: ignore
    assert {n for n, p in module.student.named_parameters() if id(p) in base} == kept
