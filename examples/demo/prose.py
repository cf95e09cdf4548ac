"""English prose that every Python installation carries: the manual's topics, and docstrings.

Nothing is imported or run: the sources are parsed. The order is that of the sorted paths, so one
installation gives one corpus.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

STANDARD_LIBRARY = "python"
SOURCES = (
    STANDARD_LIBRARY,
    *("numpy", "scipy", "scikit-learn", "pandas", "networkx", "sympy", "matplotlib", "torch"),
    *("deepspeed", "transformers", "accelerate", "huggingface_hub", "datasets", "fonttools"),
)
"""The libraries that are read: the standard one, and distributions of requirements.txt."""

SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "_vendor", "site-packages"}
SHORTEST = 60  # characters of a docstring that is worth having
LEAST_QUOTED = 0.2  # a source with less prose than this costs more to parse than it gives
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """The prose of one source file.

    Attributes:
        id: the file's path inside its library, for example `scipy/stats/_qmc.py`.
        source: the library: `python`, or a distribution's name.
        docstrings: in the order of the file; each is one or more paragraphs.
    """

    id: str
    source: str
    docstrings: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it, blank lines between."""
        return "\n\n".join(self.docstrings)


def read_documents(sources: Sequence[str] = SOURCES, workers: int = 1) -> Iterator[Document]:
    """Every document of these libraries; a docstring that stands twice is given once.

    The documents do not depend on the number of workers (processes that parse).
    """
    seen: set[bytes] = set()
    files = list(source_files(sources))
    with ProcessPoolExecutor(workers) as pool:
        found = pool.map(docstrings_of, [folder / path for _, folder, path in files], chunksize=64)
        yield from distinct(zip(files, found, strict=True), seen)


def distinct(
    found: Iterable[tuple[tuple[str, Path, str], list[str]]], seen: set[bytes]
) -> Iterator[Document]:
    """Documents of the docstrings that are not in `seen`, where they are entered."""
    for (source, _, path), texts in found:
        docstrings = []
        for text in texts:
            mark = hashlib.sha1(text.encode()).digest()
            if mark not in seen:
                seen.add(mark)
                docstrings.append(text)
        if docstrings:
            yield Document(path, source, tuple(docstrings))


def source_files(sources: Sequence[str]) -> Iterator[tuple[str, Path, str]]:
    """(library, its folder, path in it) of every Python source, sorted by path."""
    for name in sources:
        if name == STANDARD_LIBRARY:
            folder = Path(sysconfig.get_path("stdlib"))
            paths: Iterable[Path] = (path.relative_to(folder) for path in folder.rglob("*.py"))
        else:
            installed = distribution(name)
            folder = Path(str(installed.locate_file("")))
            paths = map(Path, installed.files or [])
        yield from ((name, folder, str(path)) for path in wanted(paths))


def wanted(paths: Iterable[Path]) -> list[Path]:
    """The sources among the paths, without tests and without what is somebody else's."""
    return sorted(p for p in paths if p.suffix == ".py" and not SKIPPED & set(p.parts))


def docstrings_of(path: Path) -> list[str]:
    """The cleaned docstrings of a source file; of the topics file, its texts."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # listed but not there; or not in UTF-8
        return []
    is_manual = path.as_posix().endswith(TOPICS)
    if not is_manual and quoted_share(source) < LEAST_QUOTED:
        return []
    tree = parse(source)
    if tree is None:
        return []
    found = topics(tree) if is_manual else raw_docstrings(tree)
    cleaned = (prose(text) for text in found)
    return [text for text in cleaned if len(text) >= SHORTEST]


def quoted_share(source: str) -> float:
    """The share of a source that stands between triple quotes; roughly, but fast."""
    return sum(map(len, source.split('"""')[1::2])) / max(1, len(source))


def parse(source: str) -> ast.Module | None:
    """The syntax tree; None for templates and for sources of another version of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # others' invalid escape sequences
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def raw_docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module, of its classes and of its functions."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        # Definitions only stand in statements: expressions need not be searched.
        stack += reversed([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])


def topics(tree: ast.Module) -> Iterator[str]:
    """The texts of `topics = {name: text}`, the language reference that `help()` prints."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for value in node.value.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value


def prose(text: str) -> str:
    """A docstring's sentences: no examples, tables, underlines; one line a paragraph."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped:
            paragraphs.append([])
        elif not stripped.startswith((">>>", "... ", "|", "+-")) and is_prose(stripped):
            paragraphs[-1].append(stripped)
    joined = (re.sub(r"[`*]+", "", " ".join(lines)) for lines in paragraphs)
    return "\n".join(line for line in joined if len(line.split()) >= 4)


def is_prose(line: str) -> bool:
    """True unless symbols and figures outweigh the letters: a table, a rule, a formula."""
    return sum(map(str.isalpha, line)) + line.count(" ") >= 0.75 * len(line)


def first_sentence(text: str) -> str:
    """What stands before the first full stop, in the first paragraph."""
    return re.split(r"(?<=[.!?])\s", text.partition("\n")[0], maxsplit=1)[0]
