"""What runs of the trainer leave behind; one start of the program does them all, in order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from data_prep.shard_format import TOKENIZER_FOLDER, VALIDATION, ShardReader
from data_prep.tokenization import load_tokenizer
from pretrain.batches import Slices, validation_batches
from pretrain.checkpoint import load_state
from pretrain.masking import Masking
from pretrain.models import UNTRAINED, has_untrained_head, load_config
from pretrain.optim import parameter_groups
from tests.launch import Materials, flags, losses, metrics, runs, write_ds_config
from tests.launch import materials_fixture as materials_fixture

pytestmark = pytest.mark.slow

STEPS, HOURS = 6, 0.0008
BF16 = {
    "bf16": {"enabled": True},
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
}
ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "weight_decay": 0.5}}
MONITORS = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
# What att-mse of the second and last layer reaches: all before it, and its query and key.
UNREACHED = {
    "cls",
    "bert.encoder.layer.1.attention.self.value",
    "bert.encoder.layer.1.attention.output",
    "bert.encoder.layer.1.intermediate",
    "bert.encoder.layer.1.output",
}


@pytest.fixture(scope="module")
def done(materials: Materials) -> tuple[Path, str]:
    """The folder of all runs, by name, and what the program printed."""
    root = materials.folder / "runs"
    root.mkdir()
    preset = root / "preset.json"
    settings = {"objective": "mlm", "student_layers": 2, "student_hidden": 16, "max_steps": 99}
    preset.write_text(json.dumps({"about": "a test", "settings": settings}))
    several: list[list[str]] = []

    def run(name: str, sections: dict[str, Any] | None = None, **given: Any) -> None:
        config = write_ds_config(root / f"{name}.json", **(sections or {}))
        common = dict(data=materials.shards, max_steps=STEPS, log_every=1, lr=1e-3, seed=3)
        several.append(flags(ds_config=config, output=root / name, **(common | given)))

    run(
        "pretrained",
        MONITORS,
        preset=preset,
        student_hidden=32,
        student_heads=4,
        max_steps=10,
        finetune_markers="0.5,0.1",
    )
    kd = dict(teacher=root / "pretrained" / "student", objective="kd", student_layers=1)
    run("kd", **kd)
    run("kd-validated", **kd, validate_every=1)
    run("kd-without-dropout", **kd, dropout=0)
    att = dict(
        teacher=materials.teacher,
        objective="att-mse",
        student_layers=2,
        init="uniform",
        weight_decay=0.5,
    )
    run("att", **att)
    run("att-bf16", BF16 | {"zero_optimization": {"stage": 1}}, **att)
    run("att-bf16-zero0", {"bf16": {"enabled": True}}, **att)
    run("att-zero3", {"zero_optimization": {"stage": 3}}, **att)
    run("att-own-optimizer", {"optimizer": ADAM}, **att)
    run("untouched", MONITORS, **(att | dict(max_steps=0)))
    run("dry", MONITORS, **(att | dict(max_steps=1000, dry_run=True)))
    clock = dict(schedule="time", max_steps=None, max_hours=HOURS, warmup=0.4)
    run("timed", **(att | clock))
    same = dict(teacher=materials.teacher, student=materials.teacher, objective="att-mse", lr=1e-12)
    run("twin", **same, max_steps=2)
    run("twin-without-dropout", **same, max_steps=2, dropout=0)
    (ended,) = runs(materials, "runs", (0, several))
    assert ended.statuses == [0], ended.output[-3000:] + ended.errors[-5000:]
    return root, ended.output


@pytest.fixture(scope="module")
def folder(done: tuple[Path, str]) -> Path:
    return done[0]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


# --- the exported student


@torch.no_grad()
def test_the_exported_student_has_the_held_out_loss_that_the_trainer_had(
    folder: Path, materials: Materials
) -> None:
    """The library's own forward of the folder, against the trainer's last validation."""
    student = AutoModelForMaskedLM.from_pretrained(folder / "pretrained" / "student").eval()
    tokenizer = load_tokenizer(materials.shards / TOKENIZER_FOLDER)
    special = np.zeros(len(tokenizer), bool)
    special[list(tokenizer.all_special_ids)] = True
    masking = Masking(0.15, tokenizer.mask_token_id, len(tokenizer), special, seed=3)
    reader, slices = ShardReader(materials.shards, VALIDATION), Slices(8, 1, 0, 1)
    total = count = 0.0
    for batch, _ in validation_batches(reader, masking, tokenizer.pad_token_id, slices, None):
        logits = student(input_ids=batch.input_ids, attention_mask=batch.valid.long()).logits
        chosen = logits.flatten(0, 1)[batch.masked]
        total += float(functional.cross_entropy(chosen, batch.labels, reduction="sum"))
        count += batch.counts["masked"]
    last = metrics(folder / "pretrained", "validation")[-1]
    assert last["step"] == 10 and last["rows"] == reader.rows
    assert total / count == pytest.approx(last["loss"], rel=1e-5)


def test_every_fp32_export_reopens_with_the_logits_of_the_trainer(folder: Path) -> None:
    for run in ("pretrained", "kd", "att", "att-zero3", "att-own-optimizer", "timed"):
        exports = [line for line in metrics(folder / run, "event") if line["event"] == "export"]
        assert exports[-1]["path"] == "student"
        assert all(line["max_abs_difference"] < 1e-5 for line in exports), run


def test_the_student_comes_with_the_tokenizer_of_the_shards(
    folder: Path, materials: Materials
) -> None:
    text = "The comparison of two objects [MASK] a value."
    ours = AutoTokenizer.from_pretrained(folder / "att" / "student")
    theirs = AutoTokenizer.from_pretrained(materials.shards / TOKENIZER_FOLDER)
    assert ours(text).input_ids == theirs(text).input_ids


def test_the_model_card_says_where_the_student_comes_from(
    folder: Path, materials: Materials
) -> None:
    card = (folder / "att" / "student" / "README.md").read_text()
    commit = json.loads((folder / "att" / "environment.json").read_text())["commit"]
    for fact in (
        materials.teacher,
        "att-mse",
        "manual.txt",
        "| steps | 6 |",
        "| tokens | 768 |",
        commit,
        "`cls`",
    ):
        assert str(fact) in card, fact  # 6 steps x 4 rows x 32 tokens = 768


def test_what_a_student_cost_stands_beside_it(folder: Path) -> None:
    """Teacher and student so far: a marker after 1 of 10 steps cost a tenth."""
    run = folder / "pretrained"
    spent = {
        place: json.loads((run / place / "potstill.json").read_text())["FLOPs"]
        for place in ("markers/0.10", "student")
    }
    assert spent["student"] == metrics(run, "train")[-1]["flops"]
    assert spent["markers/0.10"] == pytest.approx(spent["student"] / 10)


def test_markers_are_exported_on_the_way(folder: Path) -> None:
    run = folder / "pretrained"
    steps = {
        line["path"]: line["step"] for line in metrics(run, "event") if line["event"] == "export"
    }
    assert steps == {"markers/0.10": 1, "markers/0.50": 5, "student": 10}
    early = load_file(run / "markers" / "0.10" / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(early[name], weights(run)[name])
    AutoModelForMaskedLM.from_pretrained(run / "markers" / "0.50")


def test_parts_behind_the_last_wanted_feature_are_listed_as_untrained(folder: Path) -> None:
    config = load_config(str(folder / "att" / "student"), "--teacher")
    listed = set(getattr(config, UNTRAINED))
    assert UNREACHED <= listed
    assert all(any(part.startswith(u) for u in UNREACHED | {"bert.embeddings"}) for part in listed)
    assert has_untrained_head(config)
    trained = load_config(str(folder / "pretrained" / "student"), "--teacher")
    assert getattr(trained, UNTRAINED) == []


@pytest.mark.parametrize(
    "run", ["att", "att-bf16", "att-bf16-zero0", "att-zero3", "att-own-optimizer"]
)
def test_unreached_weights_are_bitwise_the_teachers(
    folder: Path, materials: Materials, run: str
) -> None:
    """Not decayed (weight decay is 0.5), not rounded; layer 2 of 2 started from layer 4 of 4."""
    ours, theirs = weights(folder / run), load_file(materials.teacher / "model.safetensors")
    unreached = [name for name in ours if any(name.startswith(u + ".") for u in UNREACHED)]
    assert len(unreached) > 10
    for name in unreached:
        if "decoder" not in name:  # tied to the embeddings, which were trained
            source = name.replace("layer.1.", "layer.3.")
            assert torch.equal(ours[name], theirs[source]), name
    query = "bert.encoder.layer.1.attention.self.query.weight"
    assert not torch.equal(ours[query], theirs[query.replace("layer.1.", "layer.3.")])


@pytest.mark.parametrize("run", ["att-bf16", "att-bf16-zero0"])
def test_bf16_exports_the_master_weights(folder: Path, run: str) -> None:
    name = "bert.encoder.layer.1.attention.self.query.weight"
    query = weights(folder / run)[name]
    assert query.dtype == torch.float32
    assert (query != query.bfloat16().float()).float().mean() > 0.5
    assert torch.allclose(query, weights(folder / "att")[name], atol=2e-2)


def test_zero3_exports_what_plain_training_exports(folder: Path) -> None:
    plain, gathered = weights(folder / "att"), weights(folder / "att-zero3")
    assert plain.keys() == gathered.keys()
    for name in plain:
        assert torch.allclose(plain[name], gathered[name], atol=1e-5), name
    assert losses(folder / "att-zero3") == pytest.approx(losses(folder / "att"), rel=1e-5)


# --- teacher and modes


def test_a_model_without_a_teacher_becomes_one(folder: Path) -> None:
    """`--objective mlm` pretrains; its student then teaches under kd, which needs its head."""
    first, last = (line["loss"] for line in metrics(folder / "pretrained", "validation"))
    assert last < first
    assert len(losses(folder / "kd")) == STEPS


def test_the_teacher_runs_without_dropout_and_validation_too(folder: Path) -> None:
    """A student that is its teacher has loss 0 unless dropout acts, and only in training."""
    for run, silent in (("twin", False), ("twin-without-dropout", True)):
        assert (max(losses(folder / run)) < 1e-9) is silent
        for line in metrics(folder / run, "validation"):
            assert line["loss"] < 1e-9


def test_validation_leaves_training_as_it_was(folder: Path) -> None:
    assert losses(folder / "kd") == losses(folder / "kd-validated")
    assert losses(folder / "kd") != losses(folder / "kd-without-dropout"), "dropout acted at all"
    steps = [line["step"] for line in metrics(folder / "kd-validated", "validation")]
    assert steps == list(range(STEPS + 1))
    assert [line["step"] for line in metrics(folder / "kd", "validation")] == [0, STEPS]


def test_no_steps_only_validates(folder: Path) -> None:
    run = folder / "untouched"
    assert metrics(run, "train") == []
    (line,) = metrics(run, "validation")
    assert line["step"] == 0 and line["loss"] == metrics(folder / "att", "validation")[0]["loss"]
    assert not (run / "student").exists() and not (run / "checkpoints").exists()


# --- dry run, schedules, monitors, optimisers, presets


def test_a_dry_run_tells_the_cost_and_writes_nothing(done: tuple[Path, str]) -> None:
    folder, printed = done
    assert not (folder / "dry").exists()
    shown = printed[: printed.index("dry run")].rpartition("objective ")[2]
    for fact in ("4 layers x 32", "2 layers x 32", "parameters", "MFLOP per token", "1,000 steps"):
        assert fact in shown, fact
    for fact in ("128,000 tokens", "memory", "GiB"):
        assert fact in shown, fact
    told = next(line for line in printed.splitlines() if line.startswith("dry run"))
    assert "2 steps" in told and "hours for the whole run" in told


def test_a_time_budget_ends_the_run_and_bends_the_learning_rate(folder: Path) -> None:
    """Each rate goes by the seconds before its step; warm-up is 0.4 of the budget."""
    lines = metrics(folder / "timed", "train")
    budget, seconds = HOURS * 3600, [line["seconds"] for line in lines]
    assert seconds[-1] >= budget > seconds[-2]
    positions = [begun / budget for begun in [0.0, *seconds[:-1]]]
    expected = [1e-3 * (p / 0.4 if p < 0.4 else (1 - p) / 0.6) for p in positions]
    assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-9)
    assert any(p < 0.4 for p in positions[1:]) and positions[-1] > 0.4, "it rose and fell"


def test_the_learning_rate_rises_and_falls_over_the_steps(folder: Path) -> None:
    """Position (s + 1) / 7 with warm-up 0.06: falling from the first of six steps on."""
    rates = [line["lr"] for line in metrics(folder / "att", "train")]
    expected = [1e-3 * (1 - (s + 1) / 7) / 0.94 for s in range(STEPS)]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_a_ds_configs_own_optimizer_trains_at_the_runs_learning_rate(folder: Path) -> None:
    lines = metrics(folder / "att-own-optimizer", "train")
    assert [line["lr"] for line in lines] == [
        line["lr"] for line in metrics(folder / "att", "train")
    ]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_monitors_write_into_the_runs_folder(folder: Path) -> None:
    run = folder / "pretrained"
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    table = (run / "csv_monitor" / "train_loss.csv").read_text().split()
    assert table[0] == "step,loss" and len(table) == 11
    assert float(table[-1].split(",")[1]) == pytest.approx(losses(run)[-1])


def test_flags_win_over_the_preset(folder: Path) -> None:
    settings = json.loads((folder / "pretrained" / "config.json").read_text())["settings"]
    assert (settings["objective"], settings["student_layers"]) == ("mlm", 2)
    assert (settings["student_hidden"], settings["max_steps"]) == (32, 10)


def test_every_train_line_holds_what_is_promised(folder: Path) -> None:
    for line in metrics(folder / "att", "train"):
        assert set(line) == {
            *("kind", "step", "loss", "terms", "lr", "grad_norm", "tokens", "seconds"),
            *("tokens_per_second", "flops", "mfu", "shares", "memory_peak"),
        }
        assert line["terms"] == {"att-mse": line["loss"]}
        assert line["tokens"] == 4 * 32 * line["step"]
        assert line["grad_norm"] > 0 and line["tokens_per_second"] > 0
        assert line["mfu"] > 0, "a CPU's peak is measured"
        assert sum(line["shares"].values()) == pytest.approx(1)
        assert min(line["shares"][part] for part in ("data", "teacher", "student")) > 0
        assert line["memory_peak"] > 2**26, "torch alone is more than 64 MiB"


def test_a_run_ends_with_what_it_took(done: tuple[Path, str]) -> None:
    folder, printed = done
    (summary,) = (line for line in metrics(folder / "att", "event") if line["event"] == "summary")
    last = metrics(folder / "att", "train")[-1]
    for name in ("step", "tokens", "seconds", "flops", "memory_peak"):
        assert summary[name] == last[name]
    assert summary["tokens_per_second"] == last["tokens"] / last["seconds"]
    assert summary["device_hours"] == last["seconds"] / 3600
    peak = json.loads((folder / "att" / "environment.json").read_text())["peak"]
    assert peak["source"] == "measured"
    assert summary["mfu"] == pytest.approx(
        last["flops"] / last["seconds"] / peak["flops_per_second"]
    )
    assert sum(summary["shares"].values()) == pytest.approx(1)
    assert printed.count("HTD        6x768 by Att-MSE: 13.1 B tokens in 58 A100-hours") > 1


def test_a_validation_takes_no_probe_and_has_no_summary(folder: Path) -> None:
    run = folder / "untouched"
    assert json.loads((run / "environment.json").read_text())["peak"] is None
    assert not [line for line in metrics(run, "event") if line["event"] == "summary"]


def test_checkpoints_hold_no_teacher(folder: Path, materials: Materials) -> None:
    """The teacher has 4 layers; what is saved has the student's two."""
    (checkpoint,) = (folder / "att" / "checkpoints").glob("step-*")
    state, frozen = load_state(checkpoint)
    names = [*state.weights, *frozen]
    assert any("layer.1." in name for name in names)
    assert not any("layer.2." in name or "teacher" in name for name in names)


def test_biases_and_layer_norms_never_decay() -> None:
    """Nor anything that is frozen, which is in no group at all."""
    model = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2))
    model.bert.encoder.layer[11].requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    for parameter in plain["params"]:
        name = names[id(parameter)]
        assert name.endswith("bias") or "LayerNorm" in name
    for parameter in decayed["params"]:
        name = names[id(parameter)]
        assert name.endswith("weight") and "LayerNorm" not in name
    given = {names[id(p)] for group in (decayed, plain) for p in group["params"]}
    assert given == {name for name in names.values() if ".layer.11." not in name}
