"""Which neurons stay, that every slice of the student takes them, and what cannot be cut."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.attention import plain_attention
from pretrain.encoder import encode
from pretrain.features import Feature
from pretrain.models import HEADS, UNTRAINED, Encoder, Shape, has_untrained_head
from pretrain.student.importance import importance
from pretrain.student.width import (
    INCONSISTENT,
    LOWEST,
    Kept,
    Scores,
    check_width,
    choose,
    extract,
    random_scores,
)
from tests.pretrain.tiny import FAMILIES, ragged_batch, tiny_encoder

LOGITS = Feature("logits", "all")
CPU = torch.device("cpu")
WIDTH, HEAD, FFN, EMBEDDING = 24, 6, 40, 16
"""Sizes of the tiny teachers; they differ, so that a tensor's sizes tell what its sides are."""


def logits(encoder: Encoder) -> Tensor:
    """Logits on a ragged batch."""
    batch = ragged_batch((9, 3, 12), encoder.model.config.pad_token_id)  # type: ignore[union-attr, arg-type]
    return encode(encoder.model, batch, {LOGITS}, plain_attention)[LOGITS].detach()


def scores_of(teacher: Encoder, method: str) -> Scores:
    """A teacher's scores by either method."""
    if method == "etd-rand":
        return random_scores(teacher.shape, seed=5)
    batch = ragged_batch((9, 3, 12), teacher.model.config.pad_token_id)  # type: ignore[union-attr, arg-type]
    return importance(teacher, [batch], plain_attention, CPU)


# --- nothing is lost, nothing depends on the order of neurons


