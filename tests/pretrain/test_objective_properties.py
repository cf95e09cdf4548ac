"""What holds for every objective, on shapes, lengths and numbers that hypothesis chooses."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.batches import Batch
from pretrain.features import Feature
from pretrain.models import Shape
from pretrain.objectives import OBJECTIVES, LayerPair, Settings, build_objective
from pretrain.objectives.composite import WeightedSum
from pretrain.objectives.contrast import ContrastSpace
from tests.pretrain.tiny import VOCAB, ragged_batch

DISTANCES = sorted(set(OBJECTIVES) - {"mlm", "kd", "hid-cls-contrast"})
"""Zero for equal models: `mlm` has no teacher, `kd` an entropy, contrast a right answer to find."""
SMALL = settings(max_examples=25, deadline=None)
PAIR = LayerPair(1, 2)

shapes = st.builds(
    lambda heads, size: Shape(2, heads * size, heads, 8, VOCAB, 40, heads * size),
    st.integers(1, 4),
    st.integers(1, 5),
)
lengths = st.lists(st.integers(1, 9), min_size=1, max_size=4)
names = st.sampled_from(sorted(OBJECTIVES))
seeds = st.integers(0, 2**32 - 1)
forms = st.sampled_from(["plain", "lean"])


def features(batch: Batch, shape: Shape, layer: int, seed: int) -> dict[Feature, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, length = batch.input_ids.shape
    heads = (rows, shape.heads, length, shape.head_size)
    sizes = {
        Feature("logits", "masked"): (len(batch.masked), shape.vocab),
        Feature("hidden", 0): (rows, length, shape.hidden),
        Feature("hidden", layer): (rows, length, shape.hidden),
        **{Feature(kind, layer): heads for kind in ("query", "key", "value")},
    }
    return {
        f: torch.randn(size, generator=generator, dtype=torch.float64) for f, size in sizes.items()
    }


def objective_of(name: str, form: str, own: Shape, other: Shape) -> tuple[WeightedSum, dict]:
    """The objective, with a relation head for each head, and its maps."""
    chosen = Settings((PAIR,), relation_heads=own.heads, form=form, negatives=3)  # type: ignore[arg-type]
    objective = build_objective(name, chosen)
    maps = dict(objective.projections(own, other).double().items())
    for space in maps.values():
        if isinstance(space, ContrastSpace):  # with vectors to tell the right one from
            space.remember(torch.randn(5, other.hidden, dtype=torch.float64))
    return objective, maps


@SMALL
@given(st.sampled_from(DISTANCES), shapes, lengths, seeds, forms)
def test_equal_models_are_at_distance_zero(
    name: str, shape: Shape, lengths: list[int], seed: int, form: str
) -> None:
    batch = ragged_batch(lengths, seed=seed)
    objective, maps = objective_of(name, form, shape, shape)
    teacher = features(batch, shape, PAIR.teacher, seed)
    student = {
        f._replace(at=PAIR.student if f.at == PAIR.teacher else f.at): v for f, v in teacher.items()
    }
    total = objective.totals(student, teacher, batch, maps)
    assert total.abs().max() < 1e-9


@SMALL
@given(names, shapes, st.integers(1, 5), lengths, seeds, st.integers(1, 6), forms)
def test_more_padding_never_changes_a_loss(
    name: str, own: Shape, size: int, lengths: list[int], seed: int, more: int, form: str
) -> None:
    """The same rows in a wider batch: whatever stands behind them."""
    other = Shape(2, own.heads * size, own.heads, 8, VOCAB, 40, own.heads * size)
    narrow = ragged_batch(lengths, seed=seed)
    objective, maps = objective_of(name, form, own, other)
    student = features(narrow, own, PAIR.student, seed)
    teacher = features(narrow, other, PAIR.teacher, seed + 1)
    before = objective.totals(student, teacher, narrow, maps)
    length = narrow.input_ids.shape[1]
    behind = torch.zeros(len(lengths), more, dtype=torch.bool)
    ids = torch.cat([narrow.input_ids, behind.to(narrow.input_ids.dtype)], dim=1)
    rows, columns = narrow.masked // length, narrow.masked % length
    valid = torch.cat([narrow.valid, behind], dim=1)
    wide = Batch(
        ids,
        valid,
        rows * (length + more) + columns,
        narrow.labels,
        False,
        narrow.counts,
        valid.flatten().nonzero().squeeze(1),
    )

    def widened(feature: Feature, value: torch.Tensor) -> torch.Tensor:
        if feature.kind == "logits":
            return value
        noise = list(value.shape)
        noise[-2] = more
        return torch.cat([value, torch.full(noise, 7.5, dtype=value.dtype)], dim=-2)

    after = objective.totals(
        {f: widened(f, v) for f, v in student.items()},
        {f: widened(f, v) for f, v in teacher.items()},
        wide,
        maps,
    )
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-10)


@SMALL
@given(
    names, shapes, st.lists(st.integers(1, 7), min_size=2, max_size=4), seeds, forms, st.randoms()
)
def test_order_and_cut_of_a_batch_never_change_a_loss(
    name: str, shape: Shape, lengths: list[int], seed: int, form: str, random: object
) -> None:
    """Rows in another order, and one by one as if on ranks or in micro-batches of their own."""
    batch = ragged_batch(lengths, seed=seed)
    objective, maps = objective_of(name, form, shape, shape)
    student = features(batch, shape, PAIR.student, seed)
    teacher = features(batch, shape, PAIR.teacher, seed + 1)
    whole = objective.totals(student, teacher, batch, maps)
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for cut in ([order], [[row] for row in order]):
        parts = [
            objective.totals(
                {f: rows_of(batch, f, v, rows) for f, v in student.items()},
                {f: rows_of(batch, f, v, rows) for f, v in teacher.items()},
                part_of(batch, rows),
                maps,
            )
            for rows in cut
        ]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-9, atol=1e-10)
        counted = [objective.counts(part_of(batch, rows)) for rows in cut]
        assert [sum(units) for units in zip(*counted, strict=True)] == objective.counts(batch)


def masked_of(batch: Batch, rows: list[int]) -> list[int]:
    """Places, among a batch's masked positions, of those in some rows, row by row."""
    length, used = batch.input_ids.shape[1], batch.masked[: batch.counts["masked"]].tolist()
    return [i for row in rows for i, at in enumerate(used) if at // length == row]


def rows_of(batch: Batch, feature: Feature, value: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return value[masked_of(batch, rows) if feature.kind == "logits" else rows]


def part_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, in the order given."""
    length = batch.input_ids.shape[1]
    places = masked_of(batch, rows)
    positions = [
        rows.index(int(at) // length) * length + int(at) % length for at in batch.masked[places]
    ]
    valid = batch.valid[rows]
    lengths = valid.sum(dim=1)
    counts = {
        "sequences": len(rows),
        "tokens": int(lengths.sum()),
        "masked": len(places),
        "pairs": int(lengths.square().sum()),
    }
    masked = torch.tensor(positions, dtype=torch.int64)
    full = bool(valid.all())
    flat = torch.zeros(0, dtype=torch.int64) if full else valid.flatten().nonzero().squeeze(1)
    return Batch(batch.input_ids[rows], valid, masked, batch.labels[places], full, counts, flat)
