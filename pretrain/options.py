"""What every config is made of: fields that are flags, and checks that refuse."""

from dataclasses import field
from typing import Any

from potstill.errors import InputError


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
