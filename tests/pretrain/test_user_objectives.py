"""Objectives of a user's own, relations chosen by a user, and what is said when they are wrong."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from potstill.errors import InputError
from pretrain.features import Feature
from pretrain.knowledge.cuts import Cut
from pretrain.knowledge.layout import check_predictions
from pretrain.models import Shape
from pretrain.objectives import (
    OBJECTIVES,
    LayerPair,
    Settings,
    build_objective,
    check_models,
    parse_relations,
)
from pretrain.objectives.attention import RelationKL
from pretrain.objectives.base import Relation
from pretrain.objectives.hidden import HidSeq
from tests import reference
from tests.pretrain.tiny import ragged_batch

PAIR = LayerPair(1, 2)
SMALL = Shape(2, 12, 4, 8, 11, 40, 12)  # 4 heads of 3
LARGE = Shape(3, 20, 5, 8, 11, 40, 20)  # 5 heads of 4


def code_of_the_docs(repository: Path) -> str:
    text = (repository / "docs" / "objectives.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return str(code)


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that a user has on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_objectives", raising=False)
    return tmp_path


def test_the_objective_of_the_docs_works_and_is_short(repository: Path, user_package: Path) -> None:
    code = code_of_the_docs(repository)
    assert len(code.splitlines()) < 40
    (user_package / "my_objectives.py").write_text(code)
    objective = build_objective("att-mse+0.5*my_objectives:HiddenL1", Settings((PAIR,)))
    assert objective.names == ("att-mse", "my_objectives:HiddenL1")
    batch, feature = ragged_batch((4, 2)), Feature("hidden", 1)
    own = torch.randn(2, 4, 6, requires_grad=True)
    other = torch.randn(2, 4, 6)
    teacher = {Feature("hidden", 2): other}
    total = objective.objectives[1].total({feature: own}, teacher, batch, {})
    by_hand = (own - other).abs()
    expected = (by_hand[0].sum() + by_hand[1, :2].sum()) / 6
    torch.testing.assert_close(total, expected)
    assert objective.objectives[1].counted == "tokens"
    assert feature in objective.student_features()


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("my_objectives:HiddenL2", "module my_objectives has no HiddenL2"),
        ("no_such_module:Loss", "No module named 'no_such_module'.*PYTHONPATH"),
        ("broken_objectives:Loss", r"importing broken_objectives failed \(SyntaxError"),
        ("wrong_unit:Loss", "unit 'token' is none of .*'tokens'"),
        ("wrong_needs:Loss", "needs 'hiden', none of .*'hidden'"),
        ("stored_unit:Loss", "unit 'kept_tokens' is none of"),
        ("stored_needs:Loss", "needs 'query-key', none of"),
        ("no_unit:Loss", "the class lacks unit"),
        ("my_objectives:Tensor", "no subclass of pretrain.objectives.base.Objective"),
        ("my_objectives:Objective", "lacks total"),
    ],
)
def test_a_class_that_cannot_serve_is_refused(
    name: str,
    fact: str,
    repository: Path,
    user_package: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = code_of_the_docs(repository)
    (user_package / "my_objectives.py").write_text(code)
    (user_package / "broken_objectives.py").write_text("class Loss(:\n")
    renamed = code.replace("HiddenL1", "Loss")
    changes = {
        "wrong_unit": ('unit = "tokens"', 'unit = "token"'),
        "wrong_needs": ('("hidden",)', '("hiden",)'),
        "stored_unit": ('unit = "tokens"', 'unit = "kept_tokens"'),
        "stored_needs": ('("hidden",)', '("query-key",)'),
        "no_unit": ('unit = "tokens"', ""),
    }
    for module, (right, wrong) in changes.items():
        monkeypatch.delitem(sys.modules, module, raising=False)
        (user_package / f"{module}.py").write_text(renamed.replace(right, wrong))
    with pytest.raises(InputError, match=fact) as refusal:
        build_objective(name, Settings((PAIR,)))
    assert "\n" not in str(refusal.value)


class QueryKL(RelationKL):
    """A user's: MiniLM's relation, of queries."""

    needs = ("query",)
    relations = (Relation("query", "query", 1.0),)


class LogitError(HidSeq):
    """A user's: of all logits."""

    needs = ("logits",)
    takes_cut = False

    def teacher_features(self) -> frozenset[Feature]:
        return frozenset({Feature("logits", "all")})


