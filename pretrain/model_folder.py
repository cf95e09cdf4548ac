"""What a model's folder must be before a library opens it: no pickle, no code, no absurd size."""

import re
from collections.abc import Iterable, Mapping
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
_OF_A_LAYER = re.compile(r"\.layers?\.\d+\.")
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
    config = read_object(path, flag, unique=False)  # real ones have doubles
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
        InputError: it would take many times their memory, or cannot be built.
    """
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # a wrong value raises whatever its first use happens to raise
        raise InputError(
            f"{flag} {folder}: config.json cannot be used ({type(error).__name__}: "
            f"{_short(error)}); save or copy the model again"
        ) from error
    elements = sum(weights.numel() for weights in model.parameters())
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # bytes
    if elements > 2 * stored + 10**7:
        raise InputError(
            f"{flag} {folder}: config.json describes {elements:.1e} weights, the files hold "
            f"{stored:.1e} bytes; copy the model again"
        )


def check_layers(unexpected: Iterable[str], blamed: str) -> None:
    """Refuse weights of layers that the config does not have: the model would be a shallower one.

    Args:
        unexpected: names of weights for which the library found no place.

    Raises:
        InputError: some belong to a layer.
    """
    beyond = sorted(name for name in unexpected if _OF_A_LAYER.search(name))
    if beyond:
        raise InputError(
            f"{blamed}: {len(beyond)} weights belong to layers that config.json does not have, "
            f"{beyond[0]} first; save or copy the model again"
        )


def _check_weights(folder: Path, flag: str) -> None:
    if (folder / WEIGHTS).is_file():
        return
    if (folder / INDEX).is_file():
        for name in check_index(folder / INDEX, flag, folder):
            check(
                (folder / name).is_file(),
                f"{flag} {folder}: {name} is missing, which {INDEX} names; copy the model again",
            )
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise InputError(
            f"{flag} {folder}: its weights are a pickle ({pickles[0]}), which could run code when "
            f"it is opened; where you trust it, save the model again, as {WEIGHTS}"
        )
    raise InputError(f"{flag} {folder}: no {WEIGHTS} in it; copy or save the whole model again")


def check_index(path: Path, flag: str, source: str | Path) -> list[str]:
    """The files that an index of weights names; `flag` and `source` are for messages.

    The library would follow a path out of the folder, and unpickle what is not called safetensors.

    Raises:
        InputError: unreadable, or a name that is not a plain one of a safetensors file.
    """
    files = read_object(path, flag).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else [files]
    for name in names:
        right = isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        check(
            right,
            f"{flag} {source}: weight_map in {INDEX} has {_short(name)} where the name of a "
            "safetensors file in the folder belongs; copy the model again",
        )
    return sorted(set(map(str, names)))


def _short(value: object) -> str:
    return " ".join(str(value).split())[:200]
