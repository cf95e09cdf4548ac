"""What of a student is compared with knowledge that was cut (`pretrain.knowledge`).

Only what is kept is ever looked at: the student's other tokens and neurons get no gradient.
"""

import math

import torch
from torch import Tensor

from pretrain.features import Kept, KeptScores
from pretrain.objectives.base import full_precision
from pretrain.objectives.relation import Sides, scores


def at_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Those of hidden states (B, L, …) that stand at places (B, T) of their rows: (B, T, …)."""
    rows, length = hidden.shape[:2]
    first = torch.arange(rows, device=tokens.device)[:, None] * length
    chosen = hidden.flatten(0, 1).index_select(0, (tokens + first).flatten())
    return chosen.unflatten(0, tokens.shape)


def at_neurons(hidden: Tensor, neurons: Tensor) -> Tensor:
    """Those of the neurons (B, T, D) at places that broadcast with (B, T, W): (B, T, W)."""
    return hidden.gather(-1, neurons.expand(*hidden.shape[:2], neurons.shape[-1]))


def first_token(hidden: Tensor | Kept) -> Tensor | Kept:
    """The first token's hidden states, (B, 1, D), of all or of those that are kept."""
    if isinstance(hidden, Tensor):
        return hidden[:, :1]
    neurons = hidden.neurons
    if neurons is not None and neurons.dim() == 3:
        neurons = neurons[:, :1]
    return Kept(hidden.values[:, :1], hidden.tokens[:, :1], hidden.used[:, :1], neurons)


def kept_scores(sides: Sides, tokens: Tensor) -> Tensor:
    """Scores of the queries at places (B, T) with all keys, in float32 or more: (B, H, T, L)."""
    left = at_tokens(sides.left.transpose(1, 2), tokens).transpose(1, 2)
    return scores(Sides(left, sides.right))


def first_query_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scores of the first token, [CLS], with all keys: (B, H, L). query, key: (B, H, L, d)."""
    return scores(Sides(query[:, :, :1], key)).squeeze(2)


def squared_error_kept(student: Sides, teacher: KeptScores, valid: Tensor) -> Tensor:
    """Squared differences of scores, summed over kept queries and valid keys, mean over heads.

    Args:
        student: all of it, with the teacher's heads. valid: bool (B, L).
    """
    counted = teacher.used[:, None, :, None] & valid[:, None, None, :]
    difference = kept_scores(student, teacher.tokens) - full_precision(teacher.values)
    return difference.masked_fill(~counted, 0).square().sum() / difference.shape[1]


def divergence_kept(student: Sides, teacher: KeptScores, valid: Tensor) -> Tensor:
    """`KL(softmax(teacher's scores) || softmax(student's))` of the kept queries.

    Args:
        student: all of it, with the teacher's heads. valid: bool (B, L), the keys that count.

    Returns:
        The sum over kept queries, averaged over heads.
    """
    padding = ~valid[:, None, None, :]
    ours = kept_scores(student, teacher.tokens).masked_fill(padding, -math.inf).log_softmax(-1)
    theirs = full_precision(teacher.values).masked_fill(padding, -math.inf).log_softmax(-1)
    difference = (theirs - ours).masked_fill(padding, 0)  # both are -inf there
    kl = (theirs.exp() * difference).sum(dim=-1)
    return kl.mean(dim=1).masked_fill(~teacher.used, 0).sum()