def test_a_user_s_own_relation_learns_from_a_live_teacher_and_refuses_a_cut() -> None:
    """Scores are stored of the packaged relations only."""
    own, batch, shape = QueryKL(Settings((PAIR,))), ragged_batch((4, 2)), (2, 3, 4, 5)
    student, teacher = torch.randn(shape).double(), torch.randn(shape).double()
    found = own.total({Feature("query", 1): student}, {Feature("query", 2): teacher}, batch, {})
    expected = reference.relation_kl((student, student), (teacher, teacher), (4, 2))
    torch.testing.assert_close(found / batch.counts["tokens"], expected)
    with pytest.raises(InputError, match="--keep 5t: --objective my:QueryKL compares whole rows"):
        own.check_cut("my:QueryKL", Cut(tokens=5))


def test_a_user_s_own_objective_on_logits_refuses_the_likeliest_tokens() -> None:
    own = LogitError(Settings((PAIR,)))
    with pytest.raises(InputError, match="--logits_top_k 5: --objective my:L2 compares all logits"):
        check_predictions("my:L2", own, 5)
    check_predictions("my:L2", own, 0)
    for name in ("kd", "mlm", "hid-seq"):
        check_predictions(name, OBJECTIVES[name](Settings((PAIR,))), 5)


def test_relations_and_their_weights_are_read() -> None:
    found = parse_relations("q-q+2*q-k+v-v")
    assert [(r.left, r.right) for r in found] == [
        ("query", "query"),
        ("query", "key"),
        ("value", "value"),
    ]
    assert [r.weight for r in found] == [0.25, 0.5, 0.25]
    assert parse_relations("q-q+k-k+v-v") == Settings(()).relations, "the default"


@pytest.mark.parametrize(
    "text", ["q", "q-x", "q-q-q", "qq", "", "q-q+", "0*q-q", "0:1*q-q", "1:0*q-q+k-k"]
)
def test_malformed_relations_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--relations"):
        parse_relations(text)


def projected(shape: Shape, rows: int, length: int, layer: int) -> dict[Feature, torch.Tensor]:
    sizes = (rows, shape.heads, length, shape.head_size)
    return {
        Feature(kind, layer): torch.randn(sizes, dtype=torch.float64)
        for kind in ("query", "key", "value")
    }


@pytest.mark.parametrize("relation_heads", [1, 2, 4])
@pytest.mark.parametrize("form", ["plain", "lean"])
def test_minilmv2_compares_models_of_other_heads_and_widths(relation_heads: int, form: str) -> None:
    relations = parse_relations("q-q+3*q-v+k-v")
    chosen = Settings((PAIR,), relation_heads=relation_heads, relations=relations, form=form)  # type: ignore[arg-type]
    objective = build_objective("minilmv2", chosen)
    check_models(objective, SMALL, LARGE)
    batch = ragged_batch((5, 2, 3))
    student, teacher = projected(SMALL, 3, 5, 1), projected(LARGE, 3, 5, 2)
    total = objective.totals(student, teacher, batch, {}) / batch.counts["tokens"]
    expected = reference.minilmv2(
        {f.kind: v for f, v in student.items()},
        {f.kind: v for f, v in teacher.items()},
        (5, 2, 3),
        relation_heads,
        relations,
    )
    torch.testing.assert_close(total.squeeze(), expected, rtol=1e-10, atol=1e-12)


def test_relations_among_the_models_own_heads_are_minilms() -> None:
    """With as many relation heads as heads, V-V is val-kl and Q-K is att-kl."""
    twin = replace(LARGE, heads=4, hidden=20)
    batch = ragged_batch((5, 2, 3))
    student, teacher = projected(SMALL, 3, 5, 1), projected(twin, 3, 5, 2)
    for relation, name in (("v-v", "val-kl"), ("q-k", "att-kl")):
        chosen = Settings((PAIR,), relation_heads=4, relations=parse_relations(relation))
        totals = build_objective(f"minilmv2+{name}", chosen).totals(student, teacher, batch, {})
        torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)


def test_relation_heads_that_do_not_divide_are_refused_with_those_that_do() -> None:
    objective = build_objective("minilmv2", Settings((PAIR,)))
    with pytest.raises(InputError, match="48 does not divide the student's.*12; .*1, 2, 4$"):
        check_models(objective, SMALL, LARGE)


def test_only_the_sides_of_the_relations_are_asked_for() -> None:
    chosen = Settings((PAIR,), relations=parse_relations("q-k"))
    assert build_objective("minilmv2", chosen).student_features() == {("query", 1), ("key", 1)}


def test_learned_maps_of_the_same_name_are_refused(user_package: Path) -> None:
    """A subclass of hid-seq that forgets its own `name`, beside hid-seq itself."""
    (user_package / "twins.py").write_text(
        "from pretrain.objectives.hidden import HidSeq\n\n\nclass Mine(HidSeq):\n    pass\n"
    )
    objective = build_objective("hid-seq+twins:Mine", Settings((PAIR,)))
    with pytest.raises(InputError, match="twins:Mine: another term .* hid-seq_1_2"):
        objective.projections(SMALL, LARGE)
