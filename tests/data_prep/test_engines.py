"""Tokie: the same tokens as `tokenizers`, or a refusal; unusual text never reaches it."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.engines import (
    INSTALL_TOKIE,
    PROVEN_CHARACTERS,
    TOKIE_VERSION,
    TokieEncoder,
    check_engine,
    check_kind,
    compare,
    samples,
    unusual_text,
)
from data_prep.shard import parse, shard
from data_prep.tokenization import EncoderSettings, TextEncoder, encoder_settings, load_tokenizer
from potstill.errors import InputError

LITERALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [chr(c) for first, last in PROVEN_CHARACTERS for c in range(first, last + 1)]
STRANGE = ["\x7f", "\u0378", "\u061d", "\u2e52", "\U0002b820", "\u4e00", "\u200b", *LITERALS]
needs_tokie = pytest.mark.skipif(
    "tokie" not in {package.name for package in importlib.metadata.distributions()},
    reason="the optional extra potstill[tokie] is not installed",
)


@pytest.fixture(scope="module")
def bert(tokenizer_folder: Path) -> EncoderSettings:
    """A BERT WordPiece tokenizer, learned from prose."""
    return encoder_settings(load_tokenizer(tokenizer_folder))


@pytest.fixture(scope="module")
def engines(bert: EncoderSettings) -> tuple[TokieEncoder, TextEncoder]:
    """Both encoders of the same tokenizer."""
    return TokieEncoder(*bert), TextEncoder(*bert)


@needs_tokie
@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from(LETTERS), max_size=60), min_size=1, max_size=8))
def test_usual_text_gets_the_same_tokens_from_tokie(
    engines: tuple[TokieEncoder, TextEncoder], texts: list[str]
) -> None:
    assert engines[0].ids(texts) == engines[1].ids(texts)


@needs_tokie
@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=9), st.sampled_from(STRANGE)), min_size=1, max_size=30))
def test_any_text_gets_the_same_tokens_in_order(
    engines: tuple[TokieEncoder, TextEncoder], parts: list[str]
) -> None:
    texts = [*parts, "".join(parts), " ".join(parts)]
    found, expected = (engine.encode(texts) for engine in engines)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


@needs_tokie
def test_real_vocabulary_and_prose_pass_the_check(
    bert: EncoderSettings, real_data: Path, documents: list[str]
) -> None:
    check_engine(bert, "tokie")
    settings = encoder_settings(load_tokenizer(real_data / "vocab" / "bert-base-uncased"))
    check_engine(settings, "tokie")
    compare(TokieEncoder(*settings), TextEncoder(*settings), documents)


@needs_tokie
def test_both_engines_make_the_same_bytes(
    run_here: Callable[..., Path],
    digests: Callable[[Path], dict[str, str]],
    corpus: Path,
    tmp_path: Path,
) -> None:
    strange = tmp_path / "strange.txt"
    strange.write_text("\n\n".join(f"the {text} function" for text in STRANGE), encoding="utf-8")
    folders = [
        run_here(tmp_path / engine, corpus, strange, flags=f"--workers 1 --engine {engine}")
        for engine in ("tokenizers", "tokie")
    ]
    assert digests(folders[0]) == digests(folders[1])


@needs_tokie
def test_a_difference_in_the_start_check_is_refused(bert: EncoderSettings) -> None:
    class Careless(TokieEncoder):
        def is_usual(self, text: str) -> bool:
            return True

    with pytest.raises(InputError, match=r"other tokens than tokenizers for 'the \[SEP\]'"):
        compare(Careless(*bert), TextEncoder(*bert), ["the function", "the [SEP]"])


@pytest.mark.parametrize("text", STRANGE)
def test_unusual_text_is_recognised(text: str) -> None:
    assert unusual_text(LITERALS).search(f"the {text} x")


def test_the_table_of_characters_is_usual_and_all_of_it_is_checked() -> None:
    pattern = unusual_text(LITERALS)
    assert not pattern.search("".join(LETTERS))
    assert not pattern.search("a [sep] [ SEP ] don't\n\tÉté “ж” 3 €")
    assert set(LETTERS) <= set("".join(samples()))


def changed(tokenizer_json: str, part: str, change: dict[str, Any]) -> str:
    """A tokenizer.json with other fields in one part."""
    fields = json.loads(tokenizer_json)
    target = fields[part][0] if part == "added_tokens" else fields[part]
    target |= change
    return json.dumps(fields)


@pytest.mark.parametrize(
    "part, change",
    [
        ("model", {"type": "BPE"}),
        ("model", {"max_input_chars_per_word": 50}),
        ("normalizer", {"clean_text": False}),
        ("normalizer", {"handle_chinese_chars": False}),
        ("normalizer", {"strip_accents": False}),
        ("normalizer", {"lowercase": False, "strip_accents": True}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("added_tokens", {"special": False}),
        ("added_tokens", {"normalized": True}),
    ],
)
def test_another_kind_of_tokenizer_is_refused(
    bert: EncoderSettings, part: str, change: dict[str, Any]
) -> None:
    assert check_kind(bert[0]) == LITERALS
    with pytest.raises(InputError, match="not proven for this tokenizer.*use --engine tokenizers"):
        check_kind(changed(bert[0], part, change))


@needs_tokie
@pytest.mark.parametrize("change", [{"lowercase": False}, {"strip_accents": True}])
def test_cased_and_accent_free_bert_are_proven(
    bert: EncoderSettings, change: dict[str, Any]
) -> None:
    check_engine((changed(bert[0], "normalizer", change), bert[1]), "tokie")


def test_a_missing_or_another_tokie_is_refused_before_any_work(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = ["--input", str(corpus), "--tokenizer", str(tokenizer_folder)]
    arguments = parse([*command, "--output", str(output), "--engine", "tokie"])
    monkeypatch.setattr(sys, "path", [])  # where distributions are looked for
    with pytest.raises(InputError, match="--engine tokie is not installed; pip install tokie"):
        shard(arguments)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    with pytest.raises(InputError, match=f"is proven for {TOKIE_VERSION}, not 0.2.0"):
        shard(arguments)
    assert not output.exists()


@needs_tokie
def test_a_refused_tokenizer_leaves_nothing_behind(
    corpus: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tokenizer_folder, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"strip_accents": False}))
    command = f"--input {corpus} --tokenizer {other} --output {tmp_path}/out --engine tokie"
    with pytest.raises(InputError, match="strip_accents: False, only True is"):
        shard(parse(command.split()))
    assert not (tmp_path / "out").exists()


@needs_tokie
def test_tokie_has_one_thread_from_the_first_text_on(
    bert: EncoderSettings, repository: Path, tmp_path: Path
) -> None:
    """Its threads are started once in a process: by the check before a run."""
    (tmp_path / "settings.json").write_text(json.dumps(bert))
    script = (
        "import json, sys, psutil; from data_prep.engines import check_engine;"
        "count = psutil.Process().num_threads;"
        "before = count(); check_engine(json.load(open(sys.argv[1])), 'tokie');"
        "print(count() - before)"
    )
    environment = {n: v for n, v in os.environ.items() if n != "RAYON_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "settings.json")],
        cwd=repository, capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    assert int(done.stdout) <= 1


def test_the_extra_and_the_tests_pin_the_proven_version(repository: Path) -> None:
    assert f'tokie = ["tokie=={TOKIE_VERSION}"]' in (repository / "pyproject.toml").read_text()
    needed = (repository / "requirements-test.txt").read_text().splitlines()
    assert f"tokie=={TOKIE_VERSION}" in [line.partition("#")[0].strip() for line in needed]
    assert f"tokie=={TOKIE_VERSION}" in INSTALL_TOKIE
