"""FLOP formulas against PyTorch's own counter on real forward and backward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pretrain.attention import Attention, plain_attention, sdpa_attention
from pretrain.batches import Batch
from pretrain.features import Feature
from pretrain.flops import Cost, Work, forward_flops, student_flops, training_flops
from pretrain.models import Encoder, Shape
from pretrain.objectives import OBJECTIVES, LayerPair, Settings, build_objective
from pretrain.objectives.composite import WeightedSum
from pretrain.objectives.relation import CHUNKS
from pretrain.step import Distillation, freeze_encoder, freeze_unreached
from pretrain.teacher import Teacher
from tests.pretrain.tiny import ragged_batch, tiny_encoder

BASE = Shape(12, 768, 12, 3072, 30522, 512, 768)
HALF = Shape(6, 768, 12, 3072, 30522, 512, 768)
LAST = Settings((LayerPair(6, 12),))
EXACT = 1e-9

ROWS, LENGTH = 5, 24
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "as wide": ("bert", {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 100}),
    "narrow": ("bert", {"hidden_size": 20, "num_attention_heads": 4, "intermediate_size": 60}),
    "roberta": ("roberta", {"hidden_size": 28, "num_attention_heads": 4}),
    "electra": ("electra", {"hidden_size": 48, "num_attention_heads": 4, "embedding_size": 20}),
}
"""Student shapes beside a teacher of 48 in 4 heads of 12: heads of 12, 5, 7 and 12."""

TEACHER = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 100}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"form": "plain", "positions": "masked"},
    "lean": {"form": "lean", "positions": "all", "logit_chunks": 3},
}
TOGETHER = ("distilbert", "vanilla-kd", "tinybert", "minilm", "kd+att-mse", "mlm+hid-seq")


def build(
    family: str, sizes: dict[str, Any], attention: Attention, objective: WeightedSum
) -> tuple[Encoder, Encoder, Distillation, Teacher]:
    """Student (2 layers) and teacher (3), the module that is trained, the source of features."""
    student = tiny_encoder(family, 1, 2, torch.float32, **sizes)
    teacher = tiny_encoder(family, 2, 3, torch.float32, **(sizes | TEACHER))
    torch.manual_seed(0)
    module = Distillation(student, teacher.shape, objective, attention)
    wanted = objective.teacher_features()
    source = Teacher(teacher, wanted, attention, torch.device("cpu"), torch.float32)
    return student, teacher, module, source


def counted(step: Callable[[], Any]) -> int:
    """FLOPs of a step by PyTorch's counter, which does not know the CPU's fused kernel."""
    kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    gradient: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {kernel: fused, gradient: fused_backward}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        step()
    return counter.get_total_flops()


def fused(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def fused_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Twice the forward: that it forms the scores again is its own affair."""
    return 2 * sdpa_flop_count(query, key, value)


def full_batch() -> tuple[Batch, Work]:
    batch = ragged_batch((LENGTH,) * ROWS)
    return batch, Work(ROWS, LENGTH, len(batch.masked) / (ROWS * LENGTH))


