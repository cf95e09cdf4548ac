"""Each fault of the user's through the real program: status 2, one line with the remedy."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from safetensors.torch import load_file, save_file
from transformers import ViTConfig

from finetune.results import claim
from finetune.trial import use_one_device
from potstill.errors import InputError
from tests.finetune.conftest import mnli_rows, run_program, write_parquet

NAMES = ["entailment", "neutral", "contradiction"]
Refusal = Callable[..., str]


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """An MNLI folder that is whole."""
    for split in ("train", "validation_matched"):
        write_parquet(tmp_path / f"glue/mnli/{split}.parquet", mnli_rows(6, NAMES), NAMES)
    return tmp_path / "glue"


@pytest.fixture
def copied(bert: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(bert, tmp_path / "copied"))


def own(tmp_path: Path, train: str, validation: str | None = None, kind: str = "csv") -> list[str]:
    """Flags for files with these contents."""
    for name, text in (("train", train), ("validation", validation or train)):
        (tmp_path / f"{name}.{kind}").write_text(text)
    return [
        "--train_file",
        f"{tmp_path}/train.{kind}",
        "--validation_file",
        f"{tmp_path}/validation.{kind}",
    ]


def test_the_real_program_prints_one_line_and_exits_with_2(
    repository: Path, bert: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "finetune/run.py",
            "--model",
            str(bert),
            "--task",
            "rtte",
            "--output",
            str(tmp_path / "run"),
        ],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: --task rtte: unknown; did you mean rte?"
    assert "Traceback" not in done.stderr


def test_a_missing_model_is_named(refusal: Refusal, tmp_path: Path) -> None:
    assert "gone: no such folder" in refusal("--model", tmp_path / "gone", "--task", "rte")


def test_a_missing_data_folder_is_named(refusal: Refusal, bert: Path, tmp_path: Path) -> None:
    line = refusal("--model", bert, "--task", "rte", "--data", tmp_path)
    assert "no folder rte/" in line


def test_a_missing_validation_file_is_named(refusal: Refusal, bert: Path, glue: Path) -> None:
    (glue / "mnli/validation_matched.parquet").unlink()
    line = refusal("--model", bert, "--task", "mnli", "--data", glue)
    assert "validation_matched.parquet: no such file" in line


def test_a_truncated_parquet_is_named(refusal: Refusal, bert: Path, glue: Path) -> None:
    train = glue / "mnli/train.parquet"
    train.write_bytes(train.read_bytes()[:-20])
    line = refusal("--model", bert, "--task", "mnli", "--data", glue)
    assert "train.parquet: not a whole Parquet file" in line


def test_a_missing_column_is_named(refusal: Refusal, bert: Path, glue: Path) -> None:
    rows = mnli_rows(6, NAMES)
    del rows["hypothesis"]
    write_parquet(glue / "mnli/train.parquet", rows, NAMES)
    line = refusal("--model", bert, "--task", "mnli", "--data", glue)
    assert "no column 'hypothesis'" in line


def test_an_unlabelled_split_is_refused(refusal: Refusal, bert: Path, glue: Path) -> None:
    rows = mnli_rows(6, NAMES) | {"label": [0, 1, 2, -1, 0, 1]}
    write_parquet(glue / "mnli/validation_matched.parquet", rows, NAMES)
    line = refusal("--model", bert, "--task", "mnli", "--data", glue)
    assert "row 3 has label -1, outside 0…2" in line


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        ("", None, "no rows"),
        ("text,class\nhello,1\n", None, "none of the columns sentence"),
        ("sentence,label\n", None, "no rows"),
        ("text,label\nhello,1\n", None, "no text column"),
        ("sentence,class\nhello,1\n", None, "no column 'label'"),
        ("sentence,label\nhello,1\nagain,1\n", None, "every label is 1"),
        ("sentence,label\nhello,1\nagain\n", None, "line 3 has 1 fields, the header 2"),
        ("sentence,label\nhello,\nagain,b\n", None, "row 0 has no label"),
        ("sentence,label\nx,a\ny,b\n", "sentence,label\nx,a\ny,c\n", "row 1 has label 'c'"),
        ("sentence,label\nx,a\ny, \n", None, "row 1 has no label"),
        ("sentence,label\nx,0.5\ny,nan\n", None, "row 1 has label nan"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(
    refusal: Refusal, bert: Path, tmp_path: Path, train: str, validation: str | None, said: str
) -> None:
    assert said in refusal("--model", bert, *own(tmp_path, train, validation))


def test_a_broken_line_of_json_is_named(refusal: Refusal, bert: Path, tmp_path: Path) -> None:
    text = '{"sentence": "x", "label": 0}\n{"sentence": "y", "label": \n'
    assert "line 2 is not JSON" in refusal("--model", bert, *own(tmp_path, text, kind="jsonl"))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_text_that_is_not_utf8_is_named_with_its_byte(
    refusal: Refusal, bert: Path, tmp_path: Path, kind: str, start: bytes
) -> None:
    flags = own(tmp_path, "", kind=kind)
    before = start + b"sentence,label\n" + b"yes,1\n" * 50_000  # more than a block of any decoder
    (tmp_path / f"train.{kind}").write_bytes(before + b"na\xefve,1\n")
    line = refusal("--model", bert, *flags)
    assert f"train.{kind}: not UTF-8 (byte {len(before) + 2})" in line


@pytest.mark.parametrize("label", ["[1, 2]", "[0.5]", '{"a": 1}'])
def test_a_label_that_is_no_single_value_is_refused(
    refusal: Refusal, bert: Path, tmp_path: Path, label: str
) -> None:
    text = f'{{"sentence": "x", "label": {label}}}\n' * 2
    line = refusal("--model", bert, *own(tmp_path, text, kind="jsonl"))
    assert "give strings, integers or floats" in line


def test_a_text_that_would_fill_the_memory_is_named_by_its_row(
    refusal: Refusal, bert: Path, tmp_path: Path
) -> None:
    rows = [{"sentence": "x", "label": 0}, {"sentence": "x " * 600_000, "label": 1}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    line = refusal("--model", bert, *own(tmp_path, text, kind="jsonl"))
    assert "row 1 has a text of 1200000 characters" in line


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        ("sentence,sentence,label\na,b,1\nc,d,2\n", "csv", "2 columns are called 'sentence'"),
        ('{"sentence": "a", "sentence": "b", "label": 1}\n', "jsonl", "stands twice"),
        ('{"sentence": "\\ud800", "label": 1}\n', "jsonl", "no column can hold"),
        ('{"sentence": "a", "label": ' + "9" * 40 + "}\n", "jsonl", "no column can hold"),
        ("[" * 100_000, "jsonl", "line 1 is not JSON"),
        ("sentence,label\na,1e300\nb,0.5\n", "csv", "give numbers up to 1e+15"),
    ],
)
def test_what_no_column_can_hold_is_named(
    refusal: Refusal, bert: Path, tmp_path: Path, text: str, kind: str, said: str
) -> None:
    assert said in refusal("--model", bert, *own(tmp_path, text, kind=kind))


def test_a_parquet_whose_metadata_asks_to_open_other_files_is_refused(
    refusal: Refusal, bert: Path, glue: Path
) -> None:
    train = glue / "mnli/train.parquet"
    columns = mnli_rows(6, NAMES) | {"premise": [{"path": "/etc/hostname", "bytes": None}] * 6}
    features = Features(
        {"premise": Image(), "hypothesis": Value("string"), "label": ClassLabel(names=NAMES)}
    )
    pq.write_table(pa.table(columns, schema=features.arrow_schema), train)
    line = refusal("--model", bert, "--task", "mnli", "--data", glue)
    assert f"{train}: column 'premise' is Image(" in line


def test_words_are_no_numbers_for_a_regression(
    refusal: Refusal, bert: Path, tmp_path: Path
) -> None:
    flags = own(tmp_path, "sentence,label\nx,good\ny,bad\n")
    assert "'good', not a number" in refusal("--model", bert, *flags, "--regression")


def test_a_model_without_tokenizer_is_refused(refusal: Refusal, copied: Path, glue: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert f"{copied}: no tokenizer in it; copy" in line


# a model that the library does not know, and one that has no classifier in it
@pytest.mark.parametrize("model_type", ["theirs", "dpr"])
def test_a_folders_own_code_never_runs(
    refusal: Refusal,
    copied: Path,
    glue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    (copied / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    classes = {"AutoConfig": "theirs.C", "AutoModelForSequenceClassification": "theirs.M"}
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": classes}
    (copied / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    line = refusal("--model", copied, "--task", "mnli", "--data", glue, "--max_length", "32")
    assert f"--model {copied}: " in line
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\n"  # nobody was asked


def test_code_of_a_folder_is_refused_by_name(refusal: Refusal, copied: Path, glue: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "a.B"}}))
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert "auto_map {'AutoModel': 'a.B'}: it names Python code of its own" in line


class Trap:
    """Pickled, it would write a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_never_opened(
    refusal: Refusal, copied: Path, glue: Path, tmp_path: Path
) -> None:
    (copied / "model.safetensors").unlink()
    torch.save(Trap(tmp_path / "opened"), copied / "pytorch_model.bin")
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert "its weights are a pickle (pytorch_model.bin)" in line
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("name", ["../theirs.safetensors", "..", "w.bin", "/w.safetensors"])
def test_an_index_of_weights_leads_to_safetensors_in_the_folder_only(
    refusal: Refusal, copied: Path, glue: Path, tmp_path: Path, name: str
) -> None:
    (copied / "model.safetensors").unlink()
    torch.save(Trap(tmp_path / "opened"), copied / "w.bin")
    index = {"weight_map": {"bert.embeddings.word_embeddings.weight": name}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert f"model.safetensors.index.json has {name} where" in line
    assert not (tmp_path / "opened").exists()


def test_a_missing_piece_of_the_weights_is_named(
    refusal: Refusal, copied: Path, glue: Path
) -> None:
    (copied / "model.safetensors").unlink()
    index = {"weight_map": {"bert.embeddings.word_embeddings.weight": "model-1-of-2.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert "model-1-of-2.safetensors is missing" in line


def test_a_model_of_images_is_refused_by_its_type(
    refusal: Refusal, copied: Path, glue: Path
) -> None:
    ViTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2).save_pretrained(copied)
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert "model type 'vit' with vocab_size None embeds no words" in line


def test_a_full_folder_for_temporary_files_is_not_blamed_on_the_model(
    refusal: Refusal, bert: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    line = refusal("--model", bert, "--task", "mnli", "--data", glue, "--max_length", "32")
    assert "folder for temporary files" in line and "TMPDIR" in line and "--model" not in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, more than 1000"),
        ({"num_labels": 10**10}, "num_labels 10000000000, more than 100000"),
        ({"intermediate_size": 10**8}, "config.json describes 1.3e+10 weights"),
        ({"num_hidden_layers": 1}, "weights belong to layers that config.json does not have"),
        ({"hidden_act": "nope"}, "config.json cannot be used (KeyError: 'nope')"),
        ({"layer_norm_eps": float("nan")}, "the number NaN is not finite"),
        ({"layer_norm_eps": -1e9}, "its outputs are not finite"),
        ({"chunk_size_feed_forward": 4}, "cannot compute a row (ValueError"),
        (
            {"id2label": {"0": "a", "7": "b"}, "architectures": ["BertForSequenceClassification"]},
            "1",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    refusal: Refusal, copied: Path, glue: Path, change: dict[str, object], said: str
) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | change))
    flags = ("--task", "mnli", "--data", glue, "--max_length", "32")
    assert said in refusal("--model", copied, *flags)


def test_weights_that_are_not_finite_are_named(refusal: Refusal, copied: Path, glue: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.bias"
    weights[name][3] = float("nan")
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    line = refusal("--model", copied, "--task", "mnli", "--data", glue, "--max_length", "32")
    assert f"{name} holds numbers that are not finite" in line


def test_a_damaged_potstill_json_is_found_before_the_training(
    refusal: Refusal, copied: Path, glue: Path
) -> None:
    (copied / "potstill.json").write_text("{")
    line = refusal("--model", copied, "--task", "mnli", "--data", glue, "--max_length", "32")
    assert "potstill.json cannot be read" in line


def test_a_tokenizer_of_another_model_is_refused(
    refusal: Refusal, copied: Path, glue: Path
) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert "the tokenizer has 400 words, the model embeds 99" in line


def test_missing_encoder_weights_are_refused(refusal: Refusal, copied: Path, glue: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    lost = "bert.encoder.layer.1.attention.self.query.weight"
    del weights[lost]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    line = refusal("--model", copied, "--task", "mnli", "--data", glue, "--max_length", "32")
    assert f"1 encoder weights are missing, {lost} first" in line


def test_truncated_weights_are_refused(refusal: Refusal, copied: Path, glue: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in refusal("--model", copied, "--task", "mnli", "--data", glue)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_max_length_beyond_the_positions_is_refused(
    refusal: Refusal, request: pytest.FixtureRequest, glue: Path, kind: str
) -> None:
    model = request.getfixturevalue(kind)  # RoBERTa embeds 66, of which the first two are padding's
    line = refusal("--model", model, "--task", "mnli", "--data", glue, "--max_length", "65")
    assert "the model has 64 positions" in line


def test_a_head_for_another_task_is_refused(refusal: Refusal, copied: Path, glue: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    config |= {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "bad", "1": "good"},
        "label2id": {"bad": 0, "good": 1},
    }
    (copied / "config.json").write_text(json.dumps(config))
    line = refusal("--model", copied, "--task", "mnli", "--data", glue)
    assert "2 outputs (bad, good)" in line


def test_evaluating_without_a_trained_head_is_refused(
    refusal: Refusal, bert: Path, glue: Path
) -> None:
    line = refusal(
        "--model", bert, "--task", "mnli", "--data", glue, "--epochs", "0", "--max_length", "32"
    )
    assert "no trained" in line


def test_a_folder_with_other_files_is_refused(
    refusal: Refusal, bert: Path, glue: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep me")
    line = refusal(
        "--model",
        bert,
        "--task",
        "mnli",
        "--data",
        glue,
        "--max_length",
        "32",
        output=tmp_path / "mine",
    )
    assert "not empty and not a fine-tuning run" in line


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_run_is_kept_and_named_before_anything_is_read(
    bert: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / name).write_text('{"cut')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.trial.head_for", lambda *_: pytest.fail("the data was read"))
        with pytest.raises(SystemExit):
            run_program(("--model", bert, "--task", "rte"), run)
    assert f"error: {run / name}: cannot be read" in capsys.readouterr().err
    assert (run / name).read_text() == '{"cut'


def test_a_folder_in_which_another_process_fine_tunes_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = f"from finetune.results import Path, claim; lock = claim(Path({str(run)!r}), {{}})"
    with subprocess.Popen(
        [sys.executable, "-c", f"{child}; input()"], stdin=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        while not (run / "config.json").exists():
            assert other.poll() is None
            time.sleep(0.05)
        (run / ".model.7.part").mkdir()
        with pytest.raises(InputError, match=f"another process fine-tunes there.*{other.pid}"):
            claim(run, {})
        assert (run / ".model.7.part").is_dir()
        other.stdin.write(b"\n")
        other.stdin.close()
    claim(run, {}).release()
    assert not (run / ".model.7.part").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, status: int
) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("finetune.trial.head_for", stopped)
        run_program(("--model", bert, "--task", "rte"), tmp_path / "run")
    assert stop.value.code == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "run the same command again" in lines[0]


@pytest.mark.parametrize("place", ["file", "file/run", "file/run/deeper"])
def test_an_output_that_cannot_be_is_refused(
    refusal: Refusal, bert: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("somebody's")
    line = refusal("--model", bert, "--task", "rte", "--data", "gone", output=tmp_path / place)
    assert line.startswith("error: --output ")
    assert (tmp_path / "file").read_text() == "somebody's"


@pytest.mark.parametrize(
    "flags",
    [
        *(["--lr", "0"], ["--batch_size", "0"], ["--warmup", "1.5"], ["--max_length", "0"]),
        *(["--lr", "nan"], ["--seed", str(2**32)], ["--epochs", "9" * 20], ["--no"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    refusal: Refusal, bert: Path, flags: list[str]
) -> None:
    assert flags[0] in refusal("--model", bert, "--task", "rte", *flags)


@pytest.mark.parametrize(
    ("built", "before", "after"),
    [
        (True, "2,3", "2"),
        (True, "", ""),
        (True, None, "0"),
        (False, "2,3", "2,3"),
        (False, None, None),
    ],
)
def test_only_a_build_for_gpus_hides_all_but_the_first(
    monkeypatch: pytest.MonkeyPatch, built: bool, before: str | None, after: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")  # so that it is restored
    if before is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    use_one_device()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == after


def test_a_run_in_this_process_leaves_the_gpus_to_the_others(
    refusal: Refusal, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    before = dict(os.environ)
    refusal("--model", bert, "--task", "rte", "--data", tmp_path)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before.get("CUDA_VISIBLE_DEVICES")
