"""The demo's parts, on a few real docstrings; and all of it, at a scale of seconds."""

import dataclasses
import json
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from examples.demo import prose, report, results, task
from examples.demo.__main__ import Demo, Scale, run
from examples.demo.prose import Document
from examples.demo.stages import Pipeline, Stage
from potstill.errors import PotstillError
from potstill.files import write_json


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    """Real docstrings: some source files of each library that the task asks for."""
    found = []
    for label in task.LABELS:
        files = list(prose.source_files((label,)))[:: 12 if label == "python" else 4][:160]
        texts = [prose.docstrings_of(folder / path) for _, folder, path in files]
        found += list(prose.distinct(zip(files, texts, strict=True), set()))
    return found


def test_prose_keeps_sentences_and_drops_examples_tables_and_rules() -> None:
    text = """Return the sum of *all* elements
    along an axis.

    Parameters
    ----------

    >>> total([1, 2])
    3
    ====  ====  ====
    Nothing is ever changed in place.
    """
    assert prose.prose(text) == (
        "Return the sum of all elements along an axis.\nNothing is ever changed in place."
    )


def test_docstrings_are_read_without_running_the_source(tmp_path: Path) -> None:
    source = tmp_path / "harmful.py"
    text = "The docstring of a module that must never be imported by anybody at all."
    source.write_text(f'"""{text}"""\nraise SystemExit("it was run")\n')
    assert prose.docstrings_of(source) == [text]


def test_a_docstring_that_stands_twice_is_given_once() -> None:
    files = [("numpy", Path(), "a.py"), ("scipy", Path(), "b.py")]
    found = list(prose.distinct(zip(files, [["one", "two"], ["two"]], strict=True), set()))
    assert found == [Document("a.py", "numpy", ("one", "two"))]


def test_the_manual_of_the_language_is_part_of_the_corpus() -> None:
    (place,) = [f for f in prose.source_files(("python",)) if f[2] == prose.TOPICS]
    topics = prose.docstrings_of(place[1] / place[2])
    assert len(topics) > 50 and any('The "if" statement is used for' in text for text in topics)


def test_the_corpus_does_not_depend_on_the_number_of_workers() -> None:
    one = [d.id for d in prose.read_documents(("networkx",), workers=1)]
    assert len(one) > 20 and one == [d.id for d in prose.read_documents(("networkx",), workers=2)]


def test_pretraining_never_sees_a_module_or_a_sentence_of_the_task(
    documents: list[Document], tmp_path: Path
) -> None:
    parts = task.split(documents)
    assert sum(map(len, parts.values())) == len(documents) and all(parts.values())
    task.write_task(documents, tmp_path)
    rows = {n: read_lines(tmp_path / f"{n}.jsonl") for n in ("train", "validation")}
    sentences = {name: {row["sentence"] for row in part} for name, part in rows.items()}
    assert not sentences["train"] & sentences["validation"]
    seen = {sentence for _, sentence in task.candidates(parts["pretraining"])}
    assert not seen & (sentences["train"] | sentences["validation"])
    corpus = {row["id"] for row in read_lines(tmp_path / "corpus.jsonl")}
    assert corpus == {document.id for document in parts["pretraining"]}


def test_labels_are_balanced_and_never_stand_in_the_sentence(documents: list[Document]) -> None:
    rows = task.task_rows(task.split(documents)["train"], set(), 20)
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == set(task.LABELS) and len(set(counts.values())) == 1
    assert not [row for row in rows if row["label"] in row["sentence"].lower()]


def read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_finished_stage_is_not_run_again_and_a_changed_one_is(tmp_path: Path) -> None:
    def append(text: str) -> Stage:
        code = f"open({str(tmp_path / 'log')!r}, 'a').write({text!r})"
        return Stage("append", "Append", [sys.executable, "-c", code])

    for text in ("a", "a", "b"):
        Pipeline(tmp_path / "done").run(append(text))
    assert (tmp_path / "log").read_text() == "ab"


def test_a_failed_stage_ends_the_demo_and_is_not_recorded(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log.txt"
    stage = Stage("fail", "Fail", [sys.executable, "-c", "print('why'); exit(3)"], log=log)
    with pytest.raises(PotstillError, match="Fail: the command ended with status 3; .*log.txt"):
        Pipeline(tmp_path / "done").run(stage)
    assert log.read_text() == "why\n" and not (tmp_path / "done").exists()


class Checker(HTMLParser):
    """Collects tags that were never closed, and addresses that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]
        if tag not in ("meta", "circle", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "path"):
            assert self.open.pop() == tag


def made_up(name: str) -> dict:
    """Results with `name` wherever a text may stand."""
    curve = {"train": [(1, 3.0), (2, 2.0)], "validation": [(0, 4.0), (2, 2.5)]}
    return {
        "models": [{"name": name, "parameters": 5, "accuracy": 0.5, "macro_f1": 0.25}],
        "note": name,
        "corpus": {"megabytes": 1.0, "documents": 2, "tokens": 3},
        "teacher": name,
        "student": name,
        "objective": name,
        "init": name,
        "ranks": 2,
        "export": {"max_abs_difference": 0.0},
        "curves": {"teacher": curve, "student": curve},
        "stages": [{"title": name, "command": name, "seconds": 1.0}],
        "environment": {name: name},
    }


def test_the_page_escapes_every_text_and_fetches_nothing() -> None:
    checker = Checker()
    checker.feed(report.page(made_up("<script>alert('&')</script>")))
    assert checker.open == [] and checker.fetched == []
    assert "<script" not in report.page(made_up("<script>"))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_demo_runs_and_runs_again_without_doing_anything_twice(
    documents: list[Document],
    tmp_path: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    scale = Scale(vocabulary=500, teacher_layers=2, student_layers=1, hidden=32, heads=2)
    scale = dataclasses.replace(scale, teacher_steps=3, student_steps=3, epochs=1, seeds=2)
    demo = Demo(tmp_path / "demo", scale, ranks=1)
    task.write_task(documents, demo.path("text"))
    write_json(demo.path("done", "text.json"), {"command": demo.prepare().shown, "seconds": 0})
    run(demo)
    told = capsys.readouterr().out
    assert "student  " in told and "numbers  " in told and "page     " in told
    numbers = json.loads(demo.path("results.json").read_text())
    names = ["teacher", "distilled student", "random student", "always the same answer"]
    assert [row["name"] for row in numbers["models"]] == names
    assert numbers["export"]["max_abs_difference"] <= results.CLOSE
    assert demo.path("student", "student", "model.safetensors").is_file()

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    run(demo)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert json.loads(demo.path("results.json").read_text()) == numbers
