"""The whole program on tiny teachers: what it learns and writes, what it stores and refuses."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune.distill import main, run_distillation
from finetune.distillation.models import plan_student
from finetune.distillation.settings import DistillSettings, FolderSettings, RecipeSettings
from finetune.results import read_result
from finetune.settings import DataSettings
from potstill.errors import InputError
from tests.finetune.distilled import tiny_classifier, write_pairs, write_scored, write_teacher

QUICK = ("--intermediate_epochs", "1", "--epochs", "1", "--lr", "1e-3", "--max_length", "32")
Distil = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of six layers with an MNLI head."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), "bert")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNLI's and STS-B's files, of rows of unequal lengths."""
    folder = tmp_path_factory.mktemp("data")
    return write_scored(write_pairs(folder))


@pytest.fixture
def distil(tmp_path: Path, teacher: Path, data: Path) -> Distil:
    """Run the program in this process on a new folder; gives its result."""

    def run(*flags: object, output: Path = tmp_path / "run", task: str = "mnli") -> dict[str, Any]:
        given = ["--task", task, "--data", str(data), *QUICK, "--output", str(output)]
        if "--teacher" not in flags:
            given += ["--teacher", str(teacher)]
        main([*given, *map(str, flags)])
        result = read_result(output)
        assert result is not None
        return result

    return run


