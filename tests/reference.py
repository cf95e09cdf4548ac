"""The objectives once more, slowly: float64 loops over sequences, heads and positions.

Written from the formulas of the papers (ACL 2023, sections 2 and 3; MiniLM, section 3), not from
the code of `pretrain.objectives`, which is tested against them. Only scalars and single vectors
are ever added up here: no batched product, no mask, no broadcasting over a sequence. Inputs keep
their autograd graph, so that gradients can be compared as well.

Shapes: hidden (B, L, D); query, key, value (B, H, L, d); logits (P, V). `lengths` counts the real
tokens of each sequence; padding stands behind them. Every function gives a float64 scalar. Where
knowledge is cut, means run over what is `kept`: bool (B, L, D) of hidden states, or each sequence's
queries.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner product of two vectors."""
    return (left.double() * right.double()).sum()


def log_softmax(numbers: Sequence[Tensor]) -> list[Tensor]:
    """log(e^x_i / sum_j e^x_j) of a list of scalars."""
    highest = max(float(number.detach()) for number in numbers)
    total = torch.stack([torch.exp(number - highest) for number in numbers]).sum()
    return [number - highest - torch.log(total) for number in numbers]


def mean(numbers: Sequence[Tensor]) -> Tensor:
    """Arithmetic mean of a list of scalars."""
    return torch.stack(list(numbers)).sum() / len(numbers)


