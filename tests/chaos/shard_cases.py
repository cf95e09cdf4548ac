"""Malformed input for `data_prep/shard.py`: flags, corpora, tokenizers, folders, older shards."""

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep import workers
from data_prep.shard import parse, shard
from data_prep.tokenization import load_tokenizer, special_ids
from potstill.errors import InputError
from potstill.files import read_sealed_json, write_sealed_json
from tests.chaos.common import Case
from tests.chaos.mutations import ODD_NUMBERS, ODD_VALUES, change_json, cut, flip_bits, odd_path
from tests.chaos.shard_flips import TEXT

LENGTH, SLOTS, ROWS = 32, 4, 60
SIZES = ["--seq_length", str(LENGTH), "--rows_per_shard", "40", "--workers", "1"]
INTS = ("--seq_length", "--rows_per_shard", "--seed", "--workers", "--train_tokenizer")
GOOD = "text.txt"


def build(draw: random.Random, folder: Path) -> Case:
    """A case in `folder`, which is made: a pure function of the state of `draw`."""
    material = _material(folder.parent)
    folder.mkdir(parents=True)
    return draw.choice(KINDS)(draw, folder, material)


def _material(place: Path) -> Path:
    """Whole input of every kind, and folders of runs, made once in `place`."""
    material = place / "shard-material"
    if not material.exists():
        beside = place / f".{material.name}.{os.getpid()}"
        beside.mkdir(parents=True)
        _make_corpora(beside)
        given = ["--input", str(beside / GOOD), "--train_tokenizer", "300", *SIZES]
        shard(parse([*given, "--output", str(beside / "made")]))
        shutil.copytree(beside / "made" / "tokenizer", beside / "tokenizer")
        _make_older(beside / "old.hdf5", special_ids(load_tokenizer(beside / "tokenizer")))
        beside.rename(material)
        _make_runs(material)
    return material


def _make_corpora(folder: Path) -> None:
    texts = TEXT.split("\n\n")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / GOOD).write_text(TEXT)
    (folder / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    (folder / "text.txt.zst").write_bytes(zstandard.compress(TEXT.encode()))
    (folder / "text.jsonl").write_text(lines)
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"text": texts, "number": range(len(texts))}), folder / "text.parquet")


def _make_older(path: Path, ids: dict[str, int]) -> None:
    """A shard as other scripts write them, its first word of each row masked."""
    rows = np.random.default_rng(0).integers(10, 300, (ROWS, LENGTH), dtype=np.int32)
    rows[:, 0], rows[:, -1] = ids["cls"], ids["sep"]
    labels = np.zeros((ROWS, SLOTS), np.int32)
    positions = np.zeros((ROWS, SLOTS), np.int32)
    labels[:, 0], positions[:, 0], rows[:, 1] = rows[:, 1], 1, ids["mask"]
    with h5py.File(path, "w") as file:
        for name, values in {
            "input_ids": rows,
            "input_mask": np.ones((ROWS, LENGTH), np.int8),
            "masked_lm_positions": positions,
            "masked_lm_ids": labels,
        }.items():
            file.create_dataset(name, data=values, compression="gzip")


def _make_runs(material: Path) -> None:
    """A finished run, and one that bad text stopped behind finished shards."""
    shard(parse([*_argv(material / GOOD, material, material / "finished")]))
    (material / "broken.txt").write_bytes(TEXT.encode() + b"\n\n\xff\n")
    with patch.object(workers, "BATCH_CHARACTERS", 2000):
        try:
            shard(parse([*_argv(material / "broken.txt", material, material / "stopped")]))
        except InputError:
            return  # as it must be
    raise AssertionError("bad text was taken")


def _argv(source: Path, material: Path, output: Path) -> list[str]:
    return [
        *("--input", str(source), "--tokenizer", str(material / "tokenizer")),
        *("--output", str(output), *SIZES),
    ]


# ---- flags


