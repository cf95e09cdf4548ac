"""What the sharder refuses in process: nothing is left behind, and damage is never built upon."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.shard import main, parse, shard
from potstill.errors import InputError
from potstill.files import read_sealed_json
from tests.chaos.shard_cases import build

Run = Callable[..., Path]


def test_a_refused_run_that_finished_nothing_leaves_nothing(
    run_here: Run, corpus: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(corpus.read_bytes()[:2000] + b"\n\xff\n")
    with pytest.raises(InputError, match="is not UTF-8"):
        run_here(tmp_path / "out", bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["journal", "settings.json", "train-00000.h5"])
def test_a_damaged_file_of_a_stopped_run_is_named_and_kept(name: str, tmp_path: Path) -> None:
    build(random.Random(0), tmp_path / "any")  # makes the material
    material, output = tmp_path / "shard-material", tmp_path / "shard-material" / "stopped"
    path = output / ".sharding" / name
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    before = path.read_bytes()
    words = ["--input", str(material / "broken.txt"), "--tokenizer", str(material / "tokenizer")]
    sizes = "--seq_length 32 --rows_per_shard 40 --workers 1".split()
    with pytest.raises(InputError, match=f"{name} .*another"):
        shard(parse([*words, "--output", str(output), *sizes]))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "words", [["--verify", "x", "--seq_length", "64"], ["--input", "x", "--split", "test"]]
)
def test_flags_that_would_be_passed_over_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "does nothing here" in capsys.readouterr().err


def test_settings_of_the_first_format_are_no_damage_and_nothing_is_to_be_deleted(
    run_here: Run, corpus: Path, tmp_path: Path
) -> None:
    settings = run_here(tmp_path / "out", corpus) / ".sharding" / "settings.json"
    settings.write_text(json.dumps(read_sealed_json(settings) | {"format_version": 1}))
    with pytest.raises(InputError, match="of format version 1, .*that is no damage: keep"):
        run_here(tmp_path / "out", corpus)
    settings.write_text("{}")
    with pytest.raises(InputError, match="settings.json cannot be used .*give another --output$"):
        run_here(tmp_path / "out", corpus)


def test_an_output_that_a_linked_folder_would_make_corpus_is_refused(
    corpus: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "far").symlink_to(corpus.parent)
    words = ["--input", str(tmp_path / "texts"), "--tokenizer", str(tokenizer_folder)]
    with pytest.raises(InputError, match="lies inside the input"):
        shard(parse([*words, "--output", str(corpus.parent / "out")]))


@pytest.mark.parametrize("name", ["", "a\nb.txt", "a\udcff.txt"])
def test_names_that_no_message_can_hold_are_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--input", name])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "is empty, not UTF-8 or has a control character" in line
