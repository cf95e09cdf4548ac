"""Several students in one run: what `--students FILE.json` says, and how far each of them is.

    {"uniform": {"init": "uniform", "lr": 1e-3}, "narrow": {"student_hidden": 192}}

A student's settings stand on top of the command line's. Its folder OUTPUT/students/NAME is that
of a run of its own; a lone run is a group of one, whose folder is OUTPUT itself. Data, teacher,
steps, batch and precision are common to all.
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from potstill.errors import InputError, TrainingError
from pretrain.config import Config
from pretrain.options import check, read_object, typed

FOLDER = "students"
STOPPED = "stopped"
"""The event in a student's metrics.jsonl that says that it learns no more."""
NOT_FINITE = "its loss or its gradients stay not finite; a lower lr or a longer warmup may help"

_SECTIONS = ("student", "objective", "schedule")
_LENGTH = frozenset({"max_steps", "max_hours", "schedule"})  # common, though in a section of ours
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Stop(NamedTuple):
    """Where a student stopped before the end: the step, its loss there, and the reason."""

    step: int
    loss: float
    reason: str = NOT_FINITE


@dataclass(frozen=True)
class Member:
    """One student of a run, as it is told: its name ("" in a lone run) and its own settings."""

    name: str
    config: Config
    file: str | None = None

    @property
    def folder(self) -> Path:
        """The folder of this student's files."""
        return Path(str(self.config.run.output))

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A block whose input errors say whose settings they are about."""
        try:
            yield
        except InputError as error:
            if self.file is None:
                raise
            raise InputError(f"--students {self.file}: student {self.name!r}: {error}") from error


def read_members(config: Config) -> tuple[Member, ...]:
    """The students of a run, in the file's order; without `--students` the one there is.

    Raises:
        InputError: the file is unreadable, names no student, or one of them has a name or a
            setting that it cannot have.
    """
    if config.run.students is None:
        return (Member("", config),)
    source = config.run.students
    if config.run.resume not in ("auto", "never"):
        raise InputError(
            f"--resume {config.run.resume}: with --students only auto and never, since each "
            "student has checkpoints of its own"
        )
    members = []
    for name, settings in _read_file(source).items():
        with Member(name, config, source).blamed():
            members.append(Member(name, _own_config(config, name, settings), source))
    return tuple(members)


def _read_file(source: str) -> dict[str, Any]:
    """Settings by name, as they stand in the file."""
    shape = '{"NAME": {"FLAG": VALUE}} with at least one student'
    students = read_object(Path(source), "--students", shape)
    check(bool(students), f"--students {source}: must be {shape}")
    folders: dict[str, str] = {}
    for name in students:
        if not _NAME.fullmatch(name):
            raise InputError(
                f"--students {source}: student {name!r} cannot be a folder's name; use letters, "
                "digits, '.', '_' and '-', a letter or digit first, at most 100"
            )
        other = folders.setdefault(name.lower(), name)
        if other != name:
            raise InputError(
                f"--students {source}: students {other!r} and {name!r} would share a folder where "
                "upper and lower case are one; rename one of them"
            )
    return students


def _own_config(config: Config, name: str, settings: Any) -> Config:
    """What a lone run of this student would be told: its settings on top of the command line's."""
    if not isinstance(settings, dict):
        raise InputError(f'{settings!r} must be an object of settings: {{"init": "uniform"}}')
    known = {
        field.name: section
        for section in _SECTIONS
        for field in fields(getattr(config, section))
        if field.name not in _LENGTH
    }
    changes: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for flag, value in settings.items():
        if flag not in known:
            raise InputError(_not_a_setting(flag, config, known))
        kind = get_type_hints(type(getattr(config, known[flag])))[flag]
        changes[known[flag]][flag] = typed(flag, value, kind)
    parts = {part: replace(getattr(config, part), **changes[part]) for part in _SECTIONS}
    output = str(Path(str(config.run.output)) / FOLDER / name)
    return replace(config, run=replace(config.run, output=output, students=None), **parts)


def _not_a_setting(name: str, config: Config, known: Mapping[str, str]) -> str:
    if any(hasattr(getattr(config, part.name), name) for part in fields(config)):
        return f"{name} is common to all students; give it on the command line: --{name}"
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
    return f"{name} is no setting of a student; nearest: {', '.join(nearest)}"


def where_stopped(member: Member) -> Stop | None:
    """Where a student of a group stopped alone, if it did; a lone run may always try again."""
    path = member.folder / "metrics.jsonl"
    if member.file is None or not path.exists():
        return None
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry.get("event") == STOPPED:
                reason = str(entry.get("reason", NOT_FINITE))
                return Stop(int(entry["step"]), float(entry["loss"]), reason)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a line that was torn by a kill; the student tries that step again
    return None


def check_all_done(stopped: Mapping[str, Stop]) -> None:
    """At the end of a run: no student may have stopped on the way.

    Raises:
        TrainingError: the students that did, where, and what to do.
    """
    if not stopped:
        return
    if "" in stopped:  # a lone run
        step, loss, reason = stopped[""]
        raise TrainingError(
            f"stopped at step {step}, loss {loss}: {reason}. Its last checkpoint stays; give a "
            "changed run another --output"
        )
    where = ", ".join(f"{n} (step {s.step}, loss {s.loss}: {s.reason})" for n, s in stopped.items())
    raise TrainingError(
        f"stopped {where}. Their last checkpoints stay, the other students are done; give those "
        "that you change another --output"
    )
