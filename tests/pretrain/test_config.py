"""Flags and presets: what wins, what is refused, what makes two runs the same one."""

import json
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import InputError
from pretrain.config import Config, parse_config
from pretrain.objectives import build_objective
from pretrain.presets import PRESETS
from tests.launch import flags

NEEDED = {"data": "shards", "objective": "att-mse", "output": "run", "ds_config": "cpu.json"}


def parse(**given: Any) -> Config:
    return parse_config(flags(**(NEEDED | {"max_steps": 10} | given)))


def preset(folder: Path, **settings: Any) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps({"about": "a test", "settings": settings}))
    return path


def test_flags_win_over_the_preset_and_the_preset_over_defaults(tmp_path: Path) -> None:
    config = parse(preset=preset(tmp_path, lr=1e-4, warmup=0.1, adam_beta2=0.99), warmup=0.2)
    assert (config.schedule.lr, config.schedule.warmup) == (1e-4, 0.2)
    assert (config.schedule.adam_beta1, config.schedule.adam_beta2) == (0.9, 0.99)


def test_a_preset_may_hold_what_is_needed(tmp_path: Path) -> None:
    config = parse(preset=preset(tmp_path, objective="kd+mlm", max_steps=7), objective=None)
    assert config.objective.objective == "kd+mlm"
    assert config.schedule.max_steps == 10, "the flag, which parse() gives, wins"


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_every_ready_preset_parses_by_name(path: Path) -> None:
    preset = json.loads(path.read_text())
    settings = preset["settings"]
    base = (
        json.loads((PRESETS / f"{preset['extends']}.json").read_text())
        if "extends" in preset
        else {}
    )
    steps = None if "max_steps" in settings or base else 7  # some papers give no number of steps
    given = flags(preset=path.stem, data="s", output="r", ds_config="c.json", max_steps=steps)
    config = parse_config(given)
    identity, expected = config.identity(), base.get("settings", {}) | settings
    assert {name: identity[name] for name in expected} == expected
    build_objective(str(config.objective.objective), config.objective.settings(()))


def test_a_preset_stands_on_the_one_that_it_extends(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"extends": "htd-att-mse-6x768", "settings": {"lr": 1e-4}}))
    config = parse_config(flags(preset=path, data="s", output="r", ds_config="c.json"))
    assert (config.schedule.lr, config.schedule.max_steps) == (1e-4, 100_000)
    path.write_text(json.dumps({"extends": "../config", "settings": {}}))
    with pytest.raises(InputError, match="own.json: extends '../config', which is no preset"):
        parse(preset=path)


def test_rows_of_the_acl_tables_differ_in_objective_and_start_only() -> None:
    """Table 2 has eight objectives of the paper's own, Table 4 four of them with `first`."""
    rows = {p.stem: json.loads(p.read_text()) for p in PRESETS.glob("htd-*.json")}
    extending = [row for row in rows.values() if "extends" in row]
    assert len(rows) == 12 and len(extending) == 11
    assert all(row["extends"] == "htd-att-mse-6x768" for row in extending)
    assert sum(row["settings"].get("init") == "first" for row in extending) == 4
    assert {name for row in extending for name in row["settings"]} <= {"objective", "init"}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"objective": "att-mse"}, ("last", 1.0, "masked")),
        ({"objective": "distilbert"}, ("last", 2.0, "all")),
        ({"objective": "tinybert+0.1*kd"}, ("uniform", 1.0, "masked")),
        ({"objective": "distilbert", "kd_positions": "masked"}, ("last", 2.0, "masked")),
        ({"objective": "tinybert", "layers": "1:2"}, ("1:2", 1.0, "masked")),
    ],
)
def test_an_objective_may_change_a_default_but_never_a_flag(
    given: dict[str, Any], found: tuple[str, float, str]
) -> None:
    chosen = parse(**given).objective.defaulted
    assert (chosen["layers"], chosen["kd_temperature"], chosen["kd_positions"]) == found


def test_the_acl_preset_is_the_papers_recipe() -> None:
    """Method.md, section 4: 100k steps, peak 5e-4, 6 %, betas 0.9/0.99, eps 1e-6, decay 0.01."""
    given = flags(preset="htd-att-mse-6x768", data="s", output="r", ds_config="c.json")
    config = parse_config(given)
    schedule = config.schedule
    assert (schedule.max_steps, schedule.lr, schedule.warmup) == (100_000, 5e-4, 0.06)
    assert (schedule.adam_beta1, schedule.adam_beta2) == (0.9, 0.99)
    assert (schedule.adam_eps, schedule.weight_decay) == (1e-6, 0.01)
    assert (config.student.student_layers, config.student.student_hidden) == (6, 768)