@pytest.mark.parametrize("who", STUDENTS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", [*OBJECTIVES, *TOGETHER])
def test_formulas_equal_the_counter(name: str, settings: str, who: str) -> None:
    """Forward of both models, backward of the student, products of the objective; to the last."""
    family, sizes = STUDENTS[who]
    pairs = (LayerPair(1, 2), LayerPair(2, 3))
    given = SETTINGS[settings] | {"relation_heads": 4, "negatives": 6, "contrast_width": 10}
    objective = build_objective(name, Settings(pairs, **given))
    student, teacher, module, source = build(family, sizes, plain_attention, objective)
    batch, work = full_batch()

    def step() -> None:
        features = source.features(batch) if source.wanted else {}
        module(batch, features).sum().backward()

    total = counted(step)
    per_token = training_flops(objective, student.shape, teacher.shape, work)
    assert per_token * ROWS * LENGTH == pytest.approx(total, rel=EXACT)


def test_fused_attention_costs_what_the_written_out_form_does() -> None:
    objective = build_objective("att-mse", Settings((LayerPair(2, 3),)))
    student, teacher, module, source = build(*STUDENTS["as wide"], sdpa_attention, objective)
    batch, work = full_batch()
    total = counted(lambda: module(batch, source.features(batch)).sum().backward())
    per_token = training_flops(objective, student.shape, teacher.shape, work)
    assert per_token * ROWS * LENGTH == pytest.approx(total, rel=EXACT)


@pytest.mark.parametrize("name", ["mlm", "kd"])
def test_a_frozen_encoders_backward_is_the_heads(name: str) -> None:
    objective = build_objective(name, Settings((LayerPair(2, 3),)))
    student, teacher, module, source = build(*STUDENTS["as wide"], plain_attention, objective)
    batch, work = full_batch()
    features = source.features(batch) if source.wanted else {}
    freeze_encoder(module)
    freeze_unreached(module, features, batch)
    total = counted(lambda: module(batch, features).sum().backward())
    per_token = student_flops(objective, student.shape, teacher.shape, work, frozen=True)
    assert per_token * ROWS * LENGTH == pytest.approx(total, rel=EXACT)


def test_chunked_kd_runs_no_head_of_a_stored_teacher() -> None:
    objective = build_objective("kd", Settings((), **SETTINGS["lean"], stored=True))
    student, teacher, module, source = build("bert", TEACHER, plain_attention, objective)
    batch, work = full_batch()
    source.wanted = frozenset({Feature("logits", "all")})
    stored = {name: value.clone() for name, value in source.features(batch).items()}
    total = counted(lambda: module(batch, stored).sum().backward())
    per_token = student_flops(objective, student.shape, teacher.shape, work)
    assert per_token * ROWS * LENGTH == pytest.approx(total, rel=EXACT)


def test_a_divergence_in_several_chunks_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHUNKS["cpu"] > ROWS * 4 * LENGTH**2, "one chunk in the tests above"
    monkeypatch.setitem(CHUNKS, "cpu", 7 * LENGTH)
    test_formulas_equal_the_counter("att-kl", "lean", "narrow")


def test_att_mse_of_the_papers_pair_costs_388_mflop_a_token() -> None:
    """388.5 M per token; by hand: 3 (5 l + p) + 11 l + p, with l = 14.549 M, p = 2.556 M."""
    flops = training_flops(build_objective("att-mse", LAST), HALF, BASE, Work(16, 128, 0.15))
    layer = 8 * 768**2 + 4 * 768 * 3072 + 4 * 128 * 768
    projected = 2 * 2 * 768**2 + 2 * 128 * 768
    assert flops == 3 * (5 * layer + projected) + 11 * layer + projected
    assert flops / 1e6 == pytest.approx(388.5, abs=0.05)


def test_parts_of_a_768_wide_model_cost_what_the_lab_notes_say() -> None:
    one = forward_flops(BASE, {Feature("hidden", 1)}, 128, 0.15)
    head = forward_flops(BASE, {Feature("logits", "all")}, 128, 0.15) - 12 * one
    masked = forward_flops(BASE, {Feature("logits", "masked")}, 128, 0.15) - 12 * one
    assert one / 1e6 == pytest.approx(14.55, abs=0.005)
    assert head / 1e6 == pytest.approx(48.1, abs=0.05)
    assert masked / 1e6 == pytest.approx(7.2, abs=0.05)


def test_logit_kd_on_masked_positions_costs_465_mflop_a_token() -> None:
    flops = training_flops(build_objective("kd", LAST), HALF, BASE, Work(16, 128, 0.15))
    assert flops / 1e6 == pytest.approx(465, abs=0.5)


def test_the_gram_form_costs_less_from_four_head_sizes_on() -> None:
    """Per token and head of 64: scores 6 L d + 2 L d, Gram 12 (2 d)^2; equal at L = 384."""
    objective, shape = build_objective("att-mse", LAST), HALF
    short, long = (objective.flops(shape, shape, Work(1, length, 0.0)) for length in (384, 2048))
    assert sum(short) == 12 * 384 * 8 * 64
    assert sum(long) == 12 * 12 * 128**2 == sum(short)


def test_teacher_is_free_where_nothing_is_wanted_of_it() -> None:
    work = Work(16, 128, 0.15)
    alone = 3 * forward_flops(HALF, {Feature("logits", "masked")}, 128, 0.15)
    assert training_flops(build_objective("mlm", LAST), HALF, BASE, work) == alone
    assert forward_flops(BASE, set(), 128, 0.15) == 0


def test_costs_of_several_layers_add_up() -> None:
    assert Cost(1.0, 2.0).times(3) == Cost(3.0, 6.0)