def _flags(draw: random.Random, folder: Path, material: Path) -> Case:
    argv = _argv(material / GOOD, material, folder / "out")
    flag, *values = draw.choice(BAD_FLAGS)
    return Case([*argv, flag, draw.choice(values)] if values else [*argv, flag])


BAD_FLAGS = (
    *((name, *ODD_NUMBERS, "2.5", "-1", "1e5", str(-(10**30))) for name in INTS),
    *(("--seq_length", "7", "0", "70000", "9" * 30), ("--workers", "0", "100000", "9" * 30)),
    *(("--rows_per_shard", "0"), ("--seed", str(2**64)), ("--train_tokenizer", "300", "9" * 30)),
    ("--validation_fraction", *ODD_NUMBERS, "1", "2", "-0.1", "1e300"),
    *(("--tokenizer", "", "nowhere/at/all", "./no", "/dev/null", "x" * 5000, "a\nb", "\udcff"),),
    *(("--output", "/dev/null", "/dev/null/x", "n" * 300, "a\nb", "\udcff", "", "/proc/x", "/"),),
    *(("--dataset", "x"), ("--verify", "x"), ("--info", "x"), ("--dataset_config", "x")),
    *(("--split", "test"), ("--engine", "fast", ""), ("--on_bad_text", "", "no", "Skip")),
    *(("--text_column", "", "a\nb"), ("--nonsense",), ("--nonsense", "1"), ("--seed",)),
    *(("--input",), ("stray",), ("--document_per_file=1",), ("--input", "", "a\nb.txt", "/proc")),
)


def _missing_flags(draw: random.Random, folder: Path, material: Path) -> Case:
    argv = _argv(material / GOOD, material, folder / "out")
    flag = draw.choice(("--input", "--tokenizer", "--output"))
    place = argv.index(flag)
    return Case(argv[:place] + argv[place + 2 :])


# ---- corpora


def _damaged_corpus(draw: random.Random, folder: Path, material: Path) -> Case:
    """A compressed file or a table, cut or flipped."""
    names = ("text.txt.gz", "text.txt.zst", "text.jsonl.gz", "text.parquet")
    path = Path(shutil.copy(material / draw.choice(names), folder))
    cut_off = draw.random() < 0.5
    cut(draw, path) if cut_off else flip_bits(draw, path, draw.choice((1, 1, 5, 50)))
    # A file that is cut to nothing is an empty gzip or zstd file, and so an empty corpus.
    return Case(_argv(path, material, folder / "out"), [path], may_pass=not cut_off)


def _bad_bytes(draw: random.Random, folder: Path, material: Path) -> Case:
    """Text that is not UTF-8."""
    path = folder / draw.choice((GOOD, "text.jsonl"))
    content = bytearray((material / path.name).read_bytes())
    bad = draw.choice(
        (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b"\xe2\x82")
    )
    place = draw.randrange(len(content))
    content[place:place] = bad
    path.write_bytes(content)
    return Case(_argv(path, material, folder / "out"), [path])


def _bad_lines(draw: random.Random, folder: Path, material: Path) -> Case:
    """A line that is no JSON object with text."""
    path = folder / draw.choice(("text.jsonl", "text.json"))
    lines = (material / "text.jsonl").read_text().splitlines()
    lines.insert(draw.randrange(len(lines)), draw.choice(BAD_LINES))
    path.write_text("\n".join(lines), errors="surrogateescape")
    return Case(_argv(path, material, folder / "out"), [path])


BAD_LINES = (
    *("[]", "null", "3", '"text"', "{", '{"text": "a"', '{"text": 3}', '{"text": ["a"]}', "nan"),
    *(
        '{"text": {}}',
        '{"body": "a"}',
        "{}",
        '{"text": true}',
        '{"text": "\\ud800"}',
        "{'text': 1}",
    ),
    *('{"text": "a"} {"text": "b"}', "[" * 100_000, '{"a":' * 5000, "9" * 5000, "\x00", "text"),
    *('{"text": "\\x"}', '{"text": 1e999}', '{"text": "a\udcff"}', '{"text": "a",}'),
)


