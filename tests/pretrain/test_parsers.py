"""Whatever text or JSON a user gives: a config, or an `InputError` of one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.errors import InputError
from pretrain.config import PARTS, parse_config
from pretrain.ds_config import batch_sizes, check_with_deepspeed, read_ds_config
from pretrain.model_folder import INDEX, WEIGHTS
from pretrain.models import load_config, load_encoder
from pretrain.objectives import Settings, build_objective, defaults_of, parse_relations
from pretrain.options import read_object
from pretrain.student.depth import layers_to_copy, map_layers
from pretrain.students import read_members
from tests.launch import flags
from tests.pretrain.tiny import tiny_config

NEEDED = {"data": "d", "objective": "mlm", "output": "o", "ds_config": "c.json", "max_steps": 3}
FIELDS = sorted({name for part in PARTS for name in part.__dataclass_fields__} - {"preset"})
SEVERAL = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def refused_or(call: Callable[[], Any]) -> Any:
    """What a call gives; None where it refuses in one line."""
    try:
        return call()
    except InputError as error:
        assert len(str(error).split("\n")) == 1
        return None


def pieces(alphabet: str) -> st.SearchStrategy[str]:
    """Texts made of the pieces that stand between an alphabet's blanks, or any text."""
    return st.lists(st.sampled_from(alphabet.split()), max_size=12).map("".join) | st.text()


@SEVERAL
@given(pieces("kd mlm att-mse tinybert x y:Z 0 1 .5 1e308 1e999 * : + - \t"))
def test_any_objective_is_a_finite_sum_or_refused(expression: str) -> None:
    built = refused_or(lambda: build_objective(expression, Settings(())))
    assert built is None or all(0 <= w < math.inf for w in built.weights_at(0.5))
    refused_or(lambda: defaults_of(expression))


@SEVERAL
@given(pieces("q-q k-k v-q q + * 2 0 1e308 :"))
def test_any_relations_have_weights_of_sum_one_or_are_refused(expression: str) -> None:
    relations = refused_or(lambda: parse_relations(expression))
    assert relations is None or math.isclose(sum(r.weight for r in relations), 1)


@SEVERAL
@given(pieces("last uniform 0 1 2 9 12 : , - ١ ²"), st.integers(1, 9), st.integers(1, 24))
def test_any_layer_map_stays_within_the_models_or_is_refused(
    text: str, student: int, teacher: int
) -> None:
    pairs = refused_or(lambda: map_layers(text, student, teacher))
    assert pairs is None or all(p.student <= student and p.teacher <= teacher for p in pairs)
    chosen = refused_or(lambda: layers_to_copy(text, student, teacher))
    assert chosen is None or all(1 <= layer <= teacher for layer in chosen)


@SEVERAL
@given(st.sampled_from(FIELDS), JSON)
def test_any_preset_value_gives_a_config_or_is_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"settings": {name: value}}))
    given_flags = flags(**{n: v for n, v in NEEDED.items() if n != name}, preset=path)
    refused_or(lambda: parse_config(given_flags))


@SEVERAL
@given(st.sampled_from(["a", "B.1", "", "../x", "a\n"]), st.sampled_from(FIELDS), JSON)
def test_any_students_file_gives_students_or_is_refused(
    tmp_path: Path, student: str, name: str, value: Any
) -> None:
    path = tmp_path / "students.json"
    path.write_text(json.dumps({student: {name: value}}))
    config = parse_config(flags(**NEEDED, students=path))
    refused_or(lambda: read_members(config))


@SEVERAL
@given(
    st.sampled_from(
        "zero_optimization bf16 fp16 optimizer train_batch_size gradient_clipping wandb aio "
        "communication_data_type checkpoint data_types flops_profiler nonsense".split()
    ),
    JSON | st.fixed_dictionaries({"enabled": LEAVES, "stage": LEAVES, "type": LEAVES}),
)
def test_any_ds_config_is_one_for_deepspeed_or_refused(
    tmp_path: Path, name: str, value: Any
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, name: value}))
    config = refused_or(lambda: read_ds_config(path))
    if config is not None and refused_or(lambda: batch_sizes(config, 1, path)):
        refused_or(lambda: check_with_deepspeed(config, path))


@SEVERAL
@given(st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_an_object_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "any.json").write_bytes(content)
    found = refused_or(lambda: read_object(tmp_path / "any.json", "--any"))
    assert found is None or isinstance(found, dict)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        ('{"a": NaN}', "NaN is not finite"),
        ('{"a": 1e999}', "1e999 is not finite"),
        ('{"a": ' + "9" * 5000 + "}", "more than 64 bits"),
        ('{"a": "\\ud800"}', "surrogates"),
        ("[" * 100_000, "recursion"),
        ('{"a":' * 50 + "1" + "}" * 50, "nested deeper than 32"),
        ("[]", "must be a JSON object"),
    ],
    ids=lambda text: text[:14],
)
def test_json_that_only_python_reads_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(InputError, match=reason):
        read_object(tmp_path / "odd.json", "--odd")


@pytest.mark.parametrize("value", ["nan", "inf", "1e999"])
@pytest.mark.parametrize("name", ["lr", "max_hours", "kd_temperature", "weight_decay", "dropout"])
def test_no_flag_takes_a_number_that_is_not_finite(name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"--{name} (nan|inf)"):
        parse_config(flags(**NEEDED | {name: value}))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--validation_rows", "9" * 30], "--validation_rows 9+… has more than 64 bits"),
        (["--teacher", "x" * 300], "longer than any"),
        (["--revision", "\udcff"], "no UTF-8"),
        (["--finetune_markers", "0.101,0.102"], "the same in hundredths"),
        (["--contrast_width", str(2**40)], "is more than"),
        (["--loader_workers", "100000"], "0 … 256"),
    ],
    ids=str,
)
def test_flags_that_no_run_can_have_are_refused(more: list[str], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        parse_config([*flags(**NEEDED), *more])


def test_real_configs_with_doubles_and_nulls_are_taken(tmp_path: Path) -> None:
    tiny_config("bert").save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).touch()
    path = tmp_path / "config.json"
    double = '{"pad_token_id": 0, "pad_token_id": 0, "position_embedding_type": null,'
    path.write_text(path.read_text().replace("{", double, 1))
    assert load_config(str(tmp_path), "--teacher").model_type == "bert"


def test_an_index_on_the_hub_may_not_name_a_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "w.bin"}}')
    monkeypatch.setattr("pretrain.models.load_config", lambda *_: tiny_config("bert"))
    monkeypatch.setattr("pretrain.models.cached_file", lambda *_, **__: str(tmp_path / INDEX))
    with pytest.raises(InputError, match=r"--teacher some/model: weight_map .* has w\.bin"):
        load_encoder("some/model", "--teacher")
