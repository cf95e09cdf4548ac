"""Single parts of the program: what is read of files and folders, and what a run's own hold."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.classifier import fingerprint
from finetune.results import claim, write_result
from finetune.settings import parse
from finetune.tables import read_rows
from potstill.errors import InputError


def test_a_long_text_of_a_csv_is_read_whole(tmp_path: Path) -> None:
    text = "word " * 60_000  # beyond the csv module's own limit of 131,072 characters
    (tmp_path / "a.csv").write_text(f"sentence,label\n{text},1\n")
    assert read_rows(tmp_path / "a.csv", ("sentence", "label"))[0] == {"sentence": text, "label": 1}


def test_the_description_of_an_unused_parquet_column_is_not_looked_at(tmp_path: Path) -> None:
    names = {"names": ["no", "yes"], "_type": "ClassLabel"}
    features = {"label": names, "other": {"_type": "OfANewerVersion"}}
    described = json.dumps({"info": {"features": features}})
    table = pa.table({"sentence": ["a", "b"], "label": [1, 0], "other": [None, None]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": described}), tmp_path / "a.parquet"
    )
    rows = read_rows(tmp_path / "a.parquet", ("sentence", "label"))
    assert rows.column_names == ["sentence", "label"]
    assert rows.features["label"].names == ["no", "yes"]


def test_the_fingerprint_is_of_files_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / "pytorch_model.bin").symlink_to("gone")
    (tmp_path / "gone.json").symlink_to("nowhere")
    (tmp_path / "notes.txt").mkdir()
    assert fingerprint(tmp_path) == before
    (tmp_path / "vocab.txt").write_text("a")
    assert fingerprint(tmp_path) != before


def test_names_with_joiners_and_narrow_spaces_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "می\u200cخواهم 1\u202f000"
    folder.mkdir()
    run, _, _ = parse(["--model", str(folder), "--task", "rte", "--output", str(folder / "run")])
    assert run.model == str(folder)
    with pytest.raises(InputError, match="line break"):
        parse(["--model", "a\nb", "--task", "rte", "--output", "run"])


def test_what_a_run_holds_of_its_settings_is_of_the_start_that_finished_it(tmp_path: Path) -> None:
    for accumulation in (1, 2):
        claim(tmp_path, {"lr": 1, "accumulation": accumulation}).release()
    write_result(tmp_path, {}, [])
    claim(tmp_path, {"lr": 1, "accumulation": 4}).release()
    assert json.loads((tmp_path / "config.json").read_text())["accumulation"] == 2


def test_a_runs_files_hold_no_secrets_and_it_is_found_again(tmp_path: Path) -> None:
    config = {"model": "m", "data": "https://me:pass@host/x", "password": 12345}
    claim(tmp_path / "run", config).release()
    write_result(tmp_path / "run", {"settings": config}, [])
    claim(tmp_path / "run", config).release()
    saved = "".join(path.read_text() for path in (tmp_path / "run").glob("*.json"))
    assert "12345" not in saved and "pass@" not in saved and "[redacted]" in saved
