"""What every config is made of: fields that are flags, checks that refuse, JSON of the user's."""

import json
import math
from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from potstill.errors import InputError

PATHS = frozenset(
    {"data", "teacher", "student", "students", "ds_config", "preset", "output", "knowledge"}
)
DEEPEST = 32
"""Objects and lists within one another in a JSON file; what a person writes needs five."""


def option(text: str, default: Any = None) -> Any:
    """A field of a config: a flag of the program, with its help."""
    return field(default=default, metadata={"help": text})


def check(right: bool, message: str) -> None:
    """Refuse what is not right.

    Raises:
        InputError: the message.
    """
    if not right:
        raise InputError(message)


def check_values(settings: Any) -> None:
    """Refuse values that no flag of any config can have.

    Args:
        settings: a dataclass of flags.

    Raises:
        InputError: a number that is not finite or has more than 64 bits, or a text that is no
            Unicode or no path.
    """
    for one in fields(settings):
        value = getattr(settings, one.name)
        if isinstance(value, float):
            check(math.isfinite(value), f"--{one.name} {value} must be a finite number")
        elif isinstance(value, int):
            check(
                -(2**63) <= value < 2**63, f"--{one.name} {str(value)[:20]}… has more than 64 bits"
            )
        elif isinstance(value, str):
            check_text(one.name, value)


def check_text(name: str, value: str) -> None:
    """Refuse a flag's text that no file could hold, or be named.

    Raises:
        InputError: bytes that are no UTF-8, a zero byte, or a path that is too long.
    """
    encoded = value.encode(errors="replace")
    right = b"\0" not in encoded and encoded.decode() == value
    check(right, f"--{name} {value!r} is no UTF-8 text; give it another name")
    longest = max(map(len, encoded.split(b"/")))
    fits_a_path = longest <= 255 and len(encoded) < 4096
    check(
        name not in PATHS or fits_a_path,
        f"--{name}: a path of {len(encoded)} bytes, with {longest} in one name, is longer than any "
        "file system takes",
    )


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a config's field; whole numbers pass for fractions."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, part) for part in get_args(kind))
    if kind is float and type(value) is int:
        return True
    return type(value) is kind


def describe(kind: Any) -> str:
    """A config field's type in words for people who write JSON."""
    if get_origin(kind) is Literal:
        return " or ".join(json.dumps(choice) for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(describe(part) for part in get_args(kind))
    words = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "null")


def typed(name: str, value: Any, kind: Any) -> Any:
    """A JSON value as a config's field holds it: a whole number becomes a fraction where asked.

    Raises:
        InputError: another type.
    """
    if not fits(value, kind):
        raise InputError(f"{name} {json.dumps(value)} must be {describe(kind)}")
    return float(value) if type(value) is int and float in (kind, *get_args(kind)) else value


def read_object(
    path: Path, flag: str, shape: str = "a JSON object", unique: bool = True
) -> dict[str, Any]:
    """A JSON object that a person wrote, read more strictly than the library does.

    Args:
        flag, shape: the user's flag and what its file must be, for messages.
        unique: refuse a name that stands twice; else its last value counts, as for the libraries.

    Raises:
        InputError: unreadable, not UTF-8, not JSON, a name that stands twice, a number that is not
            finite or has more than 64 bits, nested too deep, or no object.
    """
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=_unique if unique else None,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_finite,
        )
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is JSON, but no text
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{flag} {path}: must be {shape}")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that stands twice, plain parsing would silently keep the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice; rename or remove one")
        found[name] = value
    return found


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"the number {text[:20]}… has more than 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {text[:20]} is not finite")
    return float(text)


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"nested deeper than {DEEPEST}")
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in parts:
        _check_depth(part, depth + 1)
