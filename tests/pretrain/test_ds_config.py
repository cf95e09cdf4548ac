"""The ds_config: batch sizes that multiply out, what is filled in, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.errors import InputError
from pretrain.ds_config import (
    BatchSizes,
    batch_sizes,
    check_with_deepspeed,
    precision,
    read_ds_config,
    resolve_ds_config,
)

PATH = Path("own.json")
TOTAL, MICRO, ACCUMULATION = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
)


@pytest.mark.parametrize(
    ("given", "ranks", "expected"),
    [
        ({MICRO: 4}, 3, BatchSizes(12, 4, 1)),
        ({MICRO: 4, ACCUMULATION: 5}, 2, BatchSizes(40, 4, 5)),
        ({TOTAL: 64, MICRO: 4}, 2, BatchSizes(64, 4, 8)),
        ({TOTAL: 64, ACCUMULATION: 4}, 2, BatchSizes(64, 8, 4)),
        ({TOTAL: 64}, 4, BatchSizes(64, 16, 1)),
        ({TOTAL: 64, MICRO: 4, ACCUMULATION: 8}, 2, BatchSizes(64, 4, 8)),
    ],
    ids=str,
)
def test_what_is_left_out_is_worked_out(
    given: dict[str, int], ranks: int, expected: BatchSizes
) -> None:
    assert batch_sizes(given, ranks, PATH) == expected


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({TOTAL: 64, MICRO: 4, ACCUMULATION: 8}, 3),
        ({TOTAL: 10, MICRO: 4}, 1),
        ({TOTAL: 2, MICRO: 4}, 1),
        ({TOTAL: 3}, 4),
        ({TOTAL: 9, ACCUMULATION: 2}, 1),
    ],
    ids=str,
)
def test_sizes_that_do_not_multiply_out_are_refused(given: dict[str, int], ranks: int) -> None:
    with pytest.raises(InputError, match=r"own\.json.*do not multiply out"):
        batch_sizes(given, ranks, PATH)


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None])
def test_sizes_must_be_positive_numbers(value: Any) -> None:
    with pytest.raises(InputError, match=MICRO):
        batch_sizes({MICRO: value}, 1, PATH)


def test_the_resolved_config_is_whole_and_leaves_the_given_one_alone(tmp_path: Path) -> None:
    given = {MICRO: 2, "tensorboard": {"enabled": True}, "csv_monitor": {"enabled": False}}
    resolved = resolve_ds_config(given, BatchSizes(8, 2, 4), tmp_path)
    assert (resolved[TOTAL], resolved[MICRO], resolved[ACCUMULATION]) == (8, 2, 4)
    assert resolved["tensorboard"]["output_path"] == str(tmp_path / "tensorboard")
    assert resolved["csv_monitor"] == {"enabled": False}
    assert given["tensorboard"] == {"enabled": True}


def test_a_dry_run_has_no_monitors() -> None:
    given = {MICRO: 2, "tensorboard": {"enabled": True}, "wandb": {"enabled": True}}
    assert set(resolve_ds_config(given, BatchSizes(2, 2, 1), None)) == {TOTAL, MICRO, ACCUMULATION}


def test_a_monitors_own_place_is_kept(tmp_path: Path) -> None:
    own = {"enabled": True, "output_path": "elsewhere", "job_name": "mine"}
    resolved = resolve_ds_config({"tensorboard": own}, BatchSizes(1, 1, 1), tmp_path)
    assert resolved["tensorboard"] == own


@pytest.mark.parametrize(
    ("sections", "dtype"),
    [
        ({}, torch.float32),
        ({"bf16": {"enabled": False}}, torch.float32),
        ({"bf16": {"enabled": True}}, torch.bfloat16),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, torch.float16),
    ],
    ids=str,
)
def test_both_models_run_in_the_configs_precision(
    sections: dict[str, Any], dtype: torch.dtype
) -> None:
    assert precision(sections) == dtype


def test_deepspeeds_refusal_names_file_and_key() -> None:
    with pytest.raises(InputError, match=r"own\.json.*stge"):
        check_with_deepspeed({MICRO: 1, "zero_optimization": {"stge": 1}}, PATH)
    check_with_deepspeed({MICRO: 1, "zero_optimization": {"stage": 1}}, PATH)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=r"ds\.json"):
        read_ds_config(tmp_path / "ds.json")


@pytest.mark.parametrize(
    ("section", "names"),
    [
        ({"bf16": {"enabled": "auto"}}, r"bf16\.enabled is \"auto\""),
        ({"zero_optimization": {"stage": "auto"}}, r"zero_optimization\.stage is \"auto\""),
        ({"bfloat16": {"enabled": True}}, "write bf16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"scheduler": {"type": "WarmupLR"}}, "--warmup"),
        ({"tensorboard": True}, "'tensorboard' must be a JSON object"),
        *(
            ({"zero_optimization": {"stage": 3, name: {"device": "nvme"}}}, f"{name}.*swapped out")
            for name in ("offload_optimizer", "offload_param")
        ),
    ],
    ids=str,
)
def test_sections_that_would_mean_something_else_are_refused(
    tmp_path: Path, section: dict[str, Any], names: str
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({MICRO: 4, **section}))
    with pytest.raises(InputError, match=names):
        read_ds_config(path)


def test_null_is_a_section_left_out(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    names = ("communication_data_type", "optimizer", "fp16", "zero_optimization", TOTAL)
    path.write_text(json.dumps({MICRO: 4, **dict.fromkeys(names)}))
    assert read_ds_config(path) == {MICRO: 4}
