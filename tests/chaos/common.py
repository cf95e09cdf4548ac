"""What every part of the chaos program shares."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What came of a part.

    Attributes:
        part: its name. asked, passed: cases.
        failures: one line each, with the case's own seed and command, so that it can be repeated.
        details: figures for the table.
    """

    part: str
    asked: int
    passed: int
    failures: list[str]
    details: dict[str, int | float | str]


@dataclass(frozen=True)
class Case:
    """Malformed input for a program: it must be refused.

    Attributes:
        argv: the program's arguments. keep: files that must have the same bytes afterwards.
        may_pass: whether the damage may be harmless, so that exit status 0 is right too.
    """

    argv: list[str]
    keep: list[Path] = field(default_factory=list)
    may_pass: bool = False
