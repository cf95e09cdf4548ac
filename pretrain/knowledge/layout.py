"""What is stored for an objective: its features, each as the entry that the cut makes of it."""

from collections.abc import Iterable

from potstill.errors import InputError
from pretrain.features import Feature, Kind
from pretrain.knowledge.choices import Neurons, Tokens
from pretrain.knowledge.codecs import get_codec
from pretrain.knowledge.cuts import Cut, parse_cut
from pretrain.knowledge.entries import Entry
from pretrain.knowledge.format import Contents, StoredFeature
from pretrain.knowledge.hidden import SIDES, CutHidden, CutScores, Whole
from pretrain.knowledge.top_logits import TopK, WholeLogits
from pretrain.masking import most_masked
from pretrain.models import Shape
from pretrain.objectives.base import Objective
from pretrain.objectives.composite import WeightedSum

_SCORES: dict[Kind, Kind] = {side: kind for kind, sides in SIDES.items() for side in sides}


def cut_of(contents: Contents) -> Cut:
    """The cut that a knowledge was stored under."""
    flags = (contents.keep, contents.keep_depth, contents.keep_length, contents.keep_width)
    return parse_cut(*(flag or None for flag in flags))


def features_of(objective: WeightedSum, cut: Cut) -> list[StoredFeature]:
    """What must be stored for an objective: of projections that are cut in length, scores."""
    first_only = {
        feature: all(
            term.first_token_only
            for term in objective.objectives
            if feature in term.teacher_features()
        )
        for feature in objective.teacher_features()
    }
    stored = {_stored_as(feature, cut): first for feature, first in first_only.items()}
    return [
        StoredFeature(kind, at, first)
        for (kind, at), first in sorted(stored.items(), key=lambda item: str(item[0]))
    ]


def _stored_as(feature: Feature, cut: Cut) -> Feature:
    if feature.kind == "predictions":
        return Feature("logits", feature.at)
    if feature.kind in _SCORES and cut.tokens is not None:
        return Feature(_SCORES[feature.kind], feature.at)
    return feature


def make_entries(contents: Contents, teacher: Shape) -> tuple[Entry, ...]:
    """The entries of a knowledge, in the order of their fields."""
    cut = cut_of(contents)
    return tuple(_entry(stored, contents, cut, teacher) for stored in contents.features)


def _entry(stored: StoredFeature, contents: Contents, cut: Cut, teacher: Shape) -> Entry:
    feature = Feature(stored.kind, stored.at)  # type: ignore[arg-type]
    precision, length = contents.dtype, contents.seq_length
    if stored.kind == "logits":
        return _logits(feature, contents, teacher)
    one = Cut(tokens=1, width=cut.width, neurons=cut.neurons) if stored.first_token else cut
    if one.whole or (one.tokens is None and stored.kind != "hidden"):
        heads = 1 if stored.kind == "hidden" else teacher.heads
        return Whole(feature, precision, length, teacher.hidden, heads)  # type: ignore[arg-type]
    layer = max(1, int(stored.at))  # the embeddings have no attention: that of the layer on them
    tokens = Tokens(one.slots(length), one.length, length, layer, contents.sep_id)
    if stored.kind != "hidden":
        return CutScores(feature, precision, tokens, teacher.heads)  # type: ignore[arg-type]
    kept = one.kept_neurons(teacher.hidden)
    neurons = Neurons(kept, one.neurons, teacher.hidden, contents.seed)
    narrow = neurons if cut.width is not None else None
    return CutHidden(feature, precision, tokens, teacher.hidden, narrow)  # type: ignore[arg-type]


def _logits(feature: Feature, contents: Contents, teacher: Shape) -> Entry:
    slots = contents.seq_length
    if feature.at == "masked":
        slots = most_masked(contents.mlm_probability, slots)
    if not contents.logits_top_k:
        codec = get_codec(contents.dtype)  # type: ignore[arg-type]
        return WholeLogits(feature, codec, slots, teacher.vocab)
    return TopK(feature, slots, teacher.vocab, contents.logits_top_k, contents.kd_temperature)


def check_needs(contents: Contents, wanted: Iterable[Feature], objective: WeightedSum) -> None:
    """Refuse an objective that asks for more than what is stored.

    Raises:
        InputError: a feature that is not stored, or only of the first token, or predictions at
            another temperature.
    """
    cut = cut_of(contents)
    for name, term in zip(objective.names, objective.objectives, strict=True):
        term.check_cut(name, cut)
        check_predictions(name, term, contents.logits_top_k)
        _check_temperature(contents, term)
    stored = {(one.kind, one.at): one for one in contents.features}
    first_only = {(one.kind, one.at): one.first_token for one in features_of(objective, cut)}
    for feature in sorted(wanted, key=str):
        kind, at = found = _stored_as(feature, cut)
        if found not in stored:
            have = ", ".join(f"{one.kind} {one.at}" for one in contents.features)
            raise InputError(
                f"--knowledge has no {kind} {at}, which the objective learns from (it has: {have}; "
                f"it was stored for --objective {contents.objective} --layers {contents.layers})"
            )
        if stored[found].first_token and not first_only[found]:
            raise InputError(
                f"--knowledge has {kind} {at} of the first token only, as --objective "
                f"{contents.objective} asks for; store it again for this objective"
            )


def check_predictions(name: str, term: Objective, top_k: int) -> None:
    """Refuse likeliest tokens for an objective that wants all logits; `name` is the user's.

    Args:
        top_k: 0 stores all.

    Raises:
        InputError: a class that knows no cut, of a user's own.
    """
    if top_k and _learns_predictions(term) and not term.takes_cut:
        raise InputError(
            f"--logits_top_k {top_k}: --objective {name} compares all logits and cannot learn from "
            "the likeliest; store them without it, or take another objective"
        )


def _learns_predictions(term: Objective) -> bool:
    return any(kind in ("logits", "predictions") for kind, _ in term.teacher_features())


def _check_temperature(contents: Contents, term: Objective) -> None:
    """Refuse likeliest tokens whose probabilities are those of another temperature."""
    asked, stored = term.settings.temperature, contents.kd_temperature
    if contents.logits_top_k and _learns_predictions(term) and asked != stored:
        raise InputError(
            f"--kd_temperature {asked}: --knowledge has the likeliest tokens at temperature "
            f"{stored}; give --kd_temperature {stored}, or store it again"
        )
