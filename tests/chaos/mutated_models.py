"""Damaged folders of teachers and students, as both programs of the trainer may be given them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pretrain.model_folder import WEIGHTS
from pretrain.models import UNTRAINED
from tests.chaos.mutations import change_json, cut, damage_text, flip_bits, odd_path

BAD_SIZES: list[Any] = [None, 0, -1, -32, 1.5, "32", [32], {}, True, 10**9, 2**62, "x"]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
FOREIGN: list[dict[str, Any]] = [
    {"auto_map": {"AutoModelForMaskedLM": "modeling.Evil"}, "model_type": "evil"},
    {"auto_map": {"AutoConfig": "modeling.EvilConfig", "AutoModel": "modeling.Evil"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"model_type": "gpt2"},
    {"model_type": ["bert"]},
    {"model_type": None},
    {"is_decoder": True},
    {"position_embedding_type": "relative_key"},
    {"num_attention_heads": 5},
    {"hidden_act": "exec"},
    {"pad_token_id": 10**6},
    {"hidden_dropout_prob": 2},
    {"hidden_dropout_prob": "0.1"},
    {"layer_norm_eps": "small"},
    {"max_position_embeddings": 8},
    {"transformers_weights": "../../other.safetensors"},
    {UNTRAINED: [1, 2]},
    {UNTRAINED: ["bert.encoder.layer.x.output"]},
    {UNTRAINED: "cls"},
]
CODE = 'import pathlib\npathlib.Path(__file__).with_name("executed").touch()\n'


def damaged_model(
    chance: random.Random, model: Path, folder: Path, tokenizer: bool = True
) -> tuple[Path, bool]:
    """A damaged copy of a model in `folder`, and whether the damage may be harmless.

    Args:
        tokenizer: whether its tokenizer may be the damaged part; a student's is not read.
    """
    if chance.random() < 0.08:
        return odd_path(chance, folder, lambda path: path.write_text("x")), False
    copy = folder / "model"
    shutil.copytree(model, copy)
    return copy, chance.choice(WAYS + TOKENIZER_WAYS * tokenizer)(chance, copy)


def _no_config(chance: random.Random, copy: Path) -> bool:
    (copy / "config.json").unlink()
    return False


def _no_weights(chance: random.Random, copy: Path) -> bool:
    (copy / WEIGHTS).unlink()
    return False


def _broken_config(chance: random.Random, copy: Path) -> bool:
    damage_text(chance, copy / "config.json")
    return False


def _bad_size(chance: random.Random, copy: Path) -> bool:
    _update(copy / "config.json", {chance.choice(SIZES): chance.choice(BAD_SIZES)})
    return False


def _foreign(chance: random.Random, copy: Path) -> bool:
    (copy / "modeling.py").write_text(CODE)
    _update(copy / "config.json", chance.choice(FOREIGN))
    return False


def _odd_config(chance: random.Random, copy: Path) -> bool:
    change_json(chance, copy / "config.json")
    return True


def _flipped_config(chance: random.Random, copy: Path) -> bool:
    flip_bits(chance, copy / "config.json", chance.randint(1, 3))
    return True


def _cut_weights(chance: random.Random, copy: Path) -> bool:
    cut(chance, copy / WEIGHTS)
    return False


def _flipped_weights(chance: random.Random, copy: Path) -> bool:
    flip_bits(chance, copy / WEIGHTS, chance.choice((1, 1, 200)))
    return True  # in the numbers themselves, which have no checksum


def _flipped_header(chance: random.Random, copy: Path) -> bool:
    path = copy / WEIGHTS
    content = bytearray(path.read_bytes())
    content[chance.randrange(600)] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return True


def _other_shape(chance: random.Random, copy: Path) -> bool:
    def change(weights: dict[str, torch.Tensor]) -> None:
        name = chance.choice([n for n in weights if "encoder" in n])
        weights[name] = weights[name][..., :3].clone()

    return _change_weights(copy, change)


def _lost_weights(chance: random.Random, copy: Path) -> bool:
    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in chance.sample([n for n in weights if "encoder" in n], 3):
            del weights[name]

    return _change_weights(copy, change)


def _not_finite(chance: random.Random, copy: Path) -> bool:
    def change(weights: dict[str, torch.Tensor]) -> None:
        name = chance.choice([n for n in weights if "encoder" in n])
        weights[name].view(-1)[0] = chance.choice((torch.nan, torch.inf, -torch.inf))

    return _change_weights(copy, change)


def _change_weights(copy: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> bool:
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS, metadata={"format": "pt"})
    return False


def _pickle(chance: random.Random, copy: Path) -> bool:
    weights = load_file(copy / WEIGHTS)
    (copy / WEIGHTS).unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    return False


def _index_outside(chance: random.Random, copy: Path) -> bool:
    names = list(load_file(copy / WEIGHTS))
    (copy / WEIGHTS).rename(copy.parent / WEIGHTS)
    places = (
        f"../{WEIGHTS}",
        str(copy.parent / WEIGHTS),
        3,
        None,
        "..",
        "w.bin",
        "gone.safetensors",
    )
    place = chance.choice(places)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return False


def _no_tokenizer(chance: random.Random, copy: Path) -> bool:
    for path in [*copy.glob("tokenizer*"), *copy.glob("vocab*"), *copy.glob("special*")]:
        path.unlink()
    return False


def _broken_tokenizer(chance: random.Random, copy: Path) -> bool:
    damage_text(chance, copy / "tokenizer.json")
    return True  # where the library makes it again of the vocabulary beside it


def _odd_tokenizer(chance: random.Random, copy: Path) -> bool:
    path = copy / chance.choice(("tokenizer.json", "tokenizer_config.json"))
    chance.choice((change_json, flip_bits))(chance, path)
    return True


def _update(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


WAYS: tuple[Callable[[random.Random, Path], bool], ...] = (
    *(_no_config, _no_weights, _broken_config, _bad_size, _foreign, _odd_config, _odd_config),
    *(_flipped_config, _cut_weights, _flipped_weights, _flipped_header, _other_shape),
    *(_lost_weights, _not_finite, _pickle, _index_outside),
)
"""How a copy of a model may be damaged; each says whether the damage may be harmless."""

TOKENIZER_WAYS = (_no_tokenizer, _broken_tokenizer, _odd_tokenizer)