@pytest.mark.parametrize("ablation", LOWEST)
@pytest.mark.parametrize("method", ["etd-impt", "etd-rand"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_of_all_layers_are_the_teacher(family: str, method: str, ablation: str) -> None:
    teacher = tiny_encoder(family, 1, dtype=torch.float32)
    kept = choose(scores_of(teacher, method), WIDTH, FFN, ablation)
    student = extract(teacher, kept, (1, 2, 3))
    assert student.shape == teacher.shape
    assert float((logits(student) - logits(teacher)).abs().max()) <= 1e-5


def permuted(teacher: Encoder, seed: int) -> Encoder:
    """The same function with hidden dimensions, head neurons and ffn neurons in other places."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(WIDTH, generator=draw)
    layers = range(teacher.shape.layers)
    ffn = [torch.randperm(FFN, generator=draw) for _ in layers]

    def in_heads() -> Tensor:
        starts = range(0, WIDTH, HEAD)
        return torch.cat([start + torch.randperm(HEAD, generator=draw) for start in starts])

    query_key, value = [in_heads() for _ in layers], [in_heads() for _ in layers]
    other = tiny_encoder(teacher.source, 1)
    for name, parameter in other.model.named_parameters():
        pieces = name.split(".layer.")
        number = int(pieces[1].split(".")[0]) if len(pieces) == 2 else -1
        for side, size in enumerate(parameter.shape):
            if size == FFN and number >= 0:  # there are as many positions, outside the layers
                order = ffn[number]
            elif size != WIDTH:
                continue
            elif side == 0 and ("self.query" in name or "self.key" in name):
                order = query_key[number]
            elif side == 0 and "self.value" in name:
                order = value[number]
            elif side == 1 and "attention.output.dense" in name:
                order = value[number]
            else:
                order = hidden
            parameter.data = parameter.data.index_select(side, order)
    other.model.tie_weights()  # type: ignore[operator]
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_a_permuted_teacher_gives_the_same_student(family: str) -> None:
    teacher = tiny_encoder(family, 1)
    other = permuted(teacher, seed=9)
    torch.testing.assert_close(logits(other), logits(teacher), rtol=1e-9, atol=1e-9)
    for ablation in set(LOWEST) - {INCONSISTENT}:
        one, two = (
            extract(each, choose(scores_of(each, "etd-impt"), 12, 20, ablation), (1, 3))
            for each in (teacher, other)
        )
        torch.testing.assert_close(logits(two), logits(one), rtol=1e-9, atol=1e-9)
        for (name, mine), yours in zip(
            one.model.named_parameters(), two.model.parameters(), strict=True
        ):
            torch.testing.assert_close(
                mine.flatten().sort().values, yours.flatten().sort().values, msg=name
            )


# --- every slice takes the right neurons


def marked(family: str) -> Encoder:
    """A teacher in whose weights stands where they are: 1000 * row + column."""
    teacher = tiny_encoder(family, 1)
    for parameter in teacher.model.parameters():
        rows = torch.arange(parameter.shape[0], dtype=torch.float64)
        columns = torch.arange(parameter.shape[-1], dtype=torch.float64)
        parameter.data = rows[:, None] * 1000 + columns if parameter.ndim == 2 else rows
    return teacher


def places(parameter: Tensor) -> tuple[list[int], list[int] | None]:
    """The teacher's rows and columns that a student's weight was taken from."""
    if parameter.ndim == 1:
        return parameter.int().tolist(), None
    rows, columns = parameter[:, 0] // 1000, parameter[0] % 1000
    assert torch.equal(parameter, rows[:, None] * 1000 + columns)
    return rows.int().tolist(), columns.int().tolist()


@pytest.mark.parametrize("ablation", ["none", INCONSISTENT])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_slice_takes_the_kept_neurons(family: str, ablation: str) -> None:
    teacher = marked(family)
    kept = choose(random_scores(teacher.shape, 3), 12, 20, ablation)
    student = extract(teacher, kept, (1, 3, 3))
    model: Any = student.model
    for m, number in enumerate((1, 3, 3)):
        layer = model.base_model.encoder.layer[m]
        hidden, ffn = list(kept.hidden[number - 1]), list(kept.ffn[number - 1])
        query_key, value = (
            [h * HEAD + i for h, one in enumerate(sets[number - 1]) for i in one]
            for sets in (kept.query_key, kept.value)
        )
        own, output = layer.attention.self, layer.attention.output
        assert places(own.query.weight) == places(own.key.weight) == (query_key, hidden)
        assert places(own.query.bias)[0] == places(own.key.bias)[0] == query_key
        assert places(own.value.weight) == (value, hidden)
        assert places(own.value.bias)[0] == value
        assert places(output.dense.weight) == (hidden, value)
        assert places(layer.intermediate.dense.weight) == (ffn, hidden)
        assert places(layer.intermediate.dense.bias)[0] == ffn
        assert places(layer.output.dense.weight) == (hidden, ffn)
        for part in (output.LayerNorm, layer.output.LayerNorm, output.dense, layer.output.dense):
            assert places(part.bias)[0] == hidden
    first, last = list(kept.hidden[0]), list(kept.hidden[-1])
    assert (first == last) == (ablation == "none")
    embeddings = model.base_model.embeddings
    narrow = family == "electra"
    columns = list(range(EMBEDDING)) if narrow else first
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        assert places(getattr(embeddings, name).weight)[1] == columns
    assert places(embeddings.LayerNorm.weight)[0] == columns
    if narrow:
        assert places(model.base_model.embeddings_project.weight) == (first, columns)
    dense, norm, decoder = head_parts(model)
    assert places(dense.weight) == (columns, last)
    assert places(dense.bias)[0] == places(norm.weight)[0] == places(norm.bias)[0] == columns
    assert decoder.weight is embeddings.word_embeddings.weight
    assert places(decoder.bias)[0] == list(range(teacher.shape.vocab))


def head_parts(model: Any) -> tuple[nn.Linear, nn.LayerNorm, nn.Linear]:
    """The MLM head's linear map, norm and decoder."""
    if hasattr(model, "cls"):
        transform = model.cls.predictions.transform
        return transform.dense, transform.LayerNorm, model.cls.predictions.decoder
    if hasattr(model, "lm_head"):
        return model.lm_head.dense, model.lm_head.layer_norm, model.lm_head.decoder
    own = model.generator_predictions
    return own.dense, own.LayerNorm, model.generator_lm_head


def test_electra_embeddings_as_wide_as_its_layers_are_cut_with_them() -> None:
    teacher = tiny_encoder("electra", 1, embedding_size=WIDTH)
    kept = choose(random_scores(teacher.shape, 3), 12, 20)
    student = extract(teacher, kept, (1, 2))
    assert student.shape.embedding == student.shape.hidden == 12
    assert logits(student).isfinite().all()


def test_electra_layers_may_become_narrower_than_its_embeddings() -> None:
    teacher = tiny_encoder("electra", 1)
    student = extract(teacher, choose(random_scores(teacher.shape, 3), 8, 20), (1, 2))
    assert (student.shape.hidden, student.shape.embedding) == (8, EMBEDDING)
    assert logits(student).isfinite().all()


def test_extraction_copies() -> None:
    teacher = tiny_encoder("bert", 1)
    student = extract(teacher, choose(random_scores(teacher.shape, 3), WIDTH, FFN), (1, 1, 2))
    before = logits(teacher)
    for parameter in student.model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(teacher), before)


# --- the choice


def some_scores() -> Scores:
    """Scores of 2 layers of width 4, 2 heads of 2, ffn 3."""
    return Scores(
        hidden=torch.tensor([[9.0, 1, 2, 3], [0, 4, 4, 8]]),
        query_key=torch.tensor([[[1.0, 2], [2, 1]], [[5, 5], [0, 1]]]),
        value=torch.tensor([[[2.0, 1], [1, 2]], [[0, 1], [1, 0]]]),
        ffn=torch.tensor([[3.0, 1, 2], [1, 2, 3]]),
    )


HIGHEST = Kept(
    hidden=((0, 3), (0, 3)),  # sums 9, 5, 6, 11
    query_key=(((1,), (0,)), ((0,), (1,))),  # of two that are equal, the first
    value=(((0,), (1,)), ((1,), (0,))),
    ffn=((0, 2), (1, 2)),
)


def test_the_highest_scores_stay_in_ascending_order() -> None:
    assert choose(some_scores(), 2, 2) == HIGHEST


def test_reversed_kinds_keep_the_lowest_and_no_other_kind_changes() -> None:
    lowest: dict[str, dict[str, Any]] = {
        "rev-ffn": {"ffn": ((1, 2), (0, 1))},
        "rev-hidden": {"hidden": ((1, 2), (1, 2))},
        "rev-head": {
            "query_key": (((0,), (1,)), ((0,), (0,))),
            "value": (((1,), (0,)), ((0,), (1,))),
        },
    }
    lowest["rev-all"] = {k: v for part in list(lowest.values()) for k, v in part.items()}
    for ablation, changed in lowest.items():
        found = choose(some_scores(), 2, 2, ablation)
        assert found == Kept(**(vars(HIGHEST) | changed)), ablation


def test_without_hidden_consistency_each_layer_keeps_its_own_dimensions() -> None:
    found = choose(some_scores(), 2, 2, INCONSISTENT)
    assert found == Kept(**(vars(HIGHEST) | {"hidden": ((0, 3), (1, 3))}))


def test_random_choices_are_uniform_and_come_from_the_seed() -> None:
    shape = tiny_encoder("bert", 1).shape
    counts = torch.zeros(WIDTH)
    for seed in range(400):
        counts[list(choose(random_scores(shape, seed), 12, 20).hidden[0])] += 1
    assert counts.sum() == 400 * 12
    assert 150 < counts.min() and counts.max() < 250  # 200 expected, standard deviation 10
    one, again, other = (choose(random_scores(shape, seed), 12, 20) for seed in (1, 1, 2))
    assert one == again != other
    assert one.query_key != one.value and one.ffn[0] != one.ffn[1]


# --- an untrained head


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_head_is_fresh_and_marked(family: str) -> None:
    known = tiny_encoder(family, 1)
    teacher = Encoder(known.model, known.shape, False, "a-teacher")
    kept = choose(random_scores(teacher.shape, 3), WIDTH, FFN)
    student = extract(teacher, kept, (1, 2, 3), seed=4)
    assert not student.trained_head and has_untrained_head(student.model.config)
    assert not torch.equal(head_parts(student.model)[0].weight, head_parts(teacher.model)[0].weight)
    again = extract(teacher, kept, (1, 2, 3), seed=4)
    assert torch.equal(head_parts(student.model)[0].weight, head_parts(again.model)[0].weight)
    assert not has_untrained_head(extract(known, kept, (1, 2, 3)).model.config)


def test_untrained_layers_are_marked_by_the_students_numbers() -> None:
    teacher = tiny_encoder("bert", 1)
    parts = ["bert.encoder.layer.2", "bert.encoder.layer.1.output", "bert.embeddings.LayerNorm"]
    setattr(teacher.model.config, UNTRAINED, parts)
    kept = choose(random_scores(teacher.shape, 3), 12, 20)
    config = extract(teacher, kept, (3, 2, 3)).model.config
    assert getattr(config, UNTRAINED) == [
        "bert.embeddings.LayerNorm",
        "bert.encoder.layer.0",
        "bert.encoder.layer.1.output",
        "bert.encoder.layer.2",
    ]
    assert HEADS["bert"][0] not in getattr(config, UNTRAINED)


# --- sizes


@pytest.mark.parametrize(
    ("hidden", "head_size", "ffn", "message"),
    [
        (800, None, 3072, r"--hidden 800: the teacher has only 768"),
        (384, None, 4000, r"--ffn 4000: the teacher has only 3072"),
        (400, None, 1536, r"--hidden 400 is not a multiple of .* 12 heads.*give 396 or 408"),
        (6, None, 1536, r"give 12"),
        (384, 40, 1536, r"--head_size 40: .*hidden / heads = 32 at --hidden 384.*--hidden 480"),
    ],
)
def test_impossible_widths_are_refused(
    hidden: int, head_size: int | None, ffn: int, message: str
) -> None:
    bert_base = Shape(12, 768, 12, 3072, 30522, 512, 768)
    with pytest.raises(InputError, match=message):
        check_width(bert_base, hidden, head_size, ffn)
    check_width(bert_base, 384, 32, 1536)


def test_electra_layers_just_as_wide_as_its_embeddings_are_refused() -> None:
    electra_small = Shape(12, 256, 4, 1024, 30522, 512, 128)
    with pytest.raises(InputError, match="--hidden 128 is the width of .* embeddings.*124 or 132"):
        check_width(electra_small, 128, None, 512)
    check_width(electra_small, 124, None, 512)