def _bad_table(draw: random.Random, folder: Path, material: Path) -> Case:
    """Whole Parquet without a column of texts."""
    columns: list[dict[str, Any]] = [
        {"body": ["a", "b"]},
        {"text": [1, 2]},
        {"text": [["a"], ["b"]]},
        {"text": [{"text": "a"}] * 2},
        {"text": pa.array([b"\xff\xfe", b"a"], pa.binary())},
        {"text": pa.array([b"\xff\xfe", b"a"], pa.binary()).view(pa.string())},
        {"text": [True, False]},
        {"text": [None, None]},
        {"text": pa.array([], pa.string())},
        {"Text": ["a", "b"]},
    ]
    path = folder / "text.parquet"
    pq.write_table(pa.table(draw.choice(columns)), path)
    return Case(_argv(path, material, folder / "out"), [path])


def _no_corpus(draw: random.Random, folder: Path, material: Path) -> Case:
    """Nothing there, nothing in it, or no file at all."""
    path = draw.choice(NO_CORPORA)(folder)
    case = Case(_argv(path, material, folder / "out"))
    if draw.random() < 0.3:
        case.argv.insert(1, str(material / GOOD))
        # An empty file beside a good one is no fault.
        empty = os.path.isfile(path) and path.suffix in (".txt", ".jsonl")
        return Case(case.argv, may_pass=empty and not path.read_bytes().strip())
    return case


def _written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _linked(folder: Path, name: str, target: str) -> Path:
    (folder / name).symlink_to(target)
    return folder / name


