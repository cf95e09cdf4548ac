"""Malformed input for `finetune/run.py`: flags, labelled files, model folders, output folders."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features, Image, Value
from safetensors.torch import load_file, save_file

from tests.chaos.common import Case
from tests.finetune.conftest import write_tiny_bert

TASKS = {
    "cola": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
}
SHORT = ["--epochs", "1", "--batch_size", "4", "--max_length", "16"]
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 2.5, 10**9, -(10**20), 1e300, float("nan"), float("inf")),
    *("", "x", "../../x", "<script>", "\ud800", [], [1, "a"], {}, {"a": None}, [[[]]]),
)


def build(draw: random.Random, folder: Path) -> Case:
    """A case in `folder`, which is made: a pure function of the state of `draw`."""
    material = _material(folder.parent)
    folder.mkdir(parents=True)
    return draw.choice(KINDS)(draw, folder, material)


def _material(place: Path) -> Path:
    """A whole model and whole tasks, made once in `place`."""
    material = place / "finetune-material"
    if not material.exists():
        beside = place / f".{material.name}.{random.SystemRandom().getrandbits(32):08x}"
        write_tiny_bert(beside / "model")
        for task, texts in TASKS.items():
            for split in ("train", "validation"):
                write_split(beside / f"data/{task}/{split}.parquet", texts, task != "stsb")
        try:
            beside.rename(material)
        except OSError:  # another process was first
            shutil.rmtree(beside)
    return material


def write_split(path: Path, texts: tuple[str, ...], classes: bool) -> None:
    """Four labelled rows as the public data sets write them."""
    label = ClassLabel(names=["no", "yes"]) if classes else Value("float32")
    features = Features({name: Value("string") for name in texts} | {"label": label})
    columns: dict[str, list[Any]] = {name: ["a b", "c", "d e", "f"] for name in texts}
    columns["label"] = [0, 1, 0, 1] if classes else [0.5, 1.0, 2.5, 5.0]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path)


def _argv(model: Path, data: Path, task: str, output: Path) -> list[str]:
    named = {"--model": model, "--data": data, "--task": task, "--output": output}
    return [*(str(word) for pair in named.items() for word in pair), *SHORT]


# ---- flags


def _flags(draw: random.Random, folder: Path, material: Path) -> Case:
    argv = _argv(material / "model", material / "data", "rte", folder / "run")
    flag, *values = draw.choice(BAD_FLAGS)
    argv += [flag, draw.choice(values)] if values else [flag]
    return Case(argv)


BAD_FLAGS = (
    ("--lr", "nan", "inf", "-1", "0", "1e9", "x", "", "1e-5,3e-5", "9" * 5000),
    ("--batch_size", "0", "-3", "2.5", "nan", "9" * 30, "9" * 5000, "many", ""),
    ("--epochs", "-1", "0", "9" * 20, "1.5", "inf"),
    ("--seed", "-1", str(2**32), "9" * 40, "0x10", "nan"),
    ("--warmup", "nan", "-0.1", "1", "2", "inf", "some"),
    ("--weight_decay", "nan", "inf", "-1", "1e30"),
    ("--precision", "fp16", "", "BF16", "8"),
    ("--max_length", "0", "-1", "1", "4", "65", "9" * 20, "nan"),
    ("--max_train_rows", "0", "-5", "9" * 20, "all"),
    ("--max_validation_rows", "0", "-5", "9" * 20, "1e3"),
    ("--task", "", "rtte", "squad2", "../rte", "RTE", "x" * 5000),
    ("--data", "", "nowhere", "/dev/null", "x" * 5000, "a\nb", "\udcff"),
    ("--model", "", "nowhere", "/dev/null", "x" * 5000, "a\nb", "\udcff", "/"),
    ("--train_file", "a.csv", "", "/dev/null"),
    ("--validation_file", "a.csv", ""),
    ("--output", "/dev/null", "/dev/null/run", "x" * 300, "/proc/run", "a\nb", "\udcff", "/"),
    ("--save_model", "perhaps", "7"),
    *(("--regression",), ("--nonsense",), ("--lr",), ("stray",), ("--ou", "x"), ("--seed=",)),
)


# ---- labelled files


def _damaged_parquet(draw: random.Random, folder: Path, material: Path) -> Case:
    task, data = draw.choice([*TASKS]), folder / "data"
    shutil.copytree(material / "data" / task, data / task)
    file = data / task / f"{draw.choice(('train', 'validation'))}.parquet"
    may_pass = _damage(draw, file)
    return Case(_argv(material / "model", data, task, folder / "run"), [file], may_pass)


def _damage(draw: random.Random, file: Path) -> bool:
    """Cut a file or flip bytes of it; whether that may be harmless."""
    content = bytearray(file.read_bytes())
    if draw.random() < 0.4:
        file.write_bytes(content[: draw.randrange(len(content))])
        return False
    for _ in range(draw.choice((1, 1, 2, 20))):
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)
    file.write_bytes(content)
    return True


def _wrong_columns(draw: random.Random, folder: Path, material: Path) -> Case:
    """Whole Parquet that is not the task's."""
    task, data = draw.choice([*TASKS]), folder / "data"
    shutil.copytree(material / "data" / task, data / task)
    file = data / task / f"{draw.choice(('train', 'validation'))}.parquet"
    change = draw.choice((_odd_label, _odd_text, _odd_metadata, _other_shape))
    change(draw, file)
    # a description that does not fit the columns is passed over
    harmless = change is _odd_metadata
    return Case(_argv(material / "model", data, task, folder / "run"), [file], harmless)


