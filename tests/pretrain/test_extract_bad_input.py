"""Bad input of the extraction: one line with the remedy, exit status 2, nothing written."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from data_prep.shard_format import TRAIN, read_manifest
from data_prep.tokenization import train_tokenizer
from potstill.files import write_json
from pretrain import extract
from pretrain.models import UNTRAINED
from pretrain.student.extraction import RECORD
from tests.launch import Materials, flags, write_teacher
from tests.launch import materials_fixture as materials_fixture

Given = dict[str, Any]
Change = Callable[[Materials, Path], Given]


@pytest.fixture
def refused(
    materials: Materials,
    one_rank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[Given], str]:
    """Call the program, which must refuse what is given before long work; its message."""

    def work(*_: Any) -> None:
        pytest.fail("the work began: the fault was not found before")

    monkeypatch.setattr(extract, "start_ranks", lambda: torch.device("cpu"))
    monkeypatch.setattr(extract, "score", work)
    disable_progress_bar()

    def call(given: Given) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            extract.main(flags(**(defaults(materials, tmp_path) | given)))
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not (tmp_path / "student").exists()
        return lines[0]

    return call


def defaults(materials: Materials, folder: Path) -> Given:
    """An extraction that would work."""
    return {
        "teacher": materials.teacher,
        "data": materials.shards,
        "layers": 2,
        "hidden": 16,
        "method": "etd-impt",
        "output": folder / "student",
    }


# --- what is given to the program, by case: the changed flags, made in a folder of their own


def these(**given: Any) -> Change:
    """Just other flags; a path is inside the test's folder."""
    return lambda _, folder: {
        name: folder / value[2:] if isinstance(value, str) and value.startswith("./") else value
        for name, value in given.items()
    }


def flipped_byte(materials: Materials, folder: Path) -> Given:
    shards = folder / "flipped"
    shutil.copytree(materials.shards, shards)
    path = shards / read_manifest(shards).of_split(TRAIN)[0].name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    return {"data": shards}


def other_tokenizer(materials: Materials, folder: Path) -> Given:
    text = (materials.folder / "manual.txt").read_text()
    train_tokenizer(lambda: iter([text[:3000]]), 300, folder / "words")
    write_teacher(folder / "other", folder / "words", vocab_size=400)
    return {"teacher": folder / "other"}


def short_positions(materials: Materials, folder: Path) -> Given:
    write_teacher(folder / "short", materials.shards / "tokenizer", max_position_embeddings=16)
    return {"teacher": folder / "short"}


def changed_config(**values: Any) -> Change:
    """The teacher with other entries in its config.json."""

    def change(materials: Materials, folder: Path) -> Given:
        shutil.copytree(materials.teacher, folder / "changed")
        path = folder / "changed" / "config.json"
        write_json(path, json.loads(path.read_text()) | values)
        return {"teacher": folder / "changed"}

    return change


def no_tokenizer(materials: Materials, folder: Path) -> Given:
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(materials.teacher / name, folder / "bare")
    return {"teacher": folder / "bare", "method": "etd-rand", "data": None}


def output_with(name: str, text: str) -> Change:
    """An output folder that holds a file."""

    def change(materials: Materials, folder: Path) -> Given:
        (folder / "used").mkdir()
        (folder / "used" / name).write_text(text)
        return {"output": folder / "used"}

    return change


