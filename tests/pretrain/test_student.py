"""The student starts as asked, and exactly what the objective cannot reach stays frozen."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_prep.shard_format import FORMAT_VERSION, Manifest
from potstill.errors import InputError
from pretrain.attention import cpu_attention
from pretrain.config import StudentConfig
from pretrain.encoder import encode
from pretrain.features import Feature
from pretrain.models import HEADS, Encoder, load_encoder
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.step import Distillation, freeze_unreached, untrained_parts
from pretrain.student.build import build_student
from pretrain.teacher import Teacher, check_teacher
from tests.pretrain.tiny import FAMILIES, VOCAB, ragged_batch, tiny_encoder

MANIFEST = Manifest(
    format_version=FORMAT_VERSION,
    seq_length=16,
    seed=0,
    vocab_size=VOCAB,
    tokenizer_fingerprint="",
    special_ids={"pad": 0, "cls": 2, "sep": 3, "mask": 4},
    documents=2,
    splits={},
    files=[],
    tokenizer_files=[],
    sources=[],
    packing="",
    validation_fraction=0.5,
    rows_per_shard=1,
    skipped_texts=0,
)


def teacher_of(family: str = "bert", layers: int = 4, trained_head: bool = True) -> Encoder:
    encoder = tiny_encoder(family, 11, layers, torch.float32)
    return Encoder(encoder.model, encoder.shape, trained_head, "a-teacher")


def build(teacher: Encoder | None, seed: int = 0, **settings: Any) -> Encoder:
    return build_student(StudentConfig(**settings), teacher, MANIFEST, seed)


def equal_states(one: nn.Module, two: nn.Module) -> bool:
    """Whether all weights of two modules agree; they have the same names, at least one."""
    mine, yours = one.state_dict(), two.state_dict()
    assert mine.keys() == yours.keys() and mine
    return all(torch.equal(mine[name], yours[name]) for name in mine)


@pytest.mark.parametrize(
    ("init", "layers", "copied"),
    [("first", 2, [1, 2]), ("last", 2, [3, 4]), ("uniform", 2, [2, 4]), ("4,1,1", 3, [4, 1, 1])],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_embeddings_and_head_are_the_teachers(
    family: str, init: str, layers: int, copied: list[int]
) -> None:
    teacher = teacher_of(family)
    student = build(teacher, init=init, student_layers=layers)
    ours: Any = student.model
    theirs: Any = teacher.model
    assert len(ours.base_model.encoder.layer) == layers == student.shape.layers
    for own, number in zip(ours.base_model.encoder.layer, copied, strict=True):
        assert equal_states(own, theirs.base_model.encoder.layer[number - 1])
    assert equal_states(ours.base_model.embeddings, theirs.base_model.embeddings)
    if family == "electra":
        assert equal_states(
            ours.base_model.embeddings_project, theirs.base_model.embeddings_project
        )
    for part in HEADS[family]:
        assert equal_states(getattr(ours, part), getattr(theirs, part))
    assert student.trained_head
    # Word embeddings and the output layer stay one tensor.
    assert ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    # A copy: training the student leaves the teacher alone.
    ours.get_input_embeddings().weight.data.zero_()
    assert theirs.get_input_embeddings().weight.abs().sum() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_of_all_layers_gives_the_teachers_logits(family: str) -> None:
    teacher = teacher_of(family)
    student = build(teacher, init="first", student_layers=4)
    batch = ragged_batch((7, 3), teacher.model.config.pad_token_id)  # type: ignore[union-attr, arg-type]
    wanted = {Feature("logits", "all")}
    ours = encode(student.model.eval(), batch, wanted, cpu_attention)
    theirs = encode(teacher.model.eval(), batch, wanted, cpu_attention)
    assert torch.equal(ours[Feature("logits", "all")], theirs[Feature("logits", "all")])


def test_untrained_head_of_the_teacher_is_not_copied() -> None:
    teacher = teacher_of(trained_head=False)
    student = build(teacher, init="first", student_layers=2)
    assert not student.trained_head
    assert not equal_states(
        student.model.cls.predictions.transform,  # type: ignore[union-attr, arg-type]
        teacher.model.cls.predictions.transform,
    )  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_random_student_takes_the_asked_shape(family: str) -> None:
    teacher = teacher_of(family)
    student = build(teacher, student_layers=2, student_hidden=12, student_heads=3, student_ffn=20)
    shape = student.shape
    assert (shape.layers, shape.hidden, shape.heads, shape.ffn) == (2, 12, 3, 20)
    assert shape.vocab == teacher.shape.vocab and shape.positions == teacher.shape.positions
    assert not student.trained_head
    assert student.model.config.model_type == family  # type: ignore[union-attr]
    batch = ragged_batch((7, 3), teacher.model.config.pad_token_id)  # type: ignore[union-attr, arg-type]
    wanted = {Feature("hidden", 2), Feature("logits", "all")}
    features = encode(student.model, batch, wanted, cpu_attention)
    assert features[Feature("hidden", 2)].shape == (2, 7, 12)
    assert features[Feature("logits", "all")].shape == (10, VOCAB)


def test_defaults_are_half_the_layers_and_the_teachers_proportions() -> None:
    teacher = teacher_of(layers=4)
    assert build(teacher).shape.layers == 2
    narrow = build(teacher, student_hidden=12).shape
    assert (narrow.hidden, narrow.ffn, narrow.heads) == (12, 20, 4)  # 40 * 12 / 24
    assert build(teacher_of(layers=3)).shape.layers == 2
    alone = build(None, student_layers=1, student_hidden=16, student_heads=2).shape
    assert (alone.layers, alone.hidden, alone.vocab, alone.ffn) == (1, 16, VOCAB, 64)


def test_same_seed_same_student_and_callers_draws_are_left_alone() -> None:
    teacher = teacher_of()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one = build(teacher, seed=5)
    assert torch.equal(torch.rand(3), expected)
    assert equal_states(one.model, build(teacher, seed=5).model)
    assert not equal_states(one.model, build(teacher, seed=6).model)


def test_building_never_changes_the_teacher() -> None:
    teacher = teacher_of()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    config = teacher.model.config.to_dict()  # type: ignore[union-attr, operator]
    build(teacher, init="uniform", student_layers=2, dropout=0.4)
    build(teacher, student_hidden=12, student_layers=1, dropout=0.4)
    assert teacher.model.config.to_dict() == config  # type: ignore[union-attr, operator]
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_dropout_is_set_everywhere(family: str) -> None:
    model: Any = build(teacher_of(family), init="first", student_layers=2, dropout=0.35).model
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(rates) == 7 and set(rates) == {0.35}  # embeddings; three in each layer
    config = model.config
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.35
    calm: Any = build(teacher_of(family), init="first", student_layers=2).model
    assert {m.p for m in calm.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_dropout_0_makes_training_mode_deterministic() -> None:
    student = build(teacher_of(), init="first", student_layers=2, dropout=0.0).model
    batch, wanted = ragged_batch((7, 3)), {Feature("hidden", 2)}
    calm = encode(student.eval(), batch, wanted, cpu_attention)[Feature("hidden", 2)]
    assert torch.equal(
        encode(student.train(), batch, wanted, cpu_attention)[Feature("hidden", 2)], calm
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_hidden": 12}, "hidden_size differs: student 12, teacher 24"),
        ({"student_heads": 2}, "num_attention_heads differs: student 2, teacher 4"),
        ({"student_ffn": 41}, "intermediate_size differs: student 41, teacher 40"),
    ],
)
def test_copying_layers_into_another_width_is_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"--init first .*{message}.*--init random"):
        build(teacher_of(), init="first", student_layers=2, **change)


def test_heads_must_divide_the_hidden_size() -> None:
    with pytest.raises(InputError, match="--student_hidden 26 .*--student_heads 4"):
        build(teacher_of(), student_hidden=26)


def test_copying_without_a_teacher_is_refused() -> None:
    with pytest.raises(InputError, match="--init last .*--teacher"):
        build(None, init="last", student_layers=2)


def test_student_folder_is_taken_as_it_stands(tmp_path: Path) -> None:
    saved = tiny_encoder("roberta", 9, 2, torch.float32)
    saved.model.save_pretrained(tmp_path)  # type: ignore[operator]
    student = build(None, student=str(tmp_path), dropout=0.2)
    assert equal_states(student.model, saved.model) and student.trained_head
    assert student.model.config.hidden_dropout_prob == 0.2  # type: ignore[union-attr]


def distillation(name: str, pair: LayerPair, **settings: Any) -> tuple[Distillation, Teacher]:
    teacher = teacher_of(layers=4)
    student = build(teacher, init="uniform", student_layers=2, **settings)
    objective = build_objective(name, Settings((pair,), projection="always"))
    module = Distillation(student, teacher.shape, objective, cpu_attention)
    wanted = objective.teacher_features()
    return module, Teacher(teacher, wanted, cpu_attention, torch.device("cpu"), torch.float32)


REST_OF_LAYER = ["attention.output", "attention.self.value", "intermediate", "output"]
UNREACHED = {
    "att-mse": [f"bert.encoder.layer.1.{part}" for part in REST_OF_LAYER] + ["cls"],
    "val-kl": [
        f"bert.encoder.layer.1.{part}"
        for part in ["attention.output", "attention.self.key", "attention.self.query"]
        + ["intermediate", "output"]
    ]
    + ["cls"],
    "hid-seq": ["cls"],
    "hid-cls": ["cls"],
    "mlm": [],
    "kd": [],
}


@pytest.mark.parametrize("name", list(UNREACHED))
def test_exactly_what_the_objective_cannot_reach_is_frozen(name: str) -> None:
    module, teacher = distillation(name, LayerPair(2, 4))
    batch = ragged_batch((7, 3))
    before = {n: p.detach().clone() for n, p in module.student.named_parameters()}
    features = teacher.features(batch) if module.objective.uses_teacher else {}
    frozen = freeze_unreached(module, features, batch)
    assert untrained_parts(frozen, module.student) == UNREACHED[name]
    for parameter_name, parameter in module.student.named_parameters():
        assert parameter.requires_grad == (parameter_name not in frozen)
        assert parameter.grad is None and torch.equal(parameter, before[parameter_name])
        if parameter_name in frozen:
            assert torch.equal(frozen[parameter_name], parameter)
            assert frozen[parameter_name].data_ptr() != parameter.data_ptr()
    assert all(p.requires_grad and p.grad is None for p in module.projections.parameters())
    assert len(module.projections) == name.startswith("hid")


def test_uniform_att_mse_reaches_all_but_the_last_layers_rest() -> None:
    teacher = teacher_of(layers=4)
    student = build(teacher, student_layers=2)
    objective = build_objective("att-mse", Settings((LayerPair(1, 2),)))
    module = Distillation(student, teacher.shape, objective, cpu_attention)
    source = Teacher(
        teacher, objective.teacher_features(), cpu_attention, torch.device("cpu"), torch.float32
    )
    batch = ragged_batch((7, 3))
    frozen = freeze_unreached(module, source.features(batch), batch)
    parts = [f"bert.encoder.layer.0.{part}" for part in REST_OF_LAYER]
    assert untrained_parts(frozen, student.model) == [*parts, "bert.encoder.layer.1", "cls"]


def test_teacher_is_frozen_and_stays_as_it_was_through_a_step() -> None:
    module, teacher = distillation("att-mse+hid-seq+kd", LayerPair(2, 4), dropout=0.1)
    module.train()
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    batch = ragged_batch((7, 3))
    first = {f: v.clone() for f, v in teacher.features(batch).items()}
    for _ in range(2):
        module(batch, teacher.features(batch)).sum().backward()
        optimizer.step()
    assert not teacher.model.training and not any(m.training for m in teacher.model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name])
    for feature, value in teacher.features(batch).items():
        assert torch.equal(value, first[feature])  # no dropout, no drift


def test_teacher_without_a_head_is_refused_under_logits_only() -> None:
    teacher = teacher_of(trained_head=False)
    with pytest.raises(InputError, match="a-teacher has no trained MLM head.*kd"):
        check_teacher(teacher, {Feature("logits", "masked")}, "kd")
    check_teacher(teacher, {Feature("query", 4), Feature("hidden", 2)}, "att-mse")


def test_code_in_a_checkpoint_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass OwnConfig: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    with pytest.raises(InputError, match="--teacher"):
        load_encoder(str(folder), "--teacher")
    assert not marker.exists()
