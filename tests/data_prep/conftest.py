"""A corpus that every Python carries, a tokenizer learned from it, and ways to run the sharder."""

import hashlib
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.shard import main, parse, shard
from data_prep.tokenization import train_tokenizer

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Real prose: the help topics of Python, one document each, no blank line inside."""
    topics = pydoc_data.topics.topics
    return ["\n".join(filter(str.strip, topics[name].splitlines())) for name in sorted(topics)]


@pytest.fixture(scope="session")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as one text file, a blank line between them."""
    path = tmp_path_factory.mktemp("corpus") / "topics.txt"
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordPiece tokenizer of 2,000 tokens, learned from the documents."""
    folder = tmp_path_factory.mktemp("learned") / "tokenizer"
    train_tokenizer(lambda: iter(documents), 2000, folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_here(tokenizer_folder: Path) -> Callable[..., Path]:
    """Shard inside this process, `run_here(output, input, …, flags)`; gives the output back."""

    def run(output: Path, *inputs: Path, flags: str = "--workers 1") -> Path:
        paths = [str(path) for path in inputs]
        command = ["--input", *paths, "--tokenizer", str(tokenizer_folder), "--output", str(output)]
        shard(parse([*command, *flags.split()]))
        return output

    return run


@pytest.fixture(scope="session")
def run_program(repository: Path) -> Run:
    """Run the real program with the given arguments."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "data_prep/shard.py", *map(str, arguments)]
        return subprocess.run(
            command, cwd=repository, capture_output=True, text=True, env=quiet_environment()
        )

    return run


@pytest.fixture
def run_main(capsys: pytest.CaptureFixture[str]) -> Run:
    """The same within this process, for what is the same there: a start takes seconds."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        status = 0
        try:
            main([*map(str, arguments)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


def quiet_environment() -> dict[str, str]:
    """The environment of a program that a test starts: offline, one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every visible file of a folder, by name."""

    def of(folder: Path) -> dict[str, str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if not path.relative_to(folder).parts[0].startswith(".")
        }

    return of
