"""Stored predictions: what a record holds; the loss of likeliest tokens and the others' mass."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.errors import InputError
from pretrain.batches import NO_LABEL, Batch
from pretrain.features import Feature, Positions, Predictions, TopLogits
from pretrain.knowledge.bits import Gaps, best_gaps, pack, unpack
from pretrain.knowledge.codecs import get_codec
from pretrain.knowledge.entries import record_type
from pretrain.knowledge.top_logits import TopK, WholeLogits
from pretrain.objectives import LayerPair, Settings, cross_entropy, prediction
from pretrain.objectives.prediction import KD, soft_cross_entropy
from tests import reference
from tests.pretrain.tiny import VOCAB, ragged_batch, tiny_masking

LENGTH, RAGGED, FULL = 12, (12, 3, 1, 7), (12, 12)
SLOTS: dict[Positions, int] = {"masked": tiny_masking().most(LENGTH), "all": LENGTH}


@pytest.fixture(autouse=True)
def fresh_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = int.from_bytes(os.urandom(4), "little")
    print(f"seed {chosen}")
    torch.manual_seed(chosen)
    monkeypatch.setattr(cross_entropy, "_BLOCK", 3 * VOCAB)  # blocks of three positions


@pytest.fixture(params=["blocks", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(prediction, "in_blocks", lambda logits: False)
    return str(request.param)


def draw(positions: int, spread: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (spread * torch.randn(positions, VOCAB, dtype=torch.float64)).to(dtype)


def cut(logits: Tensor, numbers: list[int], temperature: float = 1.0) -> TopLogits:
    """The `numbers[i]` likeliest tokens of every position, exactly; the other slots are unused."""
    logs = (logits.double() / temperature).log_softmax(-1)
    top, ids = logs.topk(max(numbers), -1)
    unused = torch.arange(max(numbers)) >= torch.tensor(numbers)[:, None]
    kept = torch.zeros_like(logs).scatter(1, ids, (~unused).double()) > 0
    rest = logs.exp().masked_fill(kept, 0).sum(-1)
    return TopLogits(ids.masked_fill(unused, 0), top.masked_fill(unused, -torch.inf), rest)


def known(top: TopLogits) -> list[dict[int, float]]:
    """The probabilities of a `TopLogits` by token."""
    rows = zip(top.ids.tolist(), top.log_probabilities.double().exp().tolist(), strict=True)
    return [
        {token: p for token, p in zip(tokens, probabilities, strict=True) if p > 0}
        for tokens, probabilities in rows
    ]


def slope(value: Tensor, logits: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value, logits)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 2.3])
def test_the_loss_and_its_gradient_equal_the_reference(form: str, temperature: float) -> None:
    numbers = [5, 1, 3, 9, 2, 7, 4]
    student, teacher = draw(7).requires_grad_(), draw(7)
    top = cut(teacher, numbers, temperature)
    used = torch.arange(7) != 3
    value = soft_cross_entropy(student, top, temperature, used)
    counted = [number for number, own in zip(known(top), used.tolist(), strict=True) if own]
    expected = 6 * reference.top_kd(student[used], counted, temperature)
    torch.testing.assert_close(value, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(slope(value, student), slope(expected, student))


def test_with_every_token_kept_it_is_the_whole_kd(form: str) -> None:
    student, teacher = draw(5).requires_grad_(), draw(5)
    value = soft_cross_entropy(student, cut(teacher, [VOCAB] * 5, 1.7), 1.7)
    whole = soft_cross_entropy(student, teacher, 1.7)
    torch.testing.assert_close(value, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope(value, student), slope(whole, student))


@pytest.mark.parametrize("gap", [-60.0, 30.0, 200.0])
def test_tiny_and_great_masses_lose_no_digits(form: str, gap: float) -> None:
    """Student and teacher differ; what the others weigh is e^-gap of what is kept."""
    student, teacher = draw(4, 0.5, torch.float32), draw(4, 0.5)
    student[:, :3] += gap
    student.requires_grad_()
    teacher[:, :3] += max(-12, min(gap, 12))
    ids = torch.arange(3).expand(4, 3)
    logs = teacher.log_softmax(-1)
    top = TopLogits(ids, logs[:, :3].float(), logs[:, 3:].exp().sum(-1).float())
    exact = student.detach().double().requires_grad_()
    others = exact.log_softmax(-1)[:, 3:].logsumexp(-1)
    own = (top.log_probabilities.double().exp() * exact.log_softmax(-1)[:, :3]).sum(-1)
    expected = -(own + top.rest.double() * others).sum()
    value = soft_cross_entropy(student, top, 1.0)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=4e-6)  # a log's own error
    wanted = slope(expected, exact)
    torch.testing.assert_close(slope(value, student).double(), wanted, rtol=1e-4, atol=1e-7)


def test_unused_slots_change_no_bit(form: str) -> None:
    student = draw(3).requires_grad_()
    top = cut(draw(3), [4, 4, 4])
    more = torch.nn.functional.pad(top.ids, (0, 3)), torch.full((3, 3), -torch.inf)
    wider = TopLogits(more[0], torch.cat([top.log_probabilities, more[1]], 1), top.rest)
    value, same = (soft_cross_entropy(student, each, 1.0) for each in (top, wider))
    assert value.equal(same)
    assert slope(value, student).equal(slope(same, student))


@pytest.mark.parametrize("kind", ["whole", "top"])
@pytest.mark.parametrize("positions", ["masked", "all"])
def test_kd_in_chunks_takes_stored_logits(positions: Positions, kind: str) -> None:
    batch = ragged_batch(RAGGED, length=LENGTH)
    count = len(batch.masked) if positions == "masked" else batch.counts["tokens"]
    weight, hidden = torch.randn(6, VOCAB).double(), torch.randn(count, 6).double()
    hidden.requires_grad_()
    teacher = draw(count)
    stored = teacher if kind == "whole" else cut(teacher, [3] * count)
    given = {Feature("logits", positions): stored}
    students: list[Any] = [hidden @ weight, Predictions(hidden, lambda h: h @ weight, VOCAB)]
    totals = []
    for chunks, student in zip((0, 3), students, strict=True):
        settings = Settings((LayerPair(1, 1),), positions=positions, logit_chunks=chunks)
        wish = Feature("predictions" if chunks else "logits", positions)
        totals.append(KD(settings).total({wish: student}, given, batch, {}))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(slope(totals[0], hidden), slope(totals[1], hidden))


@pytest.mark.parametrize("bits", [1, 3, 4, 8, 11])
def test_packed_bits_come_back(bits: int) -> None:
    values = torch.randint(2**bits, (3, 17))
    packed = np.stack([pack(row.numpy(), bits) for row in values])
    assert packed.shape == (3, -(-17 * bits // 8))
    assert unpack(torch.from_numpy(packed), bits, 17).equal(values)


@pytest.mark.parametrize("width", [0, 2, 8])
@pytest.mark.parametrize("chosen", ["some", "first", "last", "all", "none"])
def test_ascending_numbers_come_back_from_their_gaps(chosen: str, width: int) -> None:
    limit = 300
    whole = np.arange(limit)
    numbers = {
        "some": np.flatnonzero(torch.rand(limit).numpy() < 0.1),
        "first": whole[:40],
        "last": whole[-1:],
        "all": whole,
        "none": whole[:0],
    }[chosen]
    code = Gaps(max(40, len(numbers)), limit, width)
    marked, low = code.encode(numbers)
    assert len(marked) == -(-code.marks // 8)
    padded = np.zeros((1, code.count), np.int64)
    padded[0, : len(low)] = low
    decoded, used = code.decode(torch.from_numpy(marked)[None], torch.from_numpy(padded))
    assert decoded[0][used[0]].tolist() == numbers.tolist()


def test_the_code_of_gaps_is_near_the_least() -> None:
    """log2 of the number of sets is the least that any code of random sets takes."""
    count, limit = 19 * 128, 19 * 30522
    least = torch.lgamma(torch.tensor([limit + 1.0, count + 1.0, limit - count + 1.0]).double())
    least_bits = float(least[0] - least[1] - least[2]) / np.log(2)
    code = best_gaps(count, limit)
    assert least_bits < code.marks + count * code.width < least_bits + 0.65 * count


def top_entry(positions: Positions, k: int = 4, temperature: float = 1.0) -> TopK:
    return TopK(Feature("logits", positions), SLOTS[positions], VOCAB, k, temperature)


def live(batch: Batch, positions: Positions, spread: float = 2.0) -> Tensor:
    """What a live teacher gives; at unused masked slots, the logits of the first token."""
    count = len(batch.masked) if positions == "masked" else batch.counts["tokens"]
    return draw(count, spread, torch.float32)


def counted(batch: Batch, positions: Positions) -> Tensor:
    return (
        batch.labels != NO_LABEL
        if positions == "masked"
        else torch.ones(batch.counts["tokens"], dtype=torch.bool)
    )


def as_tensors(stored: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in stored.items()}


def kept_and_decoded(batch: Batch, positions: Positions, k: int, t: float) -> tuple[Any, ...]:
    entry, logits = top_entry(positions, k, t), live(batch, positions)
    stored = entry.encode({entry.feature: logits}, batch)
    return logits, entry.decode(as_tensors(stored), batch, torch.float32)


@pytest.mark.parametrize("lengths", [RAGGED, FULL])
@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (4, 1.0), (4, 2.0), (20, 0.6), (60, 1.0)])
def test_a_row_keeps_its_likeliest_tokens_and_an_honest_rest(
    lengths: tuple[int, ...], positions: Positions, k: int, temperature: float
) -> None:
    batch = ragged_batch(lengths, length=LENGTH)
    logits, top = kept_and_decoded(batch, positions, k, temperature)
    exact = (logits.double() / temperature).softmax(-1)
    places = batch.masked if positions == "masked" else torch.nonzero(batch.valid.flatten())[:, 0]
    used = counted(batch, positions)
    assert top.log_probabilities.shape[1] == min(4 * k, VOCAB)
    for row in range(len(lengths)):
        own = torch.nonzero(used & (places // LENGTH == row))[:, 0].tolist()
        kept = {(n, token) for n in own for token in known(top)[n]}
        assert len(kept) == k * len(own)
        assert {(n, int(exact[n].argmax())) for n in own} <= kept
        least = (
            min(
                float(exact[n, token])
                for n, token in kept - {(n, int(exact[n].argmax())) for n in own}
            )
            if k > 1 and own
            else 1.0
        )
        for n in own:
            if len(known(top)[n]) < min(4 * k, VOCAB):  # else it has no more slots
                others = exact[n].clone()
                others[list(known(top)[n])] = 0
                assert float(others.max()) <= least * (1 + 1e-6)
    for n in torch.nonzero(used)[:, 0].tolist():
        rest = 1 - float(exact[n, list(known(top)[n])].sum())
        assert float(top.rest[n]) == pytest.approx(rest, rel=1e-3, abs=2e-7)
        assert sum(known(top)[n].values()) + float(top.rest[n]) == pytest.approx(1, abs=1e-5)
    assert not top.rest[~used].any()
    assert top.log_probabilities[~used].isneginf().all()


@pytest.mark.parametrize("positions", ["masked", "all"])
def test_coarse_levels_cost_little(positions: Positions) -> None:
    """The mean KL from the exact to the stored probabilities of the same tokens."""
    batch = ragged_batch((LENGTH,) * 8)
    logits, top = kept_and_decoded(batch, positions, 8, 1.0)
    exact = logits.double().log_softmax(-1).gather(1, top.ids)
    apart = exact - top.log_probabilities.double()
    errors = (exact.exp() * apart).masked_fill(top.log_probabilities.isneginf(), 0).sum(-1)
    assert 0 <= float(errors.mean()) < 1e-3


def test_a_position_that_keeps_every_token_has_no_rest() -> None:
    """A flat position beside one that is sure takes what the other does not need."""
    batch = ragged_batch((2,), probability=0)
    entry = TopK(Feature("logits", "all"), 2, VOCAB, 40, 1.0)
    logits = torch.stack([torch.rand(VOCAB), -40.0 * torch.arange(VOCAB)])
    top = entry.decode(as_tensors(entry.encode({entry.feature: logits}, batch)), batch, torch.half)
    assert [len(tokens) for tokens in known(top)][0] == VOCAB
    assert top.rest[0] == 0
    assert 0 < float(top.rest[1]) < 2e-7
    loss = soft_cross_entropy(logits.clone().requires_grad_(), top, 1.0)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("positions", ["masked", "all"])
@pytest.mark.parametrize("whole", [True, False])
def test_bytes_of_a_row_depend_on_the_row_alone(positions: Positions, whole: bool) -> None:
    batch = ragged_batch(RAGGED, length=LENGTH)
    logits = live(batch, positions)
    feature = Feature("logits", positions)
    coded = WholeLogits(feature, get_codec("fp32"), SLOTS[positions], VOCAB)
    entry = coded if whole else top_entry(positions)
    together = entry.encode({feature: logits}, batch)
    record = record_type((entry,))
    assert set(together) == set(record.names or ())
    places = batch.masked if positions == "masked" else torch.nonzero(batch.valid.flatten())[:, 0]
    for row in range(len(RAGGED)):
        own = counted(batch, positions) & (places // LENGTH == row)
        lone = _row_of(batch, row, own)
        unused = SLOTS["masked"] - int(own.sum()) if positions == "masked" else 0
        noise = 100 * torch.randn(unused, VOCAB)  # what a live teacher says where nothing counts
        alone = entry.encode({feature: torch.cat([logits[own], noise])}, lone)
        for name, values in together.items():
            assert values.dtype == record[name].base
            assert values.shape[1:] == record[name].shape
            assert values[row].tobytes() == alone[name][0].tobytes()


def _row_of(batch: Batch, row: int, own: Tensor) -> Batch:
    """One row as a batch of its own; `own`: which of the batch's masked positions are its."""
    ids, valid = batch.input_ids[[row]], batch.valid[[row]]
    slots = SLOTS["masked"]
    masked, labels = torch.zeros(slots, dtype=torch.int64), torch.full((slots,), NO_LABEL)
    if len(own) == len(batch.masked):
        masked[: int(own.sum())] = batch.masked[own] - row * LENGTH
        labels[: int(own.sum())] = batch.labels[own]
    full = bool(valid.all())
    places = torch.zeros(0, dtype=torch.int64) if full else torch.nonzero(valid[0])[:, 0]
    return Batch(ids, valid, masked, labels, full, {"tokens": int(valid.sum())}, places)