def _odd_label(draw: random.Random, file: Path) -> None:
    labels: list[list[Any]] = [
        *([0, 1, None, 1], [0, 1, 2, -1], ["x", "y", "x", ""], [[1], [0], [1], [0]]),
        *([0.5, float("nan"), 1.0, 2.0], [float("inf"), 0.0, 1.0, 2.0], [1e300, 0.0, 1.0, 2.0]),
        *([{"a": 1}] * 4, [b"\xff"] * 4, [None] * 4),
    ]
    table = pq.read_table(file).replace_schema_metadata(None)
    place = table.column_names.index("label")
    pq.write_table(table.set_column(place, "label", pa.array(draw.choice(labels))), file)


def _odd_text(draw: random.Random, file: Path) -> None:
    texts: list[list[Any]] = [
        *(["a", None, "b", "c"], [1, 2, 3, 4], [b"\xff\xfe", b"a", b"b", b"c"], [["a"]] * 4),
        *([{"text": "a"}] * 4, [None] * 4, [1.5] * 4, ["a " * 600_000, "b", "c", "d"]),
    ]
    table = pq.read_table(file).replace_schema_metadata(None)
    name = draw.choice([name for name in table.column_names if name != "label"])
    place = table.column_names.index(name)
    pq.write_table(table.set_column(place, name, pa.array(draw.choice(texts))), file)


def _odd_metadata(draw: random.Random, file: Path) -> None:
    """The description that the datasets library writes beside the rows."""
    table = pq.read_table(file)
    name = next(name for name in table.column_names if name != "label")
    odd = draw.choice([value for value in ODD if value not in ("\ud800", None, {}, "", [], [[[]]])])
    descriptions: list[Any] = [
        {"info": {"features": {"label": odd}}},
        {"info": {"features": odd}},
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["one"]}}}},
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "a"]}}}},
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": odd}}}},
        {"info": {"features": {name: {"_type": "Nothing"}}}},
        {"info": {"features": Features({name: Image()}).to_dict()}},
        {"info": {"features": {name: {"_type": "Image"}, "label": {"_type": "Audio"}}}},
    ]
    text = draw.choice([json.dumps(draw.choice(descriptions)), "{", "[" * 5000])
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), file)


def _other_shape(draw: random.Random, file: Path) -> None:
    table, kind = pq.read_table(file), draw.randrange(5)
    if kind == 0:
        pq.write_table(table.slice(0, 0), file)
    elif kind == 1:
        pq.write_table(table.drop_columns(["label"]), file)
    elif kind == 2:
        pq.write_table(table.select(["label"]), file)
    elif kind == 3:
        pq.write_table(table.append_column("label", table["label"]), file)
    else:
        file.unlink()
        file.mkdir()


def _own_files(draw: random.Random, folder: Path, material: Path) -> Case:
    kind = draw.choice(("csv", "jsonl"))
    good = (
        b"sentence,label\na b,x\nc d,y\n"
        if kind == "csv"
        else b'{"sentence": "a b", "label": "x"}\n{"sentence": "c d", "label": "y"}\n'
    )
    bad = draw.choice(BAD_CSV if kind == "csv" else BAD_JSONL)
    first = draw.random() < 0.5
    files = [folder / f"{split}.{kind}" for split in ("train", "validation")]
    files[0].write_bytes(bad if first else good)
    files[1].write_bytes(good if first else bad)
    argv = ["--model", str(material / "model"), "--output", str(folder / "run"), *SHORT]
    argv += ["--train_file", str(files[0]), "--validation_file", str(files[1])]
    if draw.random() < 0.1:
        argv.append("--regression")  # of words
    return Case(argv, files)


