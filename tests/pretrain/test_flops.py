"""FLOP formulas against PyTorch's own counter on real forward and backward passes."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.attention import plain_attention
from pretrain.features import Feature
from pretrain.flops import forward_flops, peak_flops, training_flops
from pretrain.models import Shape
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.step import Distillation
from pretrain.teacher import Teacher
from tests.pretrain.tiny import ragged_batch, tiny_encoder

BASE = Shape(12, 768, 12, 3072, 30522, 512, 768)
HALF = Shape(6, 768, 12, 3072, 30522, 512, 768)
LAST = Settings((LayerPair(6, 12),))
TOLERANCE = 0.01
"""What the formulas leave out (a hidden-state projection) or round (masked positions)."""

SHAPES: list[tuple[str, dict[str, Any], int]] = [
    ("bert", {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 192}, 24),
    ("electra", {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 100}, 40),
]


@pytest.mark.parametrize(("family", "sizes", "length"), SHAPES, ids=["bert", "electra"])
@pytest.mark.parametrize("layers", [(2, 3), (1, 2)], ids=["last", "middle"])
@pytest.mark.parametrize(
    "name",
    ["mlm", "kd", "vanilla-kd", "hid-cls", "hid-seq", "att-mse", "att-kl", "val-kl"]
    + ["att-mse+hid-seq", "att-kl+val-kl", "kd+att-mse"],
)
def test_formulas_equal_the_counter(
    name: str, layers: tuple[int, int], family: str, sizes: dict[str, Any], length: int
) -> None:
    student = tiny_encoder(family, 1, 2, torch.float32, **sizes)
    teacher = tiny_encoder(family, 2, 3, torch.float32, **sizes)
    objective = build_objective(name, Settings((LayerPair(*layers),)))
    module = Distillation(student, teacher.shape, objective, plain_attention)
    source = Teacher(
        teacher, objective.teacher_features(), plain_attention, torch.device("cpu"), torch.float32
    )
    batch = ragged_batch((length,) * 5)
    assert batch.full
    with FlopCounterMode(display=False) as counter:
        features = source.features(batch) if objective.uses_teacher else {}
        module(batch, features).sum().backward()
    tokens = batch.counts["tokens"]
    per_token = training_flops(
        student.shape,
        objective.student_features(),
        teacher.shape,
        objective.teacher_features(),
        length,
        batch.counts["masked"] / tokens,
    )
    assert counter.get_total_flops() > 0
    assert per_token * tokens == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)


def test_att_mse_of_the_papers_pair_costs_388_mflop_a_token() -> None:
    """388.5 M per token; by hand: 3 (5 l + p) + 11 l + p, with l = 14.549 M, p = 2.556 M."""
    objective = build_objective("att-mse", LAST)
    flops = training_flops(
        HALF, objective.student_features(), BASE, objective.teacher_features(), 128, 0.15
    )
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
    objective = build_objective("kd", LAST)
    wanted = objective.student_features()
    flops = training_flops(HALF, wanted, BASE, wanted, 128, 0.15)
    assert flops / 1e6 == pytest.approx(465, abs=0.5)


def test_teacher_is_free_where_nothing_is_wanted_of_it() -> None:
    wanted = {Feature("logits", "masked")}
    alone = training_flops(HALF, wanted, None, set(), 128, 0.15)
    assert training_flops(HALF, wanted, BASE, set(), 128, 0.15) == alone
    assert alone == 3 * forward_flops(HALF, wanted, 128, 0.15)


def test_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
