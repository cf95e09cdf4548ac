"""Bad input of the sharder: one line on stderr, exit status 2, nothing written."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.data_prep.conftest import Run

TEXT = b"A first document.\n\nA second one.\n" * 2000


def text_file(folder: Path) -> Path:
    """A corpus that is fine."""
    path = folder / "fine.txt"
    path.write_bytes(TEXT)
    return path


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    """A maker of a file with that name and content."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def parquet(folder: Path, cut: bool = False, **columns: list[object]) -> Path:
    """A Parquet file with those columns, whole or cut off."""
    path = folder / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    if cut:
        path.write_bytes(path.read_bytes()[:-20])
    return path


def json_lines(*rows: object) -> Callable[[Path], Path]:
    """A maker of a file with those objects, one a line."""
    return written("x.jsonl", "\n".join(json.dumps(row) for row in rows).encode())


def empty_folder(folder: Path) -> Path:
    """A folder in which nothing is text."""
    (folder / "empty").mkdir()
    (folder / "empty" / "README.md").write_text("not a corpus")
    return folder / "empty"


BAD_INPUTS = {
    "missing path": (lambda folder: folder / "none.txt", "none.txt does not exist"),
    "unknown kind": (written("x.pdf", b"%PDF"), "x.pdf is of no kind"),
    "folder without text": (empty_folder, "has no file of a kind"),
    "invalid UTF-8": (written("x.txt", b"good\xff\n"), "x.txt, byte offset 4, is not UTF-8"),
    "UTF-16": (written("x.txt", "text".encode("utf-16")), "byte offset 0"),
    "not gzip": (written("x.txt.gz", b"plain text"), "x.txt.gz is damaged or cut off"),
    "gzip cut in its head": (written("x.txt.gz", gzip.compress(TEXT)[:15]), "damaged or cut off"),
    "zstd cut": (written("x.txt.zst", zstandard.compress(TEXT)[:30]), "damaged or cut off"),
    "Parquet cut": (lambda folder: parquet(folder, cut=True, text=["a"]), "no whole Parquet file"),
    "Parquet compressed": (written("x.parquet.gz", b""), "decompress it first"),
    "Parquet column": (lambda folder: parquet(folder, body=["a"]), "no column 'text', only body"),
    "numbers as text": (lambda folder: parquet(folder, text=[1]), "holds int, not text"),
    "JSON field": (json_lines({"body": "a"}), "line 1, has no column 'text', only body"),
    "JSON array": (written("x.json", b'[{"text": "a"}]'), "is not a JSON object"),
    "JSON cut": (written("x.jsonl", b'{"text": "a'), "line 1, is not a JSON object"),
    "JSON too deep": (written("x.jsonl", b"[" * 200_000), "line 1, is not a JSON object"),
    "lone surrogate": (written("x.jsonl", b'{"text": "\\ud800"}'), "line 1, is not UTF-8"),
}