BAD_CSV = (
    *(b"", b"\n\n", b"\x00" * 50, b"sentence,label\n", b"label\n1\n2\n", b"sentence\na\nb\n"),
    *(b"sentence,label\na,1\nb\n", b"sentence,label\na,1\nb,2,3\n", b'sentence,label\n"a,1\nb,2\n'),
    *(b"sentence,sentence,label\na,b,1\nc,d,2\n", b"sentence,label,label\na,0,1\nb,1,0\n"),
    *(b"sentence,label\n\xff\xfe,1\nb,2\n", "sentence,label\na,1\nb,2\n".encode("utf-16")),
    *(
        b"sentence,label\na,\nb,2\n",
        b"sentence,label\na,1\nb,1\n",
        b"sentence,label\na,0.5\nb,nan\n",
    ),
    *(b"sentence,label\na,1e999\nb,0.5\n", b"sentence,label\na,z\nb,w\nc,v\n"),
    b"sentence,label\n" + b"x" * 1_200_000 + b",1\nb,2\n",
    b"sentence,label\na," + b"9" * 5000 + b"\nb," + b"8" * 5000 + b"\n",
    b"sentence,label\na," + b"9" * 30 + b"\nb," + b"8" * 30 + b"\n",
    b"sentence1,label\na,1\nb,2\n",
)
BAD_JSONL = (
    *(
        b"",
        b"\n\n",
        b"\x00" * 50,
        b"[]\n",
        b"null\n",
        b"1\n",
        b'"a"\n',
        b"{}\n",
        b"{",
        b"[" * 100_000,
    ),
    *(b'{"sentence": "a"}\n', b'{"label": 1}\n', b'{"sentence": "a", "label": null}\n' * 2),
    *(b'{"sentence": null, "label": 1}\n{"sentence": "b", "label": 2}\n', b"\xff\xfe{}"),
    *(b'{"sentence": 1, "label": 1}\n{"sentence": 2, "label": 2}\n', b'{"sentence": "a", "label"'),
    b'{"sentence": "a", "sentence": "b", "label": 1}\n{"sentence": "c", "label": 2}\n',
    b'{"sentence": "\\ud800", "label": 1}\n{"sentence": "c", "label": 2}\n',
    b'{"sentence": "a", "label": 1}\n{"sentence": "c", "label": "two"}\n',
    b'{"sentence": "a", "label": 1}\n{"sentence": {"b": 1}, "label": 2}\n',
    b'{"sentence": "a", "label": 1}\n["c", 2]\n',
    b'{"sentence": "a", "label": NaN}\n{"sentence": "c", "label": 0.5}\n',
    b'{"sentence": "a", "label": 1e999}\n{"sentence": "c", "label": 0.5}\n',
    b'{"sentence": "a", "label": ' + b"9" * 5000 + b'}\n{"sentence": "c", "label": 2}\n',
    b'{"sentence": "a", "label": ' + b"9" * 40 + b'}\n{"sentence": "c", "label": 2}\n',
    b'{"sentence": ' + b"[" * 100_000 + b"\n",
    b'{"sentence": "a", "label": [1]}\n{"sentence": "c", "label": [2]}\n',
    b'{"sentence": "a", "label": "same"}\n' * 3,
)


# ---- models


def _damaged_model(draw: random.Random, folder: Path, material: Path) -> Case:
    model = folder / "model"
    shutil.copytree(material / "model", model)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    file = model / draw.choice(files)
    if draw.random() < 0.15:
        file.unlink()
        needed = file.name != "tokenizer_config.json"
        return Case(_argv(model, material / "data", "rte", folder / "run"), may_pass=not needed)
    may_pass = _damage(draw, file) or file.name == "tokenizer_config.json"
    return Case(_argv(model, material / "data", "rte", folder / "run"), [file], may_pass)


