"""The memory of `hid-cls-contrast`: what goes in, what comes out, when."""

import pytest
import torch
from torch import Tensor

from pretrain.features import Feature
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.objectives.contrast import ContrastSpace
from tests.pretrain.tiny import ragged_batch


def numbered(first: int, last: int) -> Tensor:
    """Vectors (N, 2) that begin with their number."""
    numbers = torch.arange(first, last + 1, dtype=torch.float32)
    return torch.stack([numbers, torch.ones_like(numbers)], dim=1)


def test_memory_is_a_ring_of_the_newest_vectors() -> None:
    space = ContrastSpace(3, 2, 2, negatives=4)
    held = []
    for first, last in [(1, 3), (4, 6), (7, 7), (8, 17)]:
        space.remember(numbered(first, last))
        filled = space.memory[: int(space.written)]
        held.append(sorted(filled[:, 0].tolist()))
    assert held == [[1, 2, 3], [3, 4, 5, 6], [4, 5, 6, 7], [14, 15, 16, 17]]
    assert int(space.written) == 17


def test_how_a_step_is_cut_never_changes_the_ring() -> None:
    """Vectors one by one leave the same memory, place by place, as all of them at once."""
    spaces = [ContrastSpace(3, 2, 2, negatives=5) for _ in range(2)]
    spaces[0].remember(numbered(1, 13))
    for number in range(1, 14):
        spaces[1].remember(numbered(number, number))
    assert torch.equal(spaces[0].memory, spaces[1].memory)


def test_first_step_costs_nothing_and_teaches_nothing() -> None:
    objective = build_objective("hid-cls-contrast", Settings((LayerPair(1, 1),), negatives=3))
    space = ContrastSpace(4, 4, 3, negatives=3)
    batch = ragged_batch((4, 2))
    hidden = torch.randn(2, 4, 4, requires_grad=True)
    feature, projections = Feature("hidden", 1), {"hid-cls-contrast_1_1": space}
    teacher = {feature: torch.randn(2, 4, 4)}
    totals = objective.totals({feature: hidden}, teacher, batch, projections)
    totals.sum().backward()
    assert totals.tolist() == [0.0] and hidden.grad is not None and not hidden.grad.any()
    objective.remember([objective.note(teacher)], projections)
    assert torch.equal(space.memory[:2], teacher[feature][:, 0]) and int(space.written) == 2
    assert objective.totals({feature: hidden}, teacher, batch, projections) > 0


def test_memory_stands_in_the_state_that_checkpoints_hold() -> None:
    space, other = (ContrastSpace(3, 2, 2, negatives=4) for _ in range(2))
    space.remember(numbered(1, 6))
    other.load_state_dict(space.state_dict())
    assert torch.equal(other.memory, space.memory) and int(other.written) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("buffers", [torch.bfloat16, torch.float32])
def test_space_works_in_any_precision(dtype: torch.dtype, buffers: torch.dtype) -> None:
    """An engine casts parameters, and may leave buffers as they are."""
    space = ContrastSpace(3, 2, 2, negatives=4).to(dtype)
    space.memory = space.memory.to(buffers)
    space.remember(numbered(1, 2).to(dtype))
    assert space.memory.dtype == buffers and space.written.dtype == torch.int64
    positive, negative = space(torch.randn(5, 3, dtype=dtype), torch.randn(5, 2, dtype=dtype))
    assert positive.dtype == negative.dtype == torch.float32
    assert torch.isinf(negative[:, 2:]).all() and torch.isfinite(negative[:, :2]).all()