def assert_one_line_error(done: object, message: str) -> None:
    """Exit status 2 and a single line on stderr that says `message`."""
    assert done.returncode == 2, done.stderr  # type: ignore[attr-defined]
    lines = done.stderr.strip().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert message in lines[0]


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_found_before_anything_is_loaded(
    case: str, tmp_path: Path, run_main: Run
) -> None:
    make, message = BAD_INPUTS[case]
    bad = make(tmp_path)
    arguments = ("--tokenizer", "never-loaded", "--output", tmp_path / "out")
    assert_one_line_error(run_main("--input", text_file(tmp_path), bad, *arguments), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_path_is_named(tmp_path: Path, run_main: Run) -> None:
    path = text_file(tmp_path)
    path.chmod(0)
    arguments = ("--tokenizer", "never-loaded", "--output", tmp_path / "out")
    assert_one_line_error(run_main("--input", path, *arguments), "fine.txt cannot be read")


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compression_cut_behind_the_head_is_named(
    kind: str, corpus: Path, tokenizer_folder: Path, tmp_path: Path, run_main: Run
) -> None:
    compress = {"gz": gzip.compress, "zst": zstandard.compress}[kind]
    path = tmp_path / f"x.txt.{kind}"
    path.write_bytes(compress(corpus.read_bytes())[:-1000])
    arguments = ("--tokenizer", tokenizer_folder, "--output", tmp_path / "out", "--workers", 1)
    done = run_main("--input", path, *arguments)
    assert done.returncode == 2
    assert f"error: {path} is damaged or cut off" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_output_inside_an_input_folder_and_the_reverse_are_refused(
    tmp_path: Path, run_main: Run
) -> None:
    text_file(tmp_path)
    (tmp_path / "sub").mkdir()
    for output in (tmp_path, tmp_path / "sub" / "out"):
        done = run_main("--input", tmp_path, "--tokenizer", "x", "--output", output)
        assert_one_line_error(done, f"--output {output} lies inside the input {tmp_path}")
    folder = tmp_path / "sub"
    done = run_main("--input", folder, "--tokenizer", "x", "--output", tmp_path)
    assert_one_line_error(done, f"the input {folder} lies inside --output {tmp_path}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tokenizer x", "--output is missing"),
        ("--output OUT", "give --tokenizer NAME_OR_DIR, or --train_tokenizer"),
        ("--output OUT --tokenizer x --seq_length 2", "--seq_length is 2"),
        ("--output OUT --tokenizer x --validation_fraction 1", "--validation_fraction is 1.0"),
        (f"--output OUT --tokenizer x --seed {2**64}", f"--seed is {2**64}; give 0 or more, below"),
        ("--output OUT --tokenizer x --workers 0", "--workers is 0"),
        ("--output OUT --tokenizer /no/such/folder", "/no/such/folder does not exist"),
        ("--output OUT --train_tokenizer 30", "--train_tokenizer is 30"),
        ("--output CORPUS --train_tokenizer 300", "is a file; give a folder"),
        ("--output FOLDER --train_tokenizer 300", "is not empty (it holds fine.txt)"),
    ],
)
def test_bad_usage_is_named(flags: str, message: str, tmp_path: Path, run_main: Run) -> None:
    corpus = text_file(tmp_path)
    places = {"OUT": tmp_path / "out", "CORPUS": corpus, "FOLDER": tmp_path}
    arguments = [places.get(word, word) for word in flags.split()]
    assert_one_line_error(run_main("--input", corpus, *arguments), message)


def test_an_empty_corpus_is_refused_and_the_folder_can_be_used_again(
    tmp_path: Path, run_main: Run, tokenizer_folder: Path, run_here: Callable[..., Path]
) -> None:
    path = tmp_path / "x.txt"
    path.write_text(" \n\n \n")
    arguments = ("--tokenizer", tokenizer_folder, "--output", tmp_path / "out", "--workers", 1)
    done = run_main("--input", path, *arguments)
    assert done.returncode == 2
    assert "x.txt; the corpus is empty" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    path.write_text("now there is text")
    assert (run_here(tmp_path / "out", path) / "manifest.json").exists()


@pytest.mark.parametrize("command", ["--verify", "--info"])
def test_a_folder_that_is_none_is_refused(command: str, tmp_path: Path, run_main: Run) -> None:
    assert_one_line_error(run_main(command, tmp_path), "has no manifest.json")


def test_verify_names_the_corrupted_file_and_info_tells_what_is_there(
    tmp_path: Path, run_program: Run, run_here: Callable[..., Path]
) -> None:
    output = run_here(tmp_path / "out", text_file(tmp_path))
    assert run_program("--verify", output).returncode == 0
    told = run_program("--info", output).stdout
    for word in ("2,001 documents", "padding", "fingerprint", "fine.txt", "one separator"):
        assert word in told
    shard = output / "train-00000-of-00001.h5"
    image = bytearray(shard.read_bytes())
    image[-1] ^= 1
    shard.write_bytes(image)
    assert_one_line_error(run_program("--verify", output), f"{shard.name} is corrupted")


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path: Path, run_main: Run) -> None:
    pytest.importorskip("datasets", reason="the library that reads data sets")
    parquet(tmp_path, body=["text"])
    (tmp_path / "set").mkdir()
    (tmp_path / "x.parquet").rename(tmp_path / "set" / "train.parquet")
    arguments = ("--tokenizer", "x", "--output", tmp_path / "out")
    done = run_main("--dataset", tmp_path / "set", *arguments)
    assert done.returncode == 2
    assert "has no column 'text', only body" in done.stderr.splitlines()[-1]
    done = run_main("--dataset", tmp_path / "set", "--split", "test", *arguments)
    assert done.returncode == 2
    assert "split test) cannot be loaded" in done.stderr.splitlines()[-1]


def test_help_teaches_with_an_example(run_program: Run) -> None:
    done = run_program("--help")
    assert done.returncode == 0
    assert "python data_prep/shard.py --input books/ wiki.jsonl.zst" in done.stdout
