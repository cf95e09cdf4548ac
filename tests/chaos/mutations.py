"""Damage done to valid files and values: each a function of the random numbers it is given."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ODD_NUMBERS = ["nan", "inf", "-inf", "1e999", "", "ten", "0x10", "--", "1,5", "9" * 400, "1e3x"]
ODD_VALUES: list[Any] = [
    *(None, True, False, [], {}, [1, 2], {"a": 1}, "", "auto", "none", "1", "x" * 3000, "\u0000"),
    *(0, -1, 1.5, 10**12, -(10**18), 2**63 - 1, 0.0, -0.5, 1e-300, 1e300, "\U0001f37a", "../../x"),
]


def damage_text(chance: random.Random, path: Path) -> None:
    """Make a JSON file unreadable, so that no reader can take it for another valid one."""
    content = path.read_bytes()
    key = next(iter(json.loads(content)), "a")
    head = content.rstrip().removesuffix(b"}")
    ways = [
        content.rstrip()[: chance.randrange(len(content.rstrip()))],
        b"",
        b"[" * 100_000,
        b'{"a": ' * 600 + b"1" + b"}" * 600,
        content.replace(b"{", b"{\xff", 1),
        b"\xef\xbb\xbf" + content,
        content.decode().encode("utf-16"),
        head + b', "nan": NaN}',
        head + b', "large": 1e999}',
        head + b', "long": ' + b"9" * 5000 + b"}",
        head + b', "half": "\\ud800"}',
        head + f', "{key}": 1, "{key}": 2}}'.encode(),
        b"[" + content + b"]",
        chance.choice((b"null", b"3", b'"text"', b"true", b"[]")),
        bytes(chance.randrange(256) for _ in range(chance.randrange(1, 200))),
        content + b"}",
    ]
    path.write_bytes(chance.choice(ways))


def flip_bits(chance: random.Random, path: Path, count: int = 1) -> None:
    """Change single bits of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(chance: random.Random, path: Path) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def change_json(
    chance: random.Random, path: Path, values: list[Any] = ODD_VALUES, depth: int = 9
) -> None:
    """Put odd values at one to three places of a JSON file, or take entries away."""
    content = json.loads(path.read_text())
    for _ in range(chance.randint(1, 3)):
        places = list(_places(content, depth))
        if places:
            holder, key = chance.choice(places)
            if chance.random() < 0.15:
                del holder[key]
            else:
                holder[key] = chance.choice(values)
    path.write_text(json.dumps(content))


def _places(value: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Every entry of a JSON value, as (object or list, key)."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if depth and isinstance(value[key], dict | list):
            yield from _places(value[key], depth - 1)


def odd_text(chance: random.Random, alphabet: str, longest: int = 40) -> str:
    """A text of the pieces that an alphabet has between its blanks, or of any characters."""
    if chance.random() < 0.2:
        codes = (
            chance.choice((chance.randrange(32, 127), chance.randrange(161, 0xD000)))
            for _ in range(chance.randrange(longest))
        )
        return "".join(map(chr, codes))
    pieces = alphabet.split()
    return "".join(chance.choice(pieces) for _ in range(chance.randrange(longest)))


def odd_path(chance: random.Random, folder: Path, make: Callable[[Path], Any]) -> Path:
    """A path under which no folder of any program stands.

    Args:
        make: writes a file that is something else.
    """
    foreign = folder / "foreign"
    kind = chance.randrange(6)
    if kind == 0:
        return folder / "nowhere"
    if kind == 1:
        make(foreign)
        return foreign
    if kind == 2:
        make(foreign)
        return foreign / "below a file"
    if kind == 3:
        foreign.mkdir()
        make(foreign / "thesis.tex")
        return foreign
    if kind == 4:
        return folder / ("n" * 300)
    foreign.symlink_to(foreign)  # a circle
    return foreign


def damaged_shards(chance: random.Random, sound: Path, folder: Path) -> Path:
    """A damaged copy of a folder of shards in `folder`, or a path under which there are none."""
    if chance.random() < 0.2:
        return odd_path(chance, folder, lambda path: path.write_text("x"))
    shards = Path(shutil.copytree(sound, folder / "shards"))
    kind, manifest = chance.randrange(5), shards / "manifest.json"
    if kind == 0:
        damage_text(chance, manifest)
    elif kind == 1:
        change_json(chance, manifest)  # its checksum is that of the text, too
    elif kind == 2:
        flip_bits(chance, manifest)
    else:
        path = chance.choice(sorted(shards.glob("*.h5")))
        chance.choice((cut, flip_bits, lambda _, file: file.unlink()))(chance, path)
    return shards


def files_of(*folders: Path) -> list[Path]:
    """All files below the folders."""
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]
