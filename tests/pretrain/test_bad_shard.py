"""Damaged files of `--data`: the trainer stops by name, or goes on without the bad shards."""

import pydoc_data.topics
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.shard_format import TRAIN, ShardReader, read_manifest
from potstill.errors import InputError
from pretrain.config import parse_config
from pretrain.plan import Plan, make_plan
from pretrain.run_data import RunData
from tests.chaos.shard_flips import flip
from tests.launch import (
    Materials,
    flags,
    shard_text,
    write_ds_config,
    write_teacher,
)
from tests.launch import materials_fixture as materials_fixture

ROWS = 20  # of a shard


@pytest.fixture(scope="module")
def shards(materials: Materials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several shards of each split, and a teacher with their tokenizer beside them."""
    folder = tmp_path_factory.mktemp("several")
    topics = [pydoc_data.topics.topics[name] for name in ("assignment", "class", "if")]
    paragraphs = [" ".join(text.split()) for topic in topics for text in topic.split("\n\n")]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    more = ("--rows_per_shard", str(ROWS), "--validation_fraction", "0.4")
    shard_text(folder / "text.txt", folder / "shards", *more)
    write_teacher(folder / "teacher", folder / "shards" / "tokenizer")
    return folder / "shards"


@pytest.fixture
def copied(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards.parent / "teacher", tmp_path / "teacher")
    return shutil.copytree(shards, tmp_path / "copy")


def arguments(folder: Path, data: Path, **given: Any) -> list[str]:
    made = write_ds_config(folder / "ds.json")
    usual = {
        "ds_config": made,
        "data": data,
        "teacher": data.parent / "teacher",
        "objective": "att-mse",
    }
    usual |= {"max_steps": 3, "output": folder / "run", "log_every": 1}
    return flags(**(usual | given))


def plan_of(folder: Path, data: Path, **given: Any) -> Plan:
    config = parse_config(arguments(folder, data, **given))
    return make_plan(config, torch.device("cpu"))


def damage(data: Path, split: str, number: int, how: str) -> str:
    """Damage a shard; its name."""
    path = data / read_manifest(data).of_split(split)[number].name
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        flip(path, path.stat().st_size // 2, 4)
    return path.name


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_bad_shard_stops_the_run_with_its_name_and_the_remedy(
    how: str, materials: Materials, one_rank: None, copied: Path, tmp_path: Path
) -> None:
    name = damage(copied, TRAIN, 1, how)
    with pytest.raises(InputError, match=f"{name} .*--on_bad_shard skip"):
        plan_of(tmp_path, copied)


@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_skipped_shard_is_named_once_and_all_other_rows_stay_where_they_were(
    how: str,
    materials: Materials,
    one_rank: None,
    shards: Path,
    copied: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = RunData(plan_of(tmp_path, shards, mlm_probability=0)).training(0)
    name = damage(copied, TRAIN, 1, how)
    capsys.readouterr()
    plan = plan_of(tmp_path, copied, mlm_probability=0, on_bad_shard="skip")
    assert plan.left_out == {name}
    assert capsys.readouterr().out.count(name) == 1
    bad = ShardReader(shards, TRAIN).read(np.arange(ROWS, 2 * ROWS)).tolist()
    found = RunData(plan).training(0)
    changed = 0
    for _ in range(ShardReader(shards, TRAIN).rows // 4):
        for before, now in zip(next(whole).input_ids, next(found).input_ids, strict=True):
            assert (before.tolist() in bad) == (before.tolist() != now.tolist())
            assert now.tolist() not in bad
            changed += int(before.tolist() != now.tolist())
    assert ROWS - 3 <= changed <= ROWS  # the last rows of an epoch may lie in a next batch


def test_validation_does_without_a_bad_shard(
    materials: Materials, one_rank: None, copied: Path, tmp_path: Path
) -> None:
    damage(copied, "validation", 0, "cut")
    plan = plan_of(tmp_path, copied, on_bad_shard="skip")
    rows = sum(len(batch.input_ids) for batch, _ in RunData(plan).validation())
    assert rows == plan.manifest.splits["validation"].rows - ROWS


@pytest.mark.parametrize("split", ["train", "validation"])
def test_with_every_shard_bad_the_run_stops(
    split: str, materials: Materials, one_rank: None, copied: Path, tmp_path: Path
) -> None:
    for number in range(len(read_manifest(copied).of_split(split))):
        damage(copied, split, number, "cut")
    with pytest.raises(InputError, match=f"every {split} shard in .* is bad"):
        plan_of(tmp_path, copied, on_bad_shard="skip")


@pytest.mark.parametrize("on_bad_shard", ["stop", "skip"])
def test_a_bad_tokenizer_file_is_never_skipped(
    on_bad_shard: str, materials: Materials, one_rank: None, copied: Path, tmp_path: Path
) -> None:
    flip(copied / "tokenizer" / "tokenizer.json", 200, 1)
    with pytest.raises(InputError, match="tokenizer/tokenizer.json is corrupted"):
        plan_of(tmp_path, copied, on_bad_shard=on_bad_shard)


def test_a_run_that_stopped_at_a_bad_shard_may_go_on_without_it(
    materials: Materials, shards: Path, tmp_path: Path
) -> None:
    settings = [arguments(tmp_path, shards, on_bad_shard=x) for x in ("stop", "skip")]
    assert parse_config(settings[0]).identity() == parse_config(settings[1]).identity()


def test_skipping_without_checksums_is_refused(
    materials: Materials, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--on_bad_shard skip finds bad shards by their checksums"):
        parse_config(arguments(tmp_path, shards, on_bad_shard="skip", check_shards="False"))
