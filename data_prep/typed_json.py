"""A JSON value becomes the dataclass that it was made from, or is refused by the field's name."""

import math
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

LARGEST = 2**64 - 1  # of a whole number: a seed's


def build(kind: Any, value: Any, name: str) -> Any:
    """A value of `kind` from its JSON form.

    Args:
        kind: a dataclass, list[...], dict[str, ...], str, int, float or Any. Whole numbers are not
            negative and have 64 bits; a float may be written as a whole number, and is finite.
        name: of the value, for messages.

    Raises:
        ValueError: another type, a missing or an unknown field, a number out of range.
    """
    container = get_origin(kind) or kind
    if is_dataclass(container):
        return _build_fields(kind, build(dict[str, Any], value, name), name)
    if container is list:
        (of,) = get_args(kind)
        items = enumerate(_instance(list, value, name))
        return [build(of, item, f"{name}[{number}]") for number, item in items]
    if container is dict:
        of = get_args(kind)[1]
        entries = _instance(dict, value, name).items()
        return {key: build(of, item, f"{name}.{key}") for key, item in entries}
    if kind in (int, float):
        return _number(kind, value, name)
    return value if kind is Any else _instance(kind, value, name)


def _build_fields(kind: Any, fields: dict[str, Any], name: str) -> Any:
    hints = get_type_hints(kind)
    for wrong, what in ((hints.keys() - fields, "is missing"), (fields.keys() - hints, "unknown")):
        if wrong:
            raise ValueError(f"{name}: {min(wrong)!r} {what}")
    parts = {field: build(of, fields[field], f"{name}.{field}") for field, of in hints.items()}
    return kind(**parts)


def _instance(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {_short(value)}, not {kind.__name__}")
    return value


def _number(kind: type, value: Any, name: str) -> Any:
    whole = type(value) is int and 0 <= value <= LARGEST  # True is no number
    if not whole and not (kind is float and type(value) is float and math.isfinite(value)):
        raise ValueError(f"{name} is {_short(value)}, no {kind.__name__} that can be")
    return value


def _short(value: Any) -> str:
    return repr(value)[:40]