@pytest.mark.parametrize("lengths", [RAGGED, FULL])
@pytest.mark.parametrize("positions", ["masked", "all"])
def test_whole_float32_logits_are_the_live_teachers_to_the_bit(
    positions: Positions, lengths: tuple[int, ...]
) -> None:
    batch = ragged_batch(lengths, length=LENGTH)
    feature, logits = Feature("logits", positions), live(batch, positions)
    entry = WholeLogits(feature, get_codec("fp32"), SLOTS[positions], VOCAB)
    stored = as_tensors(entry.encode({feature: logits}, batch))
    decoded = entry.decode(stored, batch, torch.float32)
    used = counted(batch, positions)
    assert decoded.shape == logits.shape
    assert decoded[used].equal(logits[used])
    student = live(batch, positions).requires_grad_()
    objective = KD(Settings((LayerPair(1, 1),), positions=positions))
    ours, theirs = (
        objective.total({feature: student}, {feature: given}, batch, {})
        for given in (decoded, logits)
    )
    assert ours.equal(theirs)
    assert slope(ours, student).equal(slope(theirs, student))


@pytest.mark.parametrize("k", [0, VOCAB])
def test_a_number_of_tokens_that_cuts_nothing_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"--logits_top_k {k} must lie between 1 and {VOCAB - 1}"):
        top_entry("masked", k)


def test_a_teacher_that_overflows_is_refused() -> None:
    batch, entry = ragged_batch(FULL), top_entry("all")
    logits = live(batch, "all")
    logits[3, 5] = torch.inf
    with pytest.raises(InputError, match="logits-all is not finite"):
        entry.encode({entry.feature: logits}, batch)
