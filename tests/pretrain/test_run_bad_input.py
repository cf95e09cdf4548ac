"""Bad input of the trainer: one line with the remedy, exit status 2, nothing started or written."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from data_prep.shard_format import TRAIN, read_manifest
from data_prep.tokenization import train_tokenizer
from potstill.files import write_json
from pretrain import run
from pretrain.model_folder import WEIGHTS
from pretrain.models import UNTRAINED
from tests.launch import Materials, flags, shard_text, write_ds_config, write_teacher
from tests.launch import materials_fixture as materials_fixture
from tests.pretrain.checkpoints import write_checkpoint

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
    """Call the program, which must refuse what is given before anything starts; its message."""

    def build_run(*_: Any) -> None:
        pytest.fail("the run was built: the fault was not found before")

    monkeypatch.setattr(run, "start_ranks", lambda: torch.device("cpu"))
    monkeypatch.setattr(run, "build_run", build_run)
    disable_progress_bar()

    def call(given: Given) -> str:
        output = Path(given["output"]) if given.get("output") else tmp_path / "run"
        before = sorted(output.rglob("*")) if output.exists() else None
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run.main(flags(**(defaults(materials, tmp_path) | given)))
        assert stop.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert (sorted(output.rglob("*")) if output.exists() else None) == before
        return lines[0]

    return call


def defaults(materials: Materials, folder: Path) -> Given:
    """A run that would work."""
    return {
        "ds_config": write_ds_config(folder / "ds.json"),
        "data": materials.shards,
        "teacher": materials.teacher,
        "objective": "att-mse",
        "max_steps": 2,
        "output": folder / "run",
    }


# --- what is given to the program, by case: the changed flags, made in a folder of their own


def flipped_byte(materials: Materials, folder: Path) -> Given:
    shards = folder / "flipped"
    shutil.copytree(materials.shards, shards)
    path = shards / read_manifest(shards).of_split(TRAIN)[0].name
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    return {"data": shards}


def missing_shard(materials: Materials, folder: Path) -> Given:
    shards = folder / "missing"
    shutil.copytree(materials.shards, shards)
    (shards / read_manifest(shards).of_split(TRAIN)[0].name).unlink()
    return {"data": shards}


def no_validation_rows(materials: Materials, folder: Path) -> Given:
    text = folder / "one.txt"
    text.write_text((materials.folder / "manual.txt").read_text().partition("\n\n")[0])
    shard_text(text, folder / "one")
    return {"data": folder / "one", "teacher": None, "objective": "mlm"}


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


def untrained_head(materials: Materials, folder: Path) -> Given:
    given = changed_config(**{UNTRAINED: ["cls"]})(materials, folder)
    return given | {"objective": "kd"}


def truncated_weights(materials: Materials, folder: Path) -> Given:
    shutil.copytree(materials.teacher, folder / "short")
    path = folder / "short" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return {"teacher": folder / "short"}


def changed_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """The teacher with other weights."""

    def make(materials: Materials, folder: Path) -> Given:
        shutil.copytree(materials.teacher, folder / "changed")
        path = folder / "changed" / WEIGHTS
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        return {"teacher": folder / "changed"}

    return make


def not_a_number(weights: dict[str, torch.Tensor]) -> None:
    weights[QUERY][3] = torch.nan


def narrower(weights: dict[str, torch.Tensor]) -> None:
    weights[QUERY] = weights[QUERY][:, :8].clone()


def lost(weights: dict[str, torch.Tensor]) -> None:
    del weights[QUERY]


def only_a_pickle(materials: Materials, folder: Path) -> Given:
    """A pickle that leaves a file behind when it is opened."""
    shutil.copytree(materials.teacher, folder / "changed")
    (folder / "changed" / WEIGHTS).unlink()
    with open(folder / "changed" / "pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(folder / "opened"), file)
    return {"teacher": folder / "changed"}


class Trap:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def index_outside(materials: Materials, folder: Path) -> Given:
    """Weights in pieces, one of them outside the folder."""
    shutil.copytree(materials.teacher, folder / "changed")
    weights = folder / "changed" / WEIGHTS
    index = {"weight_map": dict.fromkeys(load_file(weights), f"../{WEIGHTS}")}
    weights.rename(folder / WEIGHTS)
    write_json(folder / "changed" / f"{WEIGHTS}.index.json", index)
    return {"teacher": folder / "changed"}


def index_to_a_pickle(materials: Materials, folder: Path) -> Given:
    """Weights in one piece, which its index calls something else than safetensors."""
    given = only_a_pickle(materials, folder)
    names = load_file(materials.teacher / WEIGHTS)
    (folder / "changed" / "pytorch_model.bin").rename(folder / "changed" / "w.bin")
    index = {"weight_map": dict.fromkeys(names, "w.bin")}
    write_json(folder / "changed" / f"{WEIGHTS}.index.json", index)
    return given


def own_code(materials: Materials, folder: Path) -> Given:
    """A teacher whose config asks for a class of its own."""
    own = {"AutoConfig": "modeling.Own", "AutoModelForMaskedLM": "modeling.Own"}
    given = changed_config(auto_map=own)(materials, folder)
    code = f"import pathlib; pathlib.Path({str(folder / 'opened')!r}).touch()\n"
    (folder / "changed" / "modeling.py").write_text(code)
    return given


def no_config(materials: Materials, folder: Path) -> Given:
    shutil.copytree(materials.teacher, folder / "bare")
    (folder / "bare" / "config.json").unlink()
    return {"teacher": folder / "bare"}


def no_tokenizer(materials: Materials, folder: Path) -> Given:
    (folder / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(materials.teacher / name, folder / "bare")
    return {"teacher": folder / "bare"}


def ds_text(text: str) -> Change:
    """A ds_config with that text."""

    def change(materials: Materials, folder: Path) -> Given:
        (folder / "bad.json").write_text(text)
        return {"ds_config": folder / "bad.json"}

    return change


def ds_sections(**sections: Any) -> Change:
    """A ds_config with those sections besides the batch sizes."""
    return lambda _, folder: {"ds_config": write_ds_config(folder / "bad.json", **sections)}


def output_with(name: str, text: str) -> Change:
    """An output folder that holds a file."""

    def change(materials: Materials, folder: Path) -> Given:
        (folder / "used").mkdir()
        (folder / "used" / name).write_text(text)
        return {"output": folder / "used"}

    return change


def output_file(_: Materials, folder: Path) -> Given:
    (folder / "notes.txt").write_text("x")
    return {"output": folder / "notes.txt"}


def these(**given: Any) -> Change:
    """Just other flags; a path is inside the test's folder."""
    return lambda _, folder: {
        name: folder / value[2:] if isinstance(value, str) and value.startswith("./") else value
        for name, value in given.items()
    }