OTHER = '{"identity": {"method": "etd-rand", "seed": 0}}'
CASES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no teacher": (these(teacher=None), ("--teacher is missing",)),
    "missing teacher": (these(teacher="./none"), ("--teacher", "no such folder")),
    "no layers": (these(layers=None), ("--layers is missing",)),
    "no hidden": (these(hidden=None), ("--hidden is missing",)),
    "no output": (these(output=None), ("--output is missing",)),
    "no method": (these(method=None), ("--method is missing",)),
    "unknown method": (these(method="etd-imp"), ("'etd-imp'", "nearest: etd-impt")),
    "unknown ablation": (these(ablation="rev-fnn"), ("'rev-fnn'", "nearest: rev-ffn")),
    "unknown depth": (these(depth="unifrom"), ("--depth 'unifrom'", "nearest: uniform")),
    "malformed depth": (these(depth="1,,2"), ("--depth '1,,2'", "uniform")),
    "random depth": (these(depth="random"), ("--depth 'random'", "uniform")),
    "unknown flag": (these(width=3), ("unknown flags: --width 3",)),
    "no data": (these(data=None), ("--method etd-impt", "--data", "etd-rand")),
    "missing data": (these(data="./nowhere"), ("nowhere", "no such folder")),
    "not shards": (lambda m, _: {"data": m.teacher}, ("manifest.json",)),
    "flipped byte": (flipped_byte, ("train-00000", "corrupted", "SHA-256")),
    "another tokenizer": (other_tokenizer, ("another tokenizer", "--tokenizer")),
    "a tokenizer is missing": (no_tokenizer, ("bare", "tokenizer")),
    "too few positions": (short_positions, ("seq_length is 32", "teacher has only 16")),
    "no head": (
        lambda m, _: {"teacher": m.headless},
        ("no trained MLM head", "--objective mlm --freeze encoder --student", "etd-rand"),
    ),
    "an untrained head": (changed_config(**{UNTRAINED: ["cls"]}), ("no trained MLM head",)),
    "architecture": (changed_config(model_type="distilbert"), ("'distilbert'", "supported are")),
    "heads do not divide": (these(hidden=18), ("--hidden 18", "4 heads", "16 or 20")),
    "wider": (these(hidden=64), ("--hidden 64", "only 32")),
    "deeper": (these(layers=5), ("--layers 5", "only 4")),
    "more ffn": (these(ffn=65), ("--ffn 65", "only 64")),
    "another head size": (these(head_size=8), ("--head_size 8", "16", "--hidden 32")),
    "nothing kept": (these(hidden=0), ("--hidden 0", "positive")),
    "negative rows": (these(rows=-1), ("--rows -1", "positive")),
    "rows beyond counting": (these(rows=10**30), ("--rows 10", "64 bits")),
    "no number": (these(mlm_probability="nan"), ("--mlm_probability nan",)),
    "a layer beyond counting": (these(depth="1," + "9" * 5000), ("--depth", "uniform")),
    "nothing masked": (these(mlm_probability=0), ("--mlm_probability 0",)),
    "layer list": (these(depth="1,2,3"), ("--depth 1,2,3 names 3", "has 2 (--layers)")),
    "layers out of range": (these(depth="1,9"), ("--depth 1,9", "1 to 4")),
    "alternate": (these(depth="alternate", layers=3), ("--depth alternate", "--layers 2")),
    "reversed chance": (
        these(method="etd-rand", ablation="rev-ffn"),
        ("--ablation rev-ffn", "etd-rand", "--method etd-impt"),
    ),
    "another extraction": (
        output_with(RECORD, OTHER),
        (
            "another extraction",
            "hidden",
            "method",
            "(ablation was None, is 'none')",
            "another --output",
        ),
    ),
    "unreadable record": (output_with(RECORD, "{"), (RECORD, "unreadable")),
    "foreign folder": (output_with("thesis.tex", "x"), ("not empty", "holds no extraction")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(
    case: str, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    change, facts = CASES[case]
    message = refused(change(materials, tmp_path))
    for fact in facts:
        assert fact in message


def test_a_signal_ends_the_program_in_one_line_with_nothing_written(
    materials: Materials,
    one_rank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(extract, "start_ranks", lambda: torch.device("cpu"))
    monkeypatch.setattr(extract, "score", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        extract.main(flags(**defaults(materials, tmp_path)))
    assert stop.value.code == 130
    assert "error: stopped by SIGINT; a student appears whole" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) == handler
