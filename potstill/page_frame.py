"""The frame of our HTML pages: one file that fetches nothing and runs only its own script."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

STYLE = (files("potstill") / "page.css").read_text(encoding="utf-8")


def frame(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page around `body` (HTML), in the common style and `style` (CSS).

    Its content security policy allows this very style and this very script, by their hashes, and
    nothing else: what a name out of somebody's data may hold can neither run nor load anything.
    """
    style = STYLE + style
    sources = [f"style-src {_hash(style)}", *([f"script-src {_hash(script)}"] if script else [])]
    policy = "; ".join(["default-src 'none'", *sources, "base-uri 'none'", "form-action 'none'"])
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body>{body}{code}</body></html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, what sorts it (the text itself if None), and HTML attributes."""

    text: str
    value: float | None = None
    attributes: str = ""
    html: str = ""  # instead of the text, escaped already

    def shown(self, number: bool) -> str:
        """The cell as HTML."""
        value = "" if self.value is None else f' data-value="{self.value!r}"'
        kind = ' class="number"' if number else ""
        return f"<td{kind}{value}{self.attributes}>{self.html or escape(self.text)}</td>"


@dataclass(frozen=True)
class Column:
    """A column: its name, whether it holds numbers, and HTML attributes of its head."""

    name: str
    number: bool = False
    attributes: str = ""

    def head(self, sortable: bool) -> str:
        """The head cell as HTML."""
        kind = ' class="number"' if self.number else ""
        sort = f' data-sort="{"number" if self.number else "text"}"' if sortable else ""
        return f'<th scope="col"{kind}{sort}{self.attributes}>{escape(self.name)}</th>'


@dataclass(frozen=True)
class Row:
    """A row: its cells, and HTML attributes."""

    cells: Sequence[Cell | str]
    attributes: str = ""


def table(
    columns: Sequence[Column],
    rows: Iterable[Row],
    caption: str,
    foot: Iterable[Row] = (),
    sortable: bool = False,
) -> str:
    """A table that scrolls inside its own box, which the keyboard reaches.

    Args:
        caption: what screen readers call it. foot: rows that no sorting moves.
        sortable: marks the heads for the page's script.
    """
    heads = "".join(column.head(sortable) for column in columns)
    below = _rows(columns, foot)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{_rows(columns, rows)}</tbody>"
        f"{f'<tfoot>{below}</tfoot>' if below else ''}</table></div>"
    )


def _rows(columns: Sequence[Column], rows: Iterable[Row]) -> str:
    return "".join(
        f"<tr{row.attributes}>"
        + "".join(
            (cell if isinstance(cell, Cell) else Cell(cell)).shown(column.number)
            for column, cell in zip(columns, row.cells, strict=True)
        )
        + "</tr>"
        for row in rows
    )


def details(summary: str, content: str) -> str:
    """What is folded away until it is asked for; `content` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"
