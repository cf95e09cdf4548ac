"""The whole sharder: the right rows, the same bytes, and no work lost when it is stopped."""

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from data_prep import journal as journal_module
from data_prep import tokenization, workers
from data_prep.corpus import Position, find_sources, read_pieces
from data_prep.packing import is_validation
from data_prep.readers import ReadOptions
from data_prep.shard import main, parse, shard
from data_prep.shard_format import ShardReader, read_manifest
from data_prep.tokenization import encoder_settings, load_tokenizer
from potstill.errors import InputError, PotstillError
from tests.data_prep.conftest import quiet_environment

Digests = Callable[[Path], dict[str, str]]
RunHere = Callable[..., Path]
SMALL = "--rows_per_shard 150"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, run_here: RunHere, corpus: Path) -> Path:
    return run_here(tmp_path_factory.mktemp("made") / "out", corpus, flags=f"{SMALL} --workers 1")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """More batches than workers, so that order and interruption can go wrong at all."""
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 20_000)


def reference_rows(documents: list[str], tokenizer: object, split: str, count: int) -> np.ndarray:
    """The first rows of a split, packed the plain way from transformers' own tokenization."""
    stream: list[int] = []
    for number, text in enumerate(documents):
        if is_validation(0, number, 0.005) == (split == "validation"):
            ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)  # type: ignore[operator]
            stream += ([102] if stream else []) + ids["input_ids"]
    rows = [[101, *stream[at : at + 126], 102] for at in range(0, len(stream) - 125, 126)]
    assert len(rows) >= count
    return np.array(rows[:count])