def _piped(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.txt")
    return folder / "pipe.txt"


def _named(folder: Path, name: str, place: str = "text") -> Path:
    """A folder with one file of that name."""
    (folder / place).mkdir(parents=True)
    with open(os.fsencode(folder / place) + b"/" + os.fsencode(name), "w") as file:
        file.write("some text")
    return folder / "text"


NO_CORPORA: tuple[Callable[[Path], Path], ...] = (
    *(partial(_written, name=name, content=b"") for name in ("a.txt", "a.jsonl", "a.parquet")),
    partial(_written, name="a.txt", content=b" \n\n \t\n\r\n"),
    partial(_written, name="a.pdf", content=b"%PDF"),
    partial(_written, name="a", content=b"text"),
    partial(_written, name="a.tar.gz", content=gzip.compress(b"text")),
    partial(_written, name="a.parquet.gz", content=b""),
    partial(_written, name="a.parquet", content=os.urandom(0) + b"PAR1" + bytes(40) + b"PAR1"),
    partial(_written, name="a.txt.gz", content=b"plain"),
    partial(_written, name="a.txt.zst", content=b"plain"),
    partial(_linked, name="a.txt", target="a.txt"),
    partial(_linked, name="a.txt", target="nowhere"),
    partial(_linked, name="a.txt", target="/dev/zero"),
    partial(_linked, name="a", target="."),
    _piped,
    lambda folder: folder / "nowhere.txt",
    lambda folder: folder / ("n" * 300 + ".txt"),
    partial(_named, name="a\nb.txt"),
    partial(_named, name="a\udcff.txt"),
    partial(_named, name="a.pdf"),
    partial(_named, name=".hidden.txt"),
    partial(_named, name="a.txt", place="text/.hidden"),
)


# ---- tokenizers


def _bad_tokenizer(draw: random.Random, folder: Path, material: Path) -> Case:
    tokenizer = Path(shutil.copytree(material / "tokenizer", folder / "tokenizer"))
    path = tokenizer / draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
    may_pass = draw.choice(TOKENIZER_DAMAGE)(draw, path)
    argv = _argv(material / GOOD, material, folder / "out")
    argv[argv.index("--tokenizer") + 1] = str(tokenizer)
    return Case(argv, [p for p in tokenizer.iterdir() if p.is_file()], may_pass)


def _cut_json(draw: random.Random, path: Path) -> bool:
    path.write_bytes(path.read_bytes().rstrip()[: draw.randrange(path.stat().st_size - 2)])
    return False


def _flipped(draw: random.Random, path: Path) -> bool:
    flip_bits(draw, path, draw.choice((1, 2, 20)))
    return True


def _odd_values(draw: random.Random, path: Path) -> bool:
    change_json(draw, path)
    return True


def _no_special(draw: random.Random, path: Path) -> bool:
    """A tokenizer without one of the tokens that rows need."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        fields = json.loads((path.parent / name).read_text())
        fields["added_tokens"] = []
        (path.parent / name).write_text(json.dumps({"version": "1.0"} if "model" in fields else {}))
    return False


def _no_file(draw: random.Random, path: Path) -> bool:
    (path.parent / "tokenizer.json").unlink()
    return False


def _own_code(draw: random.Random, path: Path) -> bool:
    """A folder that asks for its own Python to be run."""
    (path.parent / "own.py").write_text("raise SystemExit('the code of a folder was run')")
    config = path.parent / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "Own"
    fields["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"]}
    config.write_text(json.dumps(fields))
    return True


TOKENIZER_DAMAGE: tuple[Callable[[random.Random, Path], bool], ...] = (
    *(_cut_json, _flipped, _flipped, _odd_values, _odd_values, _no_special, _no_file, _own_code),
)


# ---- output folders


def _foreign_output(draw: random.Random, folder: Path, material: Path) -> Case:
    """A file, a folder of something else, a circle."""
    path = odd_path(draw, folder, lambda place: place.write_text("mine"))
    keep = [p for p in folder.rglob("*") if p.is_file()]
    return Case(_argv(material / GOOD, material, path), keep, may_pass=path.name == "nowhere")


def _other_run(draw: random.Random, folder: Path, material: Path) -> Case:
    """The folder of a run with other settings, finished or not."""
    output = Path(shutil.copytree(material / draw.choice(("finished", "stopped")), folder / "out"))
    argv = _argv(material / GOOD, material, output)
    if output.joinpath("manifest.json").exists():
        argv += draw.choice((["--seed", "3"], ["--rows_per_shard", "41"], ["--seq_length", "40"]))
    return Case(argv, _files(output))


def _damaged_run(draw: random.Random, folder: Path, material: Path) -> Case:
    """A file of an earlier run of this very command, cut, flipped or away."""
    kind = draw.choice(("finished", "stopped"))
    output = Path(shutil.copytree(material / kind, folder / "out"))
    source = {"finished": GOOD, "stopped": "broken.txt"}[kind]
    names = ["manifest.json", ".sharding/settings.json"]
    names = names if kind == "finished" else [".sharding/journal", ".sharding/settings.json"]
    if kind == "stopped":
        names += [str(p.relative_to(output)) for p in sorted(output.rglob("*.h5"))[:2]]
    path = output / draw.choice(names)
    draw.choice((cut, flip_bits))(draw, path)
    return Case(_argv(material / source, material, output), _files(output))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]


# ---- --verify and --info


def _damaged_shards(draw: random.Random, folder: Path, material: Path) -> Case:
    """Any file of finished shards, damaged."""
    made = Path(shutil.copytree(material / "made", folder / "made"))
    path = draw.choice([p for p in _files(made) if ".sharding" not in p.parts])
    damage = draw.choice((cut, flip_bits, lambda _, place: place.unlink()))
    damage(draw, path)
    return Case(["--verify", str(made)], _files(made))


def _wrong_manifest(draw: random.Random, folder: Path, material: Path) -> Case:
    """A manifest with odd values, sealed again as someone with intent would."""
    made = Path(shutil.copytree(material / "made", folder / "made"))
    path = made / "manifest.json"
    plain = folder / "plain.json"
    plain.write_text(json.dumps(read_sealed_json(path)))
    change_json(draw, plain, [*ODD_VALUES, "/etc/passwd", "\ud800", "a\nb", "..", "x.h5", 2**64])
    if draw.random() < 0.2:
        shutil.copy(plain, path)  # not sealed
        return Case([draw.choice(("--verify", "--info")), str(made)], _files(made))
    write_sealed_json(path, _encodable(json.loads(plain.read_text())))
    return Case([draw.choice(("--verify", "--info")), str(made)], _files(made), may_pass=True)


def _encodable(value: Any) -> Any:
    """Half surrogates cannot be sealed: their replacements can."""
    text = json.dumps(value, ensure_ascii=False)
    return json.loads(text.encode(errors="replace").decode())


def _no_shards(draw: random.Random, folder: Path, material: Path) -> Case:
    path = odd_path(draw, folder, lambda place: place.write_text("mine"))
    return Case([draw.choice(("--verify", "--info")), str(path)])


# ---- shards of other scripts


def _damaged_older(draw: random.Random, folder: Path, material: Path) -> Case:
    path = Path(shutil.copy(material / "old.hdf5", folder))
    cut_off = draw.random() < 0.3
    cut(draw, path) if cut_off else flip_bits(draw, path, draw.choice((1, 3, 30, 300)))
    return Case(_argv(path, material, folder / "out"), [path], may_pass=not cut_off)


def _wrong_older(draw: random.Random, folder: Path, material: Path) -> Case:
    path = Path(shutil.copy(material / "old.hdf5", folder))
    with h5py.File(path, "r+") as file:
        name = draw.choice(list(file))
        values = file[name][:]
        del file[name]
        draw.choice(OLDER_DAMAGE)(file, name, values)
    argv = _argv(path, material, folder / "out")
    return Case(argv, [path])


def _elsewhere(file: Any, name: str, values: np.ndarray) -> None:
    file[name] = h5py.ExternalLink("/etc/passwd", name)


def _external(file: Any, name: str, values: np.ndarray) -> None:
    place = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    file.create_dataset(name, values.shape, values.dtype, external=place)


OLDER_DAMAGE: tuple[Callable[[Any, str, np.ndarray], Any], ...] = (
    lambda file, name, values: None,
    lambda file, name, values: file.create_dataset(name, data=values[:-1]),
    lambda file, name, values: file.create_dataset(name, data=values[:, :-1] if "i" else values),
    lambda file, name, values: file.create_dataset(name, data=values.reshape(-1)),
    lambda file, name, values: file.create_dataset(name, data=values.astype(np.float32)),
    lambda file, name, values: file.create_dataset(name, data=np.full_like(values, -5)),
    lambda file, name, values: file.create_dataset(name, data=values.astype("S4")),
    lambda file, name, values: file.create_dataset(name, (10**12, LENGTH), np.int32, chunks=True),
    lambda file, name, values: file.create_dataset(name, data=h5py.Empty("i4")),
    lambda file, name, values: file.create_dataset(name, data=3),
    lambda file, name, values: file.create_group(name),
    lambda file, name, values: file.__setitem__(name, h5py.SoftLink(f"/{name}")),
    *(_elsewhere, _external),
)


def _mixed_older(draw: random.Random, folder: Path, material: Path) -> Case:
    """Older shards with something that cannot go with them."""
    argv = _argv(material / "old.hdf5", material, folder / "out")
    more = draw.choice(
        (
            *(["--text_column", "body"], ["--document_per_file"], ["--on_bad_text", "skip"]),
            *(["--seq_length", "64"], ["--engine", "tokie"]),
        )
    )
    if draw.random() < 0.3:
        argv.insert(1, str(material / GOOD))
    return Case(argv + more)


KINDS: tuple[Callable[[random.Random, Path, Path], Case], ...] = (
    *(_flags, _flags, _missing_flags, _damaged_corpus, _bad_bytes, _bad_lines, _bad_table),
    *(_no_corpus, _bad_tokenizer, _bad_tokenizer, _foreign_output, _other_run, _damaged_run),
    *(_damaged_shards, _wrong_manifest, _wrong_manifest, _no_shards, _damaged_older),
    *(_wrong_older, _mixed_older),
)