def _odd_json(draw: random.Random, folder: Path, material: Path) -> Case:
    """A value of a wrong kind somewhere in config, tokenizer or what Potstill wrote."""
    model = folder / "model"
    shutil.copytree(material / "model", model)
    names = ["config.json"] * 4 + ["tokenizer.json", "tokenizer_config.json"]
    file = model / draw.choice(names)
    content = json.loads(file.read_text())
    name, value = draw.choice([*content, *EXTRA]), draw.choice(ODD)
    if isinstance(content.get(name), dict) and content[name] and draw.random() < 0.5:
        content[name][draw.choice([*content[name]])] = value
    else:
        content[name] = value
    file.write_text(json.dumps(content))
    return Case(_argv(model, material / "data", "rte", folder / "run"), [file], may_pass=True)


EXTRA = (
    *("num_labels", "id2label", "label2id", "torch_dtype", "quantization_config", "is_decoder"),
    *("attn_implementation", "problem_type", "output_hidden_states", "_name_or_path", "use_cache"),
    *("base_model_tp_plan", "generation_config", "rope_parameters", "num_hidden_layers"),
)


def _refused_model(draw: random.Random, folder: Path, material: Path) -> Case:
    model = folder / "model"
    shutil.copytree(material / "model", model)
    draw.choice((_own_code, _pickle, _index, _bad_weights, _no_object, _huge))(draw, model)
    files = [path for path in sorted(model.iterdir()) if path.is_file()]
    return Case(_argv(model, material / "data", "rte", folder / "run"), files)


def _own_code(draw: random.Random, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {draw.choice(("AutoConfig", "AutoModel")): "theirs.C"}
    config["model_type"] = draw.choice(("bert", "theirs"))
    (model / "config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text("raise SystemExit('code of the folder was run')\n")


def _pickle(draw: random.Random, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")


def _index(draw: random.Random, model: Path) -> None:
    name = draw.choice(
        ("../model.safetensors", "/etc/passwd", 7, None, "gone.safetensors", "w.bin")
    )
    whole: Any = {"metadata": {}, "weight_map": {"bert.embeddings.word_embeddings.weight": name}}
    (model / "model.safetensors").rename(model.parent / "model.safetensors")
    bad = draw.choice((whole, {}, [], {"weight_map": [name]}, {"weight_map": name}))
    (model / "model.safetensors.index.json").write_text(json.dumps(bad))


def _bad_weights(draw: random.Random, model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    name = draw.choice([name for name in sorted(weights) if "bert.encoder" in name])
    kind = draw.randrange(3)
    if kind == 0:
        weights[name].view(-1)[0] = draw.choice((float("nan"), float("inf")))
    elif kind == 1:
        del weights[name]
    else:
        weights[name] = torch.zeros(3, 7)
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _no_object(draw: random.Random, model: Path) -> None:
    contents = (b"", b"[]", b"null", b"7", b'"bert"', b"{", b"\xff\xfe", b"[" * 100_000, b"{}")
    name = draw.choice(("config.json", "tokenizer.json", "potstill.json"))
    kept = [text for text in contents if text != b"{}" or name != "potstill.json"]
    (model / name).write_bytes(draw.choice(kept))


def _huge(draw: random.Random, model: Path) -> None:
    sizes = ("num_hidden_layers", "num_labels", "vocab_size", "hidden_size", "intermediate_size")
    config = json.loads((model / "config.json").read_text())
    config[draw.choice(sizes)] = draw.choice((10**7, 10**10, 10**30))
    (model / "config.json").write_text(json.dumps(config))


# ---- output folders


def _bad_output(draw: random.Random, folder: Path, material: Path) -> Case:
    output = folder / "run"
    argv = _argv(material / "model", material / "data", "rte", output)
    kind = draw.randrange(4)
    if kind == 0:
        output.write_text("somebody's file")
        return Case(argv, [output])
    output.mkdir()
    file = output / draw.choice(("config.json", "result.json"))
    if kind == 1:
        file = output / draw.choice(("notes.txt", "model.py", ".hidden"))
        file.write_text("somebody's")
    elif kind == 2:
        file.write_bytes(draw.choice((b"", b"{", b"[]", b"7", b"\xff", b"null", b"[" * 100_000)))
        if file.name == "result.json":
            (output / "config.json").write_text("{}")
    else:
        file = output / "config.json"
        file.write_text(json.dumps({"model": "other", "seed": 7, "task": draw.choice(ODD[:9])}))
    return Case(argv, [file])


Kind = Callable[[random.Random, Path, Path], Case]
KINDS: tuple[Kind, ...] = (
    *(_flags, _damaged_parquet, _wrong_columns, _own_files, _damaged_model, _odd_json),
    *(_refused_model, _bad_output),
)