def test_rows_of_the_real_corpus_are_those_of_a_plain_packing(
    real_data: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet

    vocabulary = real_data / "vocab" / "bert-base-uncased"
    table = pyarrow.parquet.read_table(real_data / "corpus" / "wiki-00000-of-00002.parquet")
    pyarrow.parquet.write_table(table.slice(0, 30), tmp_path / "some.parquet")
    arguments = f"--input {tmp_path}/some.parquet --tokenizer {vocabulary} --output {tmp_path}/out"
    shard(parse([*arguments.split(), "--workers", "1"]))
    texts = table.column("text")[:30].to_pylist()
    tokenizer = AutoTokenizer.from_pretrained(vocabulary)
    for split, count in (("train", 500), ("validation", 20)):
        found = ShardReader(tmp_path / "out", split).read(np.arange(count))
        assert (found == reference_rows(texts, tokenizer, split, count)).all()
    sizes = read_manifest(tmp_path / "out").splits
    assert sum(size.padding for size in sizes.values()) < 0.01 * sizes["train"].tokens


@pytest.mark.usefixtures("small_batches")
def test_bytes_do_not_depend_on_the_number_of_workers(
    unbroken: Path, run_here: RunHere, corpus: Path, tmp_path: Path, digests: Digests
) -> None:
    output = run_here(tmp_path / "out", corpus, flags=f"{SMALL} --workers 3")
    assert digests(output) == digests(unbroken)


def test_rows_do_not_depend_on_the_size_of_shards(
    unbroken: Path, run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    output = run_here(tmp_path / "out", corpus, flags="--rows_per_shard 97 --workers 1")
    for split in ("train", "validation"):
        one, other = ShardReader(output, split), ShardReader(unbroken, split)
        assert (one.read(np.arange(one.rows)) == other.read(np.arange(other.rows))).all()
    assert read_manifest(output).files[0].rows == 97


def test_another_seed_holds_out_other_documents(
    unbroken: Path, run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    output = run_here(tmp_path / "out", corpus, flags=f"{SMALL} --workers 1 --seed 5")
    assert read_manifest(output).validation_fraction == read_manifest(unbroken).validation_fraction
    held_out = [ShardReader(folder, "validation") for folder in (output, unbroken)]
    rows = [reader.read(np.arange(reader.rows)).tolist() for reader in held_out]
    assert rows[0] != rows[1]


def test_every_token_and_document_is_counted(unbroken: Path, documents: list[str]) -> None:
    manifest = read_manifest(unbroken)
    tokenizer = load_tokenizer(unbroken / "tokenizer")
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents]
    separators = len(documents) - 2  # one fewer than documents on each side
    edges = 2 * sum(size.rows for size in manifest.splits.values())
    tokens = sum(size.tokens for size in manifest.splits.values())
    assert manifest.documents == len(documents)
    assert tokens == sum(lengths) + separators + edges


@pytest.mark.usefixtures("small_batches")
def test_a_run_stopped_before_any_write_goes_on_to_the_same_bytes(
    unbroken: Path,
    run_here: RunHere,
    corpus: Path,
    tmp_path: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stops before the 1st, 2nd, 3rd, 4th, 1st … write, each time going on from what is there."""
    output, real, stops = tmp_path / "out", journal_module.write_bytes, 0
    while True:
        writes = 0

        def write_or_stop(path: Path, content: bytes) -> None:
            nonlocal writes
            writes += 1
            if writes > stops % 4:  # noqa: B023 - called within this turn of the loop
                raise KeyboardInterrupt
            real(path, content)

        monkeypatch.setattr(journal_module, "write_bytes", write_or_stop)
        try:
            run_here(output, corpus, flags=f"{SMALL} --workers 1")
            break
        except KeyboardInterrupt:
            stops += 1
            assert not (output / "manifest.json").exists()
            with pytest.raises(InputError, match="no manifest"):
                read_manifest(output)
    assert stops >= 4
    assert digests(output) == digests(unbroken)


def test_finished_shards_are_not_tokenised_again(
    run_here: RunHere, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 5_000)
    output, saved = tmp_path / "out", journal_module.Journal.save

    def save_and_stop(*arguments: object) -> None:
        saved(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(journal_module.Journal, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run_here(output, corpus, flags=f"{SMALL} --workers 1")
    monkeypatch.undo()
    state = journal_module.Journal(output).load()[0]
    asked: list[str] = []
    real = workers.TextEncoder.encode

    def listen(encoder: workers.TextEncoder, pieces: list[str]) -> list[np.ndarray]:
        asked.extend(piece for piece in pieces if piece != tokenization.PROBE)  # fingerprint
        return real(encoder, pieces)

    monkeypatch.setattr(workers.TextEncoder, "encode", listen)
    run_here(output, corpus, flags=f"{SMALL} --workers 1")
    pieces = list(read_pieces(find_sources([str(corpus)]), ReadOptions(), Position()))
    rest = [piece.text for piece in pieces[state.position.pieces :]]
    assert 0 < len(rest) < len(pieces)
    assert asked[-len(rest) :] == rest
    assert len(asked) < len(rest) + 20  # and the probe of the tokenizer


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text("\n\n".join(documents * 5), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def long_unbroken(run_here: RunHere, long_corpus: Path) -> Path:
    flags = "--rows_per_shard 500 --workers 1"
    return run_here(long_corpus.parent / "unbroken", long_corpus, flags=flags)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_really_killed_goes_on_to_the_same_bytes(
    number: signal.Signals,
    repository: Path,
    run_here: RunHere,
    tokenizer_folder: Path,
    long_corpus: Path,
    long_unbroken: Path,
    tmp_path: Path,
    digests: Digests,
) -> None:
    output, flags = tmp_path / "out", "--rows_per_shard 500 --workers 2"
    command = f"data_prep/shard.py --input {long_corpus} --tokenizer {tokenizer_folder}"
    process = subprocess.Popen(
        [sys.executable, *command.split(), "--output", str(output), *flags.split()],
        cwd=repository,
        stderr=subprocess.PIPE,
        text=True,
        env=quiet_environment(),
    )
    while process.poll() is None and not (output / ".sharding" / "train-00002.h5").exists():
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    assert ("finished shards are kept" in errors) == (number == signal.SIGTERM)
    assert not (output / "manifest.json").exists()
    assert not psutil.wait_procs(children, timeout=20)[1], "workers outlive their parent"
    run_here(output, long_corpus, flags="--rows_per_shard 500 --workers 1")
    assert digests(output) == digests(long_unbroken)


def test_a_complete_folder_says_so_and_stays(
    unbroken: Path,
    run_here: RunHere,
    corpus: Path,
    digests: Digests,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = digests(unbroken)
    run_here(unbroken, corpus, flags=f"{SMALL} --workers 1")
    assert "is complete already" in capsys.readouterr().out
    assert digests(unbroken) == before


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--seed 7", "seed was 0, now 7"),
        ("--seq_length 64", "seq_length was 128, now 64"),
        ("--rows_per_shard 151", "rows_per_shard was 150, now 151"),
    ],
)
def test_the_folder_of_another_run_is_refused_naming_what_differs(
    complete: bool,
    flags: str,
    named: str,
    unbroken: Path,
    run_here: RunHere,
    corpus: Path,
    tmp_path: Path,
) -> None:
    output = shutil.copytree(unbroken, tmp_path / "out")
    if not complete:
        (output / "manifest.json").unlink()
        (output / ".sharding" / "journal").write_bytes(b"")
    with pytest.raises(InputError, match=named):
        run_here(output, corpus, flags=f"{SMALL} --workers 1 {flags}")


def test_a_changed_input_is_another_run(
    run_here: RunHere, documents: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("\n\n".join(documents[:5]))
    output = run_here(tmp_path / "out", path)
    path.write_text("\n\n".join(documents[:6]))
    with pytest.raises(InputError, match="another run: sources was"):
        run_here(output, path)


HOLDS = """
import sys
from pathlib import Path
from data_prep.journal import Journal
first = Journal(Path(sys.argv[1]))
first.begin({"any": 1})
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_folder_at_once_are_refused(
    run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match="another process is sharding.*process [0-9]+ on"):
            run_here(tmp_path / "out", corpus)
    run_here(tmp_path / "out", corpus)


@pytest.mark.parametrize("flags", ["", " --seed 3"])
def test_a_folder_that_another_process_finishes_meanwhile_stays(
    flags: str,
    unbroken: Path,
    run_here: RunHere,
    corpus: Path,
    tmp_path: Path,
    digests: Digests,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, looks = shutil.copytree(unbroken, tmp_path / "out"), iter([False])
    real = journal_module.Journal.is_complete

    def look(journal: journal_module.Journal, settings: dict[str, object]) -> bool:
        return next(looks, True) and real(journal, settings)  # the first look saw no shards

    monkeypatch.setattr(journal_module.Journal, "is_complete", look)
    if flags:
        with pytest.raises(InputError, match="another run: seed was 0, now 3"):
            run_here(output, corpus, flags=f"{SMALL} --workers 1{flags}")
    else:
        run_here(output, corpus, flags=f"{SMALL} --workers 1")
        assert "is complete already" in capsys.readouterr().out
    assert digests(output) == digests(unbroken)
    assert (output / ".sharding" / "settings.json").exists()


def test_a_lock_that_was_removed_before_it_was_taken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = journal_module.hold

    def hold_and_lose(path: Path, message: str) -> object:
        lock = real(path, message)
        shutil.rmtree(path.parent)  # as a refused run does that ends now
        return lock

    monkeypatch.setattr(journal_module, "hold", hold_and_lose)
    with pytest.raises(InputError, match="another process just left .*same command again"):
        journal_module.Journal(tmp_path / "out").begin({})


def test_one_document_is_all_for_training_and_that_is_said(
    run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one document only, on one line")
    manifest = read_manifest(run_here(tmp_path / "out", path))
    assert (manifest.splits["train"].rows, manifest.splits["validation"].rows) == (1, 0)
    assert "there are no validation rows" in capsys.readouterr().out


def test_two_documents_give_a_row_to_each_side(run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one document\n\n\x00\n\nanother one")  # the second has no token: not counted
    manifest = read_manifest(run_here(tmp_path / "out", path))
    assert manifest.documents == 2
    assert (manifest.splits["train"].rows, manifest.splits["validation"].rows) == (1, 1)


def test_skipped_texts_are_counted_in_the_manifest(run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\n\nbad \xff\n\ngood too\n\n\xff again")
    manifest = read_manifest(run_here(tmp_path / "out", path, flags="--on_bad_text skip"))
    assert (manifest.documents, manifest.skipped_texts) == (2, 2)


def test_damage_behind_finished_shards_keeps_them(
    run_here: RunHere, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 20_000)
    broken = tmp_path / "broken.txt"
    broken.write_bytes(corpus.read_bytes() + b"\n\xff\n")
    with pytest.raises(InputError, match=f"byte offset {corpus.stat().st_size + 1}"):
        run_here(tmp_path / "out", broken, flags=f"{SMALL} --workers 1")
    assert journal_module.Journal(tmp_path / "out").load()[0].shards


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("remedy", ["skip", "mend", "mend the next"])
def test_a_run_that_bad_text_stopped_goes_on_with_the_remedy(
    remedy: str, run_here: RunHere, corpus: Path, tmp_path: Path, digests: Digests
) -> None:
    text, small = corpus.read_bytes(), f"{SMALL} --workers 1"
    good, bad = text + b"\n\nthe end\n", text + b"\n\nthe end\n\xff\n"
    mended = b"short\n" + good if remedy == "mend the next" else good
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes(good if remedy == "mend the next" else bad)
    two.write_bytes(b"short\n" + (bad if remedy == "mend the next" else b""))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        run_here(tmp_path / "out", one, two, flags=small)
    first = tmp_path / "out" / ".sharding" / "train-00000.h5"
    made = first.stat().st_mtime_ns
    if remedy == "skip":
        small += " --on_bad_text skip"
    else:
        (two if remedy == "mend the next" else one).write_bytes(mended)
    output = run_here(tmp_path / "out", one, two, flags=small)
    assert next(output.glob("train-00000-of-*.h5")).stat().st_mtime_ns == made  # not made again
    assert digests(output) == digests(run_here(tmp_path / "unbroken", one, two, flags=small))


@pytest.mark.usefixtures("small_batches")
def test_going_on_is_refused_where_finished_text_changed_or_bad_text_was_skipped(
    run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes(b"first\n\n" + corpus.read_bytes())
    two.write_bytes(corpus.read_bytes() + b"\n\n{\xff\n")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        run_here(tmp_path / "out", one, two, flags=SMALL + " --workers 1")
    two.write_bytes(b"new\n\n" + corpus.read_bytes())
    with pytest.raises(InputError, match="two.txt has changed in the part that is sharded"):
        run_here(tmp_path / "out", one, two, flags=SMALL + " --workers 1")
    one.write_bytes(corpus.read_bytes())
    with pytest.raises(InputError, match="another run: sources was"):
        run_here(tmp_path / "out", one, two, flags=SMALL + " --workers 1")


def test_skipping_cannot_become_stopping(run_here: RunHere, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"good\n\n\xff\n\nbetter\n")
    output = run_here(tmp_path / "out", path, flags="--workers 1 --on_bad_text skip")
    with pytest.raises(InputError, match="on_bad_text was 'skip', now 'stop'"):
        run_here(output, path)


def test_going_on_removes_only_its_own_left_overs(
    run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    ours = [output / ".tokenizer.77.old", output / ".sharding" / ".journal.77.part"]
    for path in ours:
        path.mkdir(parents=True)
    first = journal_module.Journal(output)
    first.begin({"any": 1})
    first.release()
    assert not any(path.exists() for path in ours)
    nothing = np.empty(0, np.int64)
    first.save(journal_module.State(), {"train": nothing, "validation": nothing})
    theirs = [output / "download.part", output / ".notes.old", output / ".tokenizer.old"]
    for path in theirs:
        path.write_text("mine")
    first.begin({"any": 1})
    first.release()
    assert all(path.read_text() == "mine" for path in theirs)


def test_the_lock_is_closed_when_a_run_ends(
    run_here: RunHere, corpus: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run_here(tmp_path / "out", corpus)
        gc.collect()
    assert not [one for one in seen if ".sharding" in str(one.message)]


@pytest.mark.parametrize("place", ["begin", "learning"])
def test_a_full_disk_at_the_start_is_one_line(
    place: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writers = {
        "begin": (journal_module, "write_sealed_json"),
        "learning": (tokenization, "write_json"),
    }
    monkeypatch.setattr(*writers[place], full)
    command = f"--input {corpus} --train_tokenizer 300 --output {tmp_path}/out --workers 1"
    with pytest.raises(PotstillError, match="cannot be written .No space left on device."):
        shard(parse(command.split()))


@pytest.mark.parametrize("place", ["data set", "tokenizer"])
def test_a_signal_is_never_taken_for_a_fault_of_the_input(
    place: str,
    corpus: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets = pytest.importorskip("datasets", reason="the library that reads data sets")

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    owner, name = (
        (datasets, "load_dataset") if place == "data set" else (AutoTokenizer, "from_pretrained")
    )
    monkeypatch.setattr(owner, name, stop)
    source = ["--dataset", "x"] if place == "data set" else ["--input", str(corpus)]
    words = ["--tokenizer", str(tokenizer_folder), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["shard.py", *source, *words])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("error: stopped by SIGTERM")


def test_a_worker_that_dies_is_an_error_not_a_hang(
    tokenizer_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH_CHARACTERS", 5_000)
    pieces = read_pieces(find_sources([str(corpus)] * 50), ReadOptions(), Position())
    settings = encoder_settings(load_tokenizer(tokenizer_folder))
    batches = workers.tokenize(pieces, settings, workers=2)
    next(batches)
    victims = [child for child in psutil.Process().children() if "spawn_main" in _command(child)]
    os.kill(victims[-1].pid, signal.SIGKILL)
    with pytest.raises(PotstillError, match="a worker process died"):
        list(batches)


def _command(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


@pytest.mark.slow
def test_a_line_of_30_megabytes_needs_bounded_memory(
    tokenizer_folder: Path, documents: list[str], tmp_path: Path
) -> None:
    """Mostly long words, which are tokenised fast: what counts is that no line is held whole."""
    line = " ".join(" ".join(documents).split()) + " "
    path = tmp_path / "line.txt"
    with open(path, "w") as file:
        file.write("short\n\nshort too\n\n")
        file.write(line + f"{'long' * 40} " * (30_000_000 // 161))
    (tmp_path / "small.txt").write_text("one\n\ntwo")
    script = (
        "import resource, sys; from data_prep.shard import parse, shard\n"
        "for name in ('small', 'line'):\n"
        "    given = ['--input', f'{name}.txt', '--output', name, '--workers', '1']\n"
        "    shard(parse([*given, *sys.argv[1:]]))\n"
        "    print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--tokenizer", str(tokenizer_folder)],
        cwd=tmp_path, capture_output=True, text=True, env=quiet_environment(), check=True,
    )  # fmt: skip
    small, large = (int(peak) / 1024 for peak in re.findall("peak ([0-9]+)", done.stdout))
    assert large - small < 75, (small, large)  # MiB; a whole line takes a thousand and more
    assert json.loads((tmp_path / "line" / "manifest.json").read_text())["documents"] == 3
