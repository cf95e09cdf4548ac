"""What a model's folder must be before a library opens it: no pickle, no code, no absurd size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from potstill.errors import InputError
from pretrain.options import check, read_object

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_OWN = {
    "auto_map": "it names Python code of its own, which never runs here",
    "transformers_weights": "it names another file for the weights",
    "quantization_config": "it is quantised; give the model itself",
}
_ATTENTION = ("attn_implementation", "_attn_implementation")  # could name code on the hub
MOST_LAYERS = 1000
# The library makes what the config says before it looks at the weights: without a limit these two
# would take for ever, and wide layers all memory (`check_size`).
_LARGEST = {"num_hidden_layers": MOST_LAYERS, "num_labels": 100_000}


def check_model_folder(folder: Path, flag: str) -> None:
    """Refuse a folder that must not, or cannot, be opened as a model; `flag` is for messages.

    Raises:
        InputError: no config.json or no JSON object in it, sizes beyond all models, own code,
            weights only as a pickle or none, or an index that leaves the folder.
    """
    path = folder / "config.json"
    check(path.is_file(), f"{flag} {folder}: no config.json; give the folder of a model")
    config = read_object(path, flag)
    check_own_parts(config, f"{flag} {folder}")
    for name, largest in _LARGEST.items():
        value = config.get(name)
        check(
            not isinstance(value, int | float) or value <= largest,
            f"{flag} {folder}: config.json has {name} {_short(value)}, more than {largest}; "
            "copy the model again",
        )
    _check_weights(folder, flag)


def check_own_parts(config: Mapping[str, Any], blamed: str) -> None:
    """Refuse a config that names code, or files, of its own.

    Raises:
        InputError: it does.
    """
    for name, reason in _OWN.items():
        check(
            not config.get(name),
            f"{blamed}: config.json has {name} {_short(config.get(name))}: {reason}; "
            "give a plain model of an architecture that the transformers library has",
        )
    for name in _ATTENTION:
        check(
            config.get(name) in (None, "eager", "sdpa"),
            f"{blamed}: config.json has {name} {_short(config.get(name))}; leave it out",
        )


def check_size(folder: Path, config: Any, flag: str) -> None:
    """Refuse a config that is much larger than the weights beside it.

    Raises:
        InputError: it would take many times their memory. What else is wrong with `config` raises
            what the library raises.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    elements = sum(weights.numel() for weights in model.parameters())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # bytes
    if elements > 2 * stored + 10**7:
        raise InputError(
            f"{flag} {folder}: config.json describes {elements:.1e} weights, the files hold "
            f"{stored:.1e} bytes; copy the model again"
        )


def _check_weights(folder: Path, flag: str) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / INDEX).is_file():
        _check_index(folder, flag)
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise InputError(
            f"{flag} {folder}: its weights are a pickle ({pickles[0]}), which could run code when "
            f"it is opened; where you trust it, save the model again, as {WEIGHTS}"
        )
    raise InputError(f"{flag} {folder}: no {WEIGHTS} in it; copy or save the whole model again")


def _check_index(folder: Path, flag: str) -> None:
    """Its files must be plain names: the library would follow a path out of the folder."""
    files = read_object(folder / INDEX, flag).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else [files]
    for name in names:
        check(
            isinstance(name, str) and Path(name).name == name,
            f"{flag} {folder}: weight_map in {INDEX} has {_short(name)} where the name of a "
            "file in the folder belongs; copy the model again",
        )


def _short(value: object) -> str:
    return " ".join(str(value).split())[:200]