def mlm(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(original token), mean over masked positions. Logits (P, V), labels (P,)."""
    losses = []
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        losses.append(-log_softmax(list(row))[label])
    return mean(losses)


def kd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """CE(softmax(z^T/t), log_softmax(z^S/t)) * t^2, mean over positions. Logits (P, V)."""
    losses = []
    for own, other in zip(student.double(), teacher.double(), strict=True):
        own_log = log_softmax([z / temperature for z in own])
        other_log = log_softmax([z / temperature for z in other])
        entropies = [-torch.exp(q) * p for p, q in zip(own_log, other_log, strict=True)]
        losses.append(torch.stack(entropies).sum() * temperature**2)
    return mean(losses)


def top_kd(
    student: Tensor, known: Sequence[Mapping[int, float]], temperature: float = 1.0
) -> Tensor:
    """`kd` with a teacher of whom some probabilities at t are known, all others only together.

    Logits (P, V); for each position the known probabilities by token. Mean over positions.
    """
    losses = []
    for own, probabilities in zip(student.double(), known, strict=True):
        own_log = log_softmax([z / temperature for z in own])
        loss = torch.stack([-p * own_log[token] for token, p in probabilities.items()]).sum()
        rest = 1 - math.fsum(probabilities.values())
        others = [torch.exp(q) for token, q in enumerate(own_log) if token not in probabilities]
        if others:
            loss = loss - rest * torch.log(torch.stack(others).sum())
        losses.append(loss * temperature**2)
    return mean(losses)


def vanilla_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """`kd` plus `mlm`, both at the masked positions."""
    return kd(student, teacher) + mlm(student, labels)


def mapped(vector: Tensor, weight: Tensor | None) -> Tensor:
    """h W, one output at a time; W is (student width, teacher width), None for the identity."""
    if weight is None:
        return vector.double()
    return torch.stack([dot(vector, weight[:, column]) for column in range(weight.shape[1])])


def hid_cls(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of the first token's hidden state, mean over sequences and dimensions."""
    errors = []
    for own, other in zip(student, teacher, strict=True):
        difference = mapped(own[0], weight) - other[0].double()
        errors += [component**2 for component in difference]
    return mean(errors)


def hid_seq(
    student: Tensor,
    teacher: Tensor,
    lengths: Sequence[int],
    weight: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Squared error of hidden states, mean over real tokens and dimensions."""
    errors = []
    for row, (own, other, length) in enumerate(zip(student, teacher, lengths, strict=True)):
        for position in range(length):
            difference = mapped(own[position], weight) - other[position].double()
            for neuron, component in enumerate(difference):
                if kept is None or bool(kept[row, position, neuron]):
                    errors.append(component**2)
    return mean(errors)


def scores(left: Tensor, right: Tensor, length: int) -> list[list[Tensor]]:
    """<left_i, right_j> / sqrt(d) for the real positions i, j of one head, (L, d) each."""
    scale = math.sqrt(left.shape[-1])
    return [[dot(left[i], right[j]) / scale for j in range(length)] for i in range(length)]


def att_mse(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    kept: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Squared error of attention scores before the softmax. Each model gives (query, key).

    Mean over heads and over the pairs of a real query and a real key.
    """
    errors = []
    for sequence, length in enumerate(lengths):
        for head in range(student[0].shape[1]):
            own = scores(student[0][sequence, head], student[1][sequence, head], length)
            other = scores(teacher[0][sequence, head], teacher[1][sequence, head], length)
            for i in range(length) if kept is None else kept[sequence]:
                for j in range(length):
                    errors.append((own[i][j] - other[i][j]) ** 2)
    return mean(errors)


def relation_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    kept: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """KL(softmax(teacher's scores) || softmax(student's)), softmax over the real keys.

    Mean over heads and real queries. Each model gives the two sides of the score.
    """
    divergences = []
    for sequence, length in enumerate(lengths):
        for head in range(student[0].shape[1]):
            own = scores(student[0][sequence, head], student[1][sequence, head], length)
            other = scores(teacher[0][sequence, head], teacher[1][sequence, head], length)
            for i in range(length) if kept is None else kept[sequence]:
                p, q = log_softmax(other[i]), log_softmax(own[i])
                terms = [torch.exp(a) * (a - b) for a, b in zip(p, q, strict=True)]
                divergences.append(torch.stack(terms).sum())
    return mean(divergences)


def att_kl(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], lengths: Sequence[int]
) -> Tensor:
    """KL of attention distributions. Each model gives (query, key)."""
    return relation_kl(student, teacher, lengths)


def val_kl(student: Tensor, teacher: Tensor, lengths: Sequence[int]) -> Tensor:
    """KL of value relations: scores <v_i, v_j> / sqrt(d) (MiniLM). Each model gives its values."""
    return relation_kl((student, student), (teacher, teacher), lengths)


def length_of(vector: Tensor) -> Tensor:
    """The 2-norm of a vector."""
    return torch.sqrt(dot(vector, vector))


def cos(
    student: Tensor,
    teacher: Tensor,
    lengths: Sequence[int],
    weight: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """1 - cosine of hidden states, mean over real tokens (DistilBERT)."""
    distances = []
    for row, (own, other, length) in enumerate(zip(student, teacher, lengths, strict=True)):
        for position in range(length):
            left, right = mapped(own[position], weight), other[position].double()
            if kept is not None:
                neurons = kept[row, position].nonzero().flatten().tolist()
                if not neurons:
                    continue
                left, right = left[neurons], right[neurons]
            distances.append(1 - dot(left, right) / (length_of(left) * length_of(right)))
    return mean(distances)


def hid_cls_contrast(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    own_map: Tensor,
    other_map: Tensor,
    temperature: float,
) -> Tensor:
    """InfoNCE of first tokens: the own teacher vector against those in memory (K, D_T).

    Maps are (width of the model, width of the common space).
    """

    def unit(vector: Tensor, weight: Tensor) -> Tensor:
        image = mapped(vector, weight)
        return image / length_of(image)

    negatives = [unit(vector, other_map) for vector in memory]
    losses = []
    for own, other in zip(student, teacher, strict=True):
        anchor = unit(own[0], own_map)
        candidates = [unit(other[0], other_map), *negatives]
        losses.append(-log_softmax([dot(anchor, c) / temperature for c in candidates])[0])
    return mean(losses)


def regrouped(projected: Tensor, relation_heads: int) -> Tensor:
    """(B, H, L, d) to (B, A, L, H d / A): the heads side by side, cut into A equal parts."""
    rows, heads, length, size = projected.shape
    width = heads * size // relation_heads
    columns = [projected[:, e // size, :, e % size] for e in range(heads * size)]
    parts = [
        torch.stack(columns[a * width : (a + 1) * width], dim=-1) for a in range(relation_heads)
    ]
    return torch.stack(parts, dim=1)


def minilmv2(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    lengths: Sequence[int],
    relation_heads: int,
    relations: Sequence[tuple[str, str, float]],
) -> Tensor:
    """Weighted KLs of relations of regrouped heads. Models give query, key, value by name."""
    total = torch.zeros((), dtype=torch.float64)
    for left, right, weight in relations:
        ours, theirs = (
            (regrouped(model[left], relation_heads), regrouped(model[right], relation_heads))
            for model in (student, teacher)
        )
        total = total + weight * relation_kl(ours, theirs, lengths)
    return total


def one_minus_correlation(own: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """1 - Pearson's r of two lists of scalars; 0 where the second does not vary."""
    own_mean, other_mean = mean(own), mean(other)
    variances = [
        mean([(x - m) ** 2 for x in xs]) for xs, m in ((own, own_mean), (other, other_mean))
    ]
    if float(variances[1].detach()) < 1e-20:
        return 0 * own_mean
    covariance = mean([(x - own_mean) * (y - other_mean) for x, y in zip(own, other, strict=True)])
    return 1 - covariance / torch.sqrt(variances[0] * variances[1])


def pearson(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    along: str,
) -> Tensor:
    """1 - r of attention probabilities along "keys", "queries" or "heads", mean over the rest."""
    distances = []
    heads = range(student[0].shape[1])
    for sequence, length in enumerate(lengths):
        own, other = (
            [
                [
                    [torch.exp(x) for x in log_softmax(row)]
                    for row in scores(model[0][sequence, head], model[1][sequence, head], length)
                ]
                for head in heads
            ]
            for model in (student, teacher)
        )
        tokens = range(length)
        vectors: dict[str, list[list[tuple[int, int, int]]]] = {
            "keys": [[(h, i, j) for j in tokens] for h in heads for i in tokens],
            "queries": [[(h, i, j) for i in tokens] for h in heads for j in tokens],
            "heads": [[(h, i, j) for h in heads] for i in tokens for j in tokens],
        }
        for places in vectors[along]:
            distances.append(
                one_minus_correlation(
                    [own[h][i][j] for h, i, j in places], [other[h][i][j] for h, i, j in places]
                )
            )
    return mean(distances)


def codec_bound(value: float, largest: float, precision: str) -> float:
    """How far a number on disk may be off, in a vector whose largest one is `largest`.

    A floating-point number with p bits behind its first is off by 2^-(p + 1) of itself, or by half
    of the smallest step. In 8 bits numbers are divided by s = largest / 127 (int8) or / 448 (fp8
    e4m3: p = 3, steps of 2^-9 at the least), s itself being rounded to bfloat16, by 2^-9 at most.
    """
    if precision == "int8":
        return largest / 127 * (1 + 2**-9) / 2
    if precision == "fp8":
        return max(abs(value) * 2**-4, largest / 448 * (1 + 2**-9) * 2**-10)
    bits, step = {"fp32": (23, 2**-149), "bf16": (7, 2**-133), "fp16": (10, 2**-24)}[precision]
    return max(abs(value) * 2 ** -(bits + 1), step / 2)