def headless(objective: str) -> Change:
    """A teacher without MLM head, under that objective."""
    return lambda materials, _: {"teacher": materials.headless, "objective": objective}


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
OTHER_RUN = '{"begun_on_ranks": 1, "identity": {"objective": "mlm", "seed": 0}}'
CASES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no data": (these(data=None), ("--data is missing", "data_prep/shard.py")),
    "missing data": (these(data="./nowhere"), ("--data", "nowhere", "no such folder")),
    "not shards": (lambda m, _: {"data": m.teacher}, ("manifest.json",)),
    "flipped byte": (flipped_byte, ("train-00000", "corrupted", "SHA-256")),
    "missing shard": (missing_shard, ("train-00000", "cannot be read")),
    "no validation rows": (no_validation_rows, ("no validation rows", "two documents")),
    "another tokenizer": (other_tokenizer, ("another tokenizer", "--tokenizer")),
    "a tokenizer is missing": (no_tokenizer, ("tokenizer", "bare")),
    **{
        f"heads under {name}": (
            these(student_heads=2, objective=name),
            ("2 and the teacher 4", "--student_heads 4", "minilmv2"),
        )
        for name in ("att-mse", "att-kl", "val-kl", "hid-seq+0.5*val-kl")
    },
    **{
        f"no head under {name}": (headless(name), ("no trained MLM head", "att-mse"))
        for name in ("kd", "vanilla-kd", "att-mse+0.5*kd")
    },
    "an untrained head": (untrained_head, ("no trained MLM head",)),
    "odd hidden size": (these(student_hidden=30), ("30", "--student_heads 4", "divide")),
    "too few positions": (short_positions, ("seq_length is 32", "teacher has only 16")),
    "no teacher": (these(teacher=None), ("learns from a teacher", "--teacher")),
    "missing teacher": (these(teacher="./none"), ("--teacher", "no such folder")),
    "architecture": (changed_config(model_type="distilbert"), ("'distilbert'", "supported are")),
    "a decoder": (changed_config(is_decoder=True), ("is_decoder", "encoders")),
    "truncated weights": (truncated_weights, ("weights cannot be read", "fetch them again")),
    "NaN in the weights": (changed_weights(not_a_number), (QUERY, "NaN")),
    "weights of another shape": (changed_weights(narrower), ("weights cannot be read",)),
    "a lost weight": (changed_weights(lost), ("1 weights of the encoder are missing", QUERY)),
    "only a pickle": (only_a_pickle, ("pytorch_model.bin", "run code", WEIGHTS)),
    "an index that leaves the folder": (
        index_outside,
        ("index.json", "the name of a safetensors file in the folder"),
    ),
    "an index of a pickle": (index_to_a_pickle, ("index.json has w.bin", "safetensors")),
    "fewer layers than weights": (
        changed_config(num_hidden_layers=3),
        ("weights belong to layers", "encoder.layer.3."),
    ),
    "far more weights than there are": (
        changed_config(intermediate_size=2**18, hidden_size=64),
        ("config.json describes", "copy the model again"),
    ),
    "code of its own": (own_code, ("auto_map", "never run")),
    "a quantised teacher": (changed_config(quantization_config={"bits": 4}), ("is quantised",)),
    "a kernel of the hub": (changed_config(attn_implementation="a/b"), ("attn_implementation",)),
    "no layers": (changed_config(num_hidden_layers=0), ("num_hidden_layers 0", "1 … 1,000")),
    "a size in quotes": (changed_config(hidden_size="32"), ("changed", "hidden_size")),
    "a size for no machine": (
        changed_config(hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=1000),
        ("GiB of weights", "smaller sizes"),
    ),
    "odd heads": (changed_config(num_attention_heads=5), ("num_attention_heads 5", "multiple")),
    "unknown activation": (changed_config(hidden_act="exec"), ("'exec'", "not known")),
    "no pad token": (changed_config(pad_token_id=4000), ("pad_token_id 4000",)),
    "odd untrained parts": (changed_config(**{UNTRAINED: [3]}), (UNTRAINED, "list of parts")),
    "a student for no machine": (these(student_hidden=2**30), ("GiB of weights",)),
    "layers for no machine": (these(student_layers=10**6), ("--student_layers 1000000", "1000")),
    "no model config": (no_config, ("--teacher", "config.json")),
    "unknown objective": (these(objective="att-mze"), ("'att-mze'", "nearest: att-mse")),
    "malformed objective": (these(objective="kd+"), ("NAME, WEIGHT*NAME or FROM:TO*NAME",)),
    "layers out of range": (these(layers="2:9"), ("2:9", "teacher 4")),
    "attention of layer 0": (these(layers="0:0"), ("layer 0",)),
    "too many layers to copy": (these(student_layers=9, init="uniform"), ("9", "1 to 4")),
    "layer list": (these(student_layers=2, init="1,2,3"), ("names 3", "has 2")),
    "another width to copy": (these(student_hidden=16, init="first"), ("--init random",)),
    "nothing masked": (these(objective="mlm", mlm_probability=0), ("masks nothing",)),
    "no ds_config": (these(ds_config=None), ("--ds_config is missing", "ds_configs/cpu.json")),
    "missing ds_config": (these(ds_config="./none.json"), ("none.json", "cannot be read")),
    "ds_config is a folder": (these(ds_config="./"), ("--ds_config", "cannot be read")),
    "ds_config is no JSON": (ds_text("{"), ("bad.json", "not valid JSON")),
    "ds_config is a list": (ds_text("[1]"), ("bad.json", "object")),
    "ds_config without sizes": (ds_text("{}"), ("train_micro_batch_size_per_gpu",)),
    "ds_config with a fraction": (
        ds_text('{"train_micro_batch_size_per_gpu": 1.5}'),
        ("train_micro_batch_size_per_gpu 1.5", "positive"),
    ),
    "batch sizes": (ds_sections(train_batch_size=9), ("do not multiply out", "train_batch_size 9")),
    "auto": (ds_sections(gradient_clipping="auto"), ("gradient_clipping", "auto")),
    "a scheduler": (ds_sections(scheduler={"type": "WarmupLR"}), ("scheduler", "--warmup")),
    "unknown ds_config key": (
        ds_sections(zero_optimisation={"stage": 1}),
        ("'zero_optimisation'", "nearest: zero_optimization"),
    ),
    "enabled in quotes": (ds_sections(bf16={"enabled": "false"}), ("bf16.enabled", "'false'")),
    "a stage in quotes": (ds_sections(zero_optimization={"stage": "1"}), ("stage", "0, 1, 2")),
    "unknown optimizer": (ds_sections(optimizer={"type": "Adamm"}), ("'Adamm'", "adamw")),
    "learning rate in quotes": (
        ds_sections(optimizer={"type": "AdamW", "params": {"lr": "fast"}}),
        ("optimizer.params.lr 'fast'",),
    ),
    "clipping in quotes": (ds_sections(gradient_clipping="1"), ("gradient_clipping", "a number")),
    "a batch without end": (
        ds_sections(gradient_accumulation_steps=10**7),
        ("global batch of 40,000,000",),
    ),
    "a key twice": (ds_text('{"bf16": {}, "bf16": {}}'), ("'bf16' stands there twice",)),
    "unknown ZeRO key": (
        ds_sections(zero_optimization={"stage": 1, "stge": 1}),
        ("bad.json", "stge"),
    ),
    "two precisions": (
        ds_sections(bf16={"enabled": True}, fp16={"enabled": True}),
        ("bad.json",),
    ),
    "folder of another run": (
        output_with("config.json", OTHER_RUN),
        ("another run", "objective", "another --output"),
    ),
    "unreadable run": (output_with("config.json", "{"), ("config.json", "unreadable")),
    "foreign folder": (output_with("thesis.tex", "x"), ("not empty", "another folder")),
    "output is a file": (output_file, ("notes.txt", "give another")),
    "resume from nowhere": (these(resume="./none"), ("--resume", "no whole checkpoint")),
    "missing student": (these(student="./none"), ("--student", "no such folder")),
}
REMOVED_KEYS = (  # what DeepSpeed 0.19.8 refuses
    *("amp", "nebula", "compression_training", "quantize_training", "eigenvalue"),
    *("sparse_attention", "elasticity", "curriculum_learning", "progressive_layer_drop"),
)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(
    case: str, materials: Materials, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    change, facts = CASES[case]
    message = refused(change(materials, tmp_path))
    for fact in facts:
        assert fact in message
    assert not (tmp_path / "opened").exists(), "code of the folder was run"


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_sections_that_deepspeed_dropped_are_refused(
    key: str, tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    config = write_ds_config(tmp_path / "bad.json", **{key: {"enabled": True}})
    message = refused({"ds_config": config})
    assert "bad.json" in message and "removed" in message


def test_a_checkpoint_is_not_overwritten_under_resume_never(
    tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints", 2)
    assert "holds" in refused({"resume": "never"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, refused: Callable[[Given], str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused({"output": tmp_path / "locked" / "run"})