@pytest.mark.parametrize(
    ("settings", "fact"),
    [({"learning_rate": 1}, "learning_rate"), ({"local_rank": 0}, "local_rank")],
)
def test_unknown_preset_keys_are_refused(
    tmp_path: Path, settings: dict[str, Any], fact: str
) -> None:
    with pytest.raises(InputError, match=fact):
        parse(preset=preset(tmp_path, **settings))


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"settings": 3}', '{"settings": {}, "extend": "x"}']
)
def test_a_malformed_preset_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(InputError, match=r"recipe\.json"):
        parse(preset=tmp_path / "recipe.json")


def test_an_unknown_preset_names_the_ready_ones() -> None:
    with pytest.raises(InputError, match="htd-att-mse-6x768"):
        parse(preset="tinybret")


@pytest.mark.parametrize("flag", ["--objectiv", "--learning_rate"])
def test_an_unknown_or_shortened_flag_is_refused(flag: str) -> None:
    with pytest.raises(InputError, match=f"unknown flags: {flag}"):
        parse_config([*flags(**NEEDED, max_steps=1), flag, "mlm"])


def test_a_value_of_the_wrong_type_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(max_steps="many")
    assert stop.value.code == 2
    assert "--max_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ({"data": None}, "--data is missing"),
        ({"objective": None}, "--objective is missing"),
        ({"output": None}, "--output is missing"),
        ({"ds_config": None}, "--ds_config is missing"),
        ({"max_steps": None}, "no end"),
        ({"max_steps": -1}, "--max_steps -1"),
        ({"max_hours": -1.0}, "--max_hours -1"),
        ({"schedule": "time"}, "--max_hours"),
        ({"max_steps": None, "max_hours": 1}, "--schedule time"),
        ({"warmup": 1.0}, "--warmup"),
        ({"lr": 0}, "--lr"),
        ({"mlm_probability": 1.5}, "--mlm_probability 1.5"),
        ({"dropout": 1.0}, "--dropout"),
        ({"kd_temperature": 0}, "--kd_temperature"),
        ({"student_heads": 0}, "--student_heads"),
        ({"student": "s", "student_layers": 2}, "--student_layers"),
        ({"student": "s", "init": "last"}, "--init"),
        ({"finetune_markers": "0.1,1.5"}, "--finetune_markers"),
        ({"finetune_markers": "half"}, "--finetune_markers"),
        ({"log_every": 0}, "--log_every"),
        ({"validate_every": -5}, "--validate_every -5"),
        ({"loader_workers": -1}, "--loader_workers"),
    ],
    ids=str,
)
def test_values_that_no_run_can_have_are_refused(given: dict[str, Any], facts: str) -> None:
    with pytest.raises(InputError) as error:
        parse(**given)
    assert facts in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{"seed": 1}, {"lr": 1e-3}, {"objective": "mlm"}, {"dropout": 0}])
def test_what_changes_the_result_changes_the_identity(given: dict[str, Any]) -> None:
    assert parse(**given).identity() != parse().identity()


@pytest.mark.parametrize(
    "given", [{"log_every": 3}, {"save_every": 3}, {"loader_workers": 2}, {"resume": "never"}]
)
def test_what_leaves_the_result_alone_leaves_the_identity(given: dict[str, Any]) -> None:
    assert parse(**given).identity() == parse().identity()


def test_markers_are_sorted_shares() -> None:
    assert parse(finetune_markers="0.5,0.1").run.markers() == [0.1, 0.5]
    assert parse().run.markers() == []


def test_the_launchers_rank_is_accepted() -> None:
    """The launcher writes `--local_rank=1`."""
    assert parse_config([*flags(**NEEDED, max_steps=1), "--local_rank=1"]).run.local_rank == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"cut_form": "masked"}, "--cut_form masked is for cut --knowledge"),
        ({"knowledge": "k", "teacher_precision": "fp8"}, "--teacher_precision is for a teacher"),
        ({"knowledge": "k", "teacher_stream": True}, "--teacher_stream is for a teacher"),
    ],
)
def test_flags_of_a_teacher_and_of_knowledge_exclude_each_other(
    given: dict[str, Any], told: str
) -> None:
    with pytest.raises(InputError, match=told):
        parse(**given)


def test_a_run_that_began_before_there_was_knowledge_is_still_the_same() -> None:
    """Its record has none of these settings, and what is absent there counts as None."""
    identity = parse().identity()
    assert {identity.get(name) for name in ("knowledge", "copies", "cut_form")} == {None}
    forms = [parse(knowledge="k", cut_form=form).identity() for form in ("kept", "masked")]
    assert forms[0] != forms[1]