@pytest.fixture
def refusal(
    distil: Distil, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Run the program, expecting status 2 and one line, which it gives."""

    def run(*flags: object, **where: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            distil(*flags, **where)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    return run


def stages(result: dict[str, Any]) -> dict[str, list[float]]:
    """The mean losses of each stage's epochs."""
    return {name: stage["losses"] for name, stage in result["distillation"]["stages"].items()}


@pytest.mark.parametrize(
    ("init", "layers", "pairs"),
    [
        ("paper-spread", None, [[1, 2], [2, 4], [3, 6]]),
        ("paper-mixed", None, [[1, 1], [2, 4], [3, 6]]),
        ("paper-lower", None, [[1, 1], [2, 2], [3, 3]]),
        ("1,5", None, [[1, 1], [2, 5]]),
        ("last", None, [[1, 4], [2, 5], [3, 6]]),
        ("random", None, [[1, 2], [2, 4], [3, 6]]),
        ("first", "last", [[3, 6]]),
        ("first", "1:3,3:5", [[1, 3], [3, 5]]),
    ],
)
def test_a_layer_learns_from_the_one_it_started_from_unless_told(
    init: str, layers: str | None, pairs: list[list[int]]
) -> None:
    plan = plan_student(RecipeSettings(init=init, layers=layers), 6)
    assert [list(pair) for pair in plan.pairs] == pairs


def test_the_papers_choices_for_twelve_layers_are_table_3s() -> None:
    named = ("paper-spread", "paper-mixed", "paper-lower")
    copied = [plan_student(RecipeSettings(init=name), 12).copied for name in named]
    assert copied == [(4, 8, 12), (1, 8, 12), (1, 2, 3)]


def test_a_run_leaves_a_model_that_opens_anywhere_and_scores_as_it_says(
    distil: Distil, tmp_path: Path, data: Path
) -> None:
    result = distil("--objective", "hid-seq", "--init", "1,2,3")
    assert result["distillation"]["layers"] == [[1, 1], [2, 2], [3, 3]]
    assert result["task"] == "mnli" and result["last"]["epoch"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    rows = pq.read_table(data / "mnli/validation_matched.parquet").to_pydict()
    batch = tokenizer(rows["premise"], rows["hypothesis"], padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = model(**batch).logits.argmax(-1)
    accuracy = (answers == torch.tensor(rows["label"])).double().mean().item()
    assert accuracy == result["last"]["scores"]["validation_matched"]["accuracy"]
    facts = json.loads((tmp_path / "run/model/potstill.json").read_text())
    assert facts["distillation"]["objective"] == "hid-seq"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", ["att-mse", "hid-seq+att-kl", "hid-cls-contrast"])
def test_stored_features_give_the_losses_of_the_live_teacher(
    distil: Distil, tmp_path: Path, objective: str, precision: str
) -> None:
    flags = ("--objective", objective, "--precision", precision, "--intermediate_epochs", "2")
    live = distil(*flags, output=tmp_path / "live")
    store = ("--teacher_features", tmp_path / "store")
    stored = distil(*flags, *store, output=tmp_path / "stored")
    for name, losses in stages(live).items():
        # not bit by bit: a row's padding, and so the kernels' sums, differ where it is stored
        tolerance = 1e-5 if precision == "fp32" else 1e-2
        assert stages(stored)[name] == pytest.approx(losses, rel=tolerance)


def test_with_stored_features_the_teacher_does_not_run(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ("--teacher_features", tmp_path / "store")
    first = distil(*store, output=tmp_path / "first")
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}

    def runs(*_: object) -> None:
        raise AssertionError("the teacher ran")

    for name in ("features", "logits"):
        monkeypatch.setattr(f"finetune.distillation.models.LiveTeacher.{name}", runs)
    again = distil(*store, output=tmp_path / "again")
    assert stages(first) == stages(again)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == kept


def test_another_objective_adds_its_features_to_the_store(distil: Distil, tmp_path: Path) -> None:
    store = ("--teacher_features", tmp_path / "store")
    distil("--objective", "att-mse", *store, output=tmp_path / "a")
    assert {path.stem for path in (tmp_path / "store").glob("*.bin")} == {
        *(f"{kind}-{layer}" for kind in ("query", "key") for layer in (2, 4, 6)),
        "logits",
    }
    distil("--objective", "hid-seq", "--init", "1,2", *store, output=tmp_path / "b")
    added = {"hidden-1", "hidden-2"}
    assert added <= {path.stem for path in (tmp_path / "store").glob("*.bin")}


def test_a_store_of_other_features_is_refused_by_name(
    distil: Distil, refusal: Callable[..., str], tmp_path: Path
) -> None:
    store = ("--teacher_features", tmp_path / "store")
    distil(*store, output=tmp_path / "a")
    other = write_teacher(tmp_path / "other", "bert", layers=5)
    flags = ("--teacher", other, "--init", "1,2", *store)
    assert "teacher_sha256 is" in refusal(*flags, output=tmp_path / "b")
    said = refusal(*store, "--precision", "bf16", output=tmp_path / "c")
    assert "precision is 'float32' there and 'bfloat16' here" in said
    said = refusal(*store, "--max_train_rows", "20", output=tmp_path / "d")
    assert "rows is 48 there and 20 here" in said


def test_a_damaged_store_is_refused(
    distil: Distil, refusal: Callable[..., str], tmp_path: Path
) -> None:
    store = ("--teacher_features", tmp_path / "store")
    distil(*store, output=tmp_path / "a")
    path = tmp_path / "store/key-4.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert "key-4.bin: damaged or missing; remove" in refusal(*store, output=tmp_path / "b")


def test_a_folder_of_other_files_is_no_store(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    assert "no store of features" in refusal("--teacher_features", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]
    said = refusal("--teacher_features", tmp_path / "mine/letter.txt")
    assert said.startswith("error: --teacher_features") and "is no folder" in said
    said = refusal("--tokenised", tmp_path / "mine/letter.txt")
    assert said.startswith("error: --tokenised") and "is no folder" in said
    assert not (tmp_path / "run").exists()  # found before anything long


def test_an_objective_of_the_users_own_on_an_mlm_head_is_refused(
    refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from pretrain.objectives.prediction import KD\n\n\nclass Mine(KD):\n    pass\n"
    (tmp_path / "their_objectives.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert "Mine learns from an MLM head" in refusal("--objective", "their_objectives:Mine")


@pytest.mark.parametrize("own", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}])
def test_a_teacher_that_would_be_walked_wrongly_is_refused(
    refusal: Callable[..., str], tmp_path: Path, own: dict[str, Any]
) -> None:
    teacher = write_teacher(tmp_path / "teacher", "bert")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | own))
    assert next(iter(own)) in refusal("--teacher", teacher, "--objective", "hid-seq")


@pytest.mark.parametrize("family", ["roberta", "electra"])
def test_each_shape_of_model_is_distilled(distil: Distil, tmp_path: Path, family: str) -> None:
    teacher = write_teacher(tmp_path / "teacher", family)
    result = distil("--teacher", teacher, "--objective", "att-mse+hid-seq", "--epochs", "3")
    losses = stages(result)["prediction"]
    assert losses[-1] < losses[0]


def test_a_regression_learns_the_teachers_numbers(distil: Distil, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", "bert", labels=1)
    flags = ("--teacher", teacher, "--epochs", "8", "--init", "first", "--student_layers", "5")
    result = distil(*flags, task="stsb")
    losses = stages(result)["prediction"]
    assert losses[-1] < losses[0] / 2
    assert result["main"] == {"split": "validation", "metric": "pearson"}


def test_vanilla_kd_has_no_intermediate_stage(distil: Distil) -> None:
    assert list(stages(distil("--objective", "vanilla-kd"))) == ["prediction"]


def test_a_narrower_student_of_its_own_learns_through_projections(
    distil: Distil, refusal: Callable[..., str], teacher: Path, tmp_path: Path
) -> None:
    own = write_teacher(tmp_path / "own", "bert", layers=2, hidden_size=24)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(own)
    result = distil("--student", own, "--objective", "hid-seq")
    assert result["distillation"]["layers"] == [[1, 3], [2, 6]]
    assert result["settings"]["student_sha256"]
    foreign = write_teacher(tmp_path / "foreign", "roberta", layers=2)
    said = refusal("--student", foreign, output=tmp_path / "no")
    assert "its tokenizer is not the teacher's" in said
    untyped = write_teacher(tmp_path / "untyped", "bert", layers=2, type_vocab_size=1)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(untyped)
    assert "only one of them has token types" in refusal("--student", untyped)


def test_what_a_student_of_its_own_would_ignore_is_refused(
    refusal: Callable[..., str], teacher: Path, tmp_path: Path
) -> None:
    assert "has its own layers; leave --init out" in refusal("--student", teacher, "--init", "1,2")
    said = refusal("--student", teacher, "--student_layers", "2")
    assert "has its own layers; leave --student_layers out" in said
    headless, _ = tiny_classifier("bert", layers=2)
    headless.bert.save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(tmp_path / "headless")
    said = refusal("--student", tmp_path / "headless", "--epochs", "0")
    assert "has no trained" in said and "only stage 2 trains it" in said


def test_a_finished_run_is_read_and_another_one_refused(
    distil: Distil, refusal: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = distil()
    assert distil() == first
    assert "finished already" in capsys.readouterr().out
    assert "seed is 0 there and 1 here" in refusal("--seed", "1")


def test_the_same_seed_gives_the_same_student(distil: Distil, tmp_path: Path) -> None:
    one, same, other = (
        stages(distil("--seed", seed, output=tmp_path / str(number)))
        for number, seed in enumerate(("1", "1", "2"))
    )
    assert one == same
    assert one != other


def test_the_log_tells_the_stages_apart_and_counts_their_steps_on(
    distil: Distil, tmp_path: Path
) -> None:
    distil("--batch_size", "16")
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    trained = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert trained == [
        *(("intermediate", n) for n in (1, 2, 3)),
        *(("prediction", n) for n in (4, 5, 6)),
    ]
    assert "eval_validation_matched_accuracy" in lines[-2]


def test_on_epoch_may_end_the_second_stage(teacher: Path, data: Path, tmp_path: Path) -> None:
    asked = []

    def on_epoch(epoch: int, score: float | None) -> bool:
        asked.append(epoch)
        return epoch < 2

    settings = DistillSettings(
        FolderSettings(str(teacher), str(tmp_path / "run")),
        DataSettings(task="mnli", data=str(data), max_length=32),
        RecipeSettings(intermediate_epochs=1, epochs=5),
    )
    assert run_distillation(settings, on_epoch)["last"]["epoch"] == 2
    assert asked == [1, 2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--objective", "kd"), "kd learns from an MLM head"),
        (("--objective", "distilbert"), "distilbert: kd learns from an MLM head"),
        (("--objective", "att-mse+vanilla-kd"), "vanilla-kd: kd learns from an MLM head"),
        (("--objective", "att-msee"), "nearest: att-mse"),
        (("--init", "1,2,9"), "the teacher's layers are 1 to 6"),
        (("--init", "paper-middle"), "there are paper-spread, paper-mixed, paper-lower"),
        (("--init", "1,2", "--student_layers", "3"), "names 2 teacher layers"),
        (("--layers", "1:9"), "out of range"),
        (("--layers", "0:0"), "layer 0"),
        (("--temperature", "0"), "--temperature 0.0"),
        (("--epochs", "-1"), "--epochs -1"),
        (("--batch_size", "16", "--accumulation", "3"), "does not divide --batch_size 16"),
        (("--objective", "minilmv2", "--relation_heads", "5"), "relation_heads"),
        (("--nonsense", "1"), "unknown arguments: --nonsense"),
    ],
)
def test_bad_usage_is_refused_in_one_line(
    refusal: Callable[..., str], flags: tuple[str, ...], said: str
) -> None:
    assert said in refusal(*flags)


def test_a_teacher_that_is_none_is_refused(
    refusal: Callable[..., str], bert: Path, tmp_path: Path
) -> None:
    assert "--teacher" in refusal("--teacher", tmp_path / "nowhere")
    assert "it has no head; fine-tune it on the task first" in refusal("--teacher", bert)
    said = refusal("--teacher", write_teacher(tmp_path / "two", "bert", labels=2))
    assert "has 2 outputs" in said and "--model" not in said


def test_names_of_the_paper_need_its_depth(refusal: Callable[..., str], tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "four", "bert", layers=4)
    assert "teachers of 12 or 6 layers, this one has 4" in refusal("--teacher", teacher)


def test_spans_are_refused() -> None:
    with pytest.raises(InputError, match="--task squad"):
        DistillSettings(FolderSettings("a", "b"), DataSettings(task="squad"), RecipeSettings())


def test_a_run_waits_for_whoever_fills_the_store_and_a_signal_ends_it_in_order(
    distil: Distil, tmp_path: Path, teacher: Path, data: Path, repository: Path
) -> None:
    command = [sys.executable, str(repository / "finetune/distill.py"), "--teacher", str(teacher)]
    command += ["--task", "mnli", "--data", str(data), *QUICK, "--output", str(tmp_path / "run")]
    store = ("--teacher_features", str(tmp_path / "store"))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    (tmp_path / "store").mkdir()
    with ExitStack() as held:
        lock = held.enter_context(open(tmp_path / "store/.lock", "a"))
        fcntl.lockf(lock, fcntl.LOCK_EX)
        run = held.enter_context(
            subprocess.Popen(
                [*command, *store, "--intermediate_epochs", "5000"],
                stderr=subprocess.PIPE,
                env=environment,
            )
        )
        _await(tmp_path / "run/config.json", run)
        time.sleep(1)
        assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]
        lock.close()
        _await(tmp_path / "store/logits.json", run)
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert b"stopped by SIGTERM" in said
    assert not (tmp_path / "run/result.json").exists()
    distil(*store, output=tmp_path / "other")  # what it stored is whole


def _await(path: Path, run: subprocess.Popen[bytes]) -> None:
    while not path.exists():
        assert run.poll() is None
        time.sleep(0.1)


def test_two_stages_bring_a_cut_teacher_back_to_its_answers_on_rte(
    distil: Distil, tmp_path: Path, real_data: Path
) -> None:
    teacher = write_teacher(tmp_path / "teacher", "bert", labels=2)
    _name_outputs(teacher, ["entailment", "not_entailment"])
    flags = ("--teacher", teacher, "--data", real_data / "glue", "--objective", "att-mse+hid-seq")
    flags += ("--max_train_rows", "300", "--max_validation_rows", "100", "--max_length", "64")
    flags += ("--init", "1,2,3,4,5", "--lr", "3e-3")
    for epochs, name in ((0, "cut"), (3, "distilled")):
        counts = ("--intermediate_epochs", epochs, "--epochs", epochs)
        distil(*flags, *counts, task="rte", output=tmp_path / name)
    rows = pq.read_table(real_data / "glue/rte/validation.parquet").slice(0, 100).to_pydict()
    answers = {
        name: _answers(tmp_path / folder, rows)
        for name, folder in (("t", "teacher"), ("cut", "cut/model"), ("new", "distilled/model"))
    }
    cut = (answers["cut"] - answers["t"]).abs().mean()
    distilled = (answers["new"] - answers["t"]).abs().mean()
    assert distilled < 0.7 * cut


def _name_outputs(folder: Path, names: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(names))
    config["label2id"] = {name: place for place, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))


def _answers(folder: Path, rows: dict[str, list[str]]) -> torch.Tensor:
    """Probabilities of the first class, (rows,)."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        rows["sentence1"],
        rows["sentence2"],
        padding=True,
        truncation=True,
        max_length=64,
        return_tensors="pt",
    )
    with torch.no_grad():
        return model(**batch).logits.softmax(-1)[:, 0]
