"""What every objective is: a frozen object that names the features it wants and returns sums."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind, Positions
from pretrain.flops import Cost, Work
from pretrain.knowledge.cuts import Cut
from pretrain.models import Shape

Unit = Literal["sequences", "tokens", "masked", "pairs"]
Counted = Literal[Unit, "kept_tokens", "kept_pairs"]
CutForm = Literal["none", "kept", "masked"]
ProjectionMode = Literal["auto", "always", "none"]
Form = Literal["auto", "plain", "lean"]

LEAN_FROM = 512
"""Tokens in a row from which `auto` takes the memory-lean form of objectives on attention.

Measured on a CPU by `benchmarks/lean_forms.py`: at 128 tokens the plain `att-mse` is several times
faster; from 512 on the lean forms win. KLs are lean on a CPU at any length, where that is faster.
"""
_KEPT: dict[Unit, Counted] = {"tokens": "kept_tokens", "pairs": "kept_pairs"}


class LayerPair(NamedTuple):
    """Student layer `student` learns from teacher layer `teacher`; 0 is the embedding output."""

    student: int
    teacher: int


class Relation(NamedTuple):
    """Scaled dot products of two kinds of projections, and their weight in `minilmv2`."""

    left: Kind
    right: Kind
    weight: float


SELF_RELATIONS = (
    Relation("query", "query", 1 / 3),
    Relation("key", "key", 1 / 3),
    Relation("value", "value", 1 / 3),
)


@dataclass(frozen=True)
class Settings:
    """What the objectives of a run share.

    Attributes:
        pairs: the mapped layers.
        temperature, positions: of `kd`.
        projection: where a learned map W from the student's to the teacher's width stands.
        relation_heads, relations: of `minilmv2`.
        negatives, contrast_temperature, contrast_width: of `hid-cls-contrast`: vectors in its
            memory, temperature, and width of the space in which vectors are compared.
        form: how objectives on attention are computed; `auto` goes by the length of a row and, for
            KLs, by the device.
        logit_chunks: in how many parts `kd` computes the logits of both models; 0 is the plain
            form.
        cut: what a mean runs over where knowledge is cut: "kept", what is stored of it; "masked",
            all tokens, pairs and neurons, as if zeros stood in both models in place of the rest.
        kept_tokens: of a row at most, where knowledge is cut in length: FLOPs are counted by it.
        stored: whether the teacher's features are read, and none of its products is computed.
    """

    pairs: tuple[LayerPair, ...]
    temperature: float = 1.0
    positions: Positions = "masked"
    projection: ProjectionMode = "auto"
    relation_heads: int = 48
    relations: tuple[Relation, ...] = SELF_RELATIONS
    negatives: int = 4096
    contrast_temperature: float = 0.07
    contrast_width: int = 128
    form: Form = "auto"
    logit_chunks: int = 0
    cut: CutForm = "none"
    kept_tokens: int | None = None
    stored: bool = False

    def lean(self, length: int) -> bool:
        """Whether rows of `length` tokens get the memory-lean form."""
        return self.form == "lean" or (self.form == "auto" and length >= LEAN_FROM)

    def share(self, length: int) -> float:
        """The share of tokens that are compared, in rows of `length`."""
        return 1.0 if self.kept_tokens is None else min(self.kept_tokens, length) / length


@dataclass(frozen=True)
class Objective(ABC):
    """A loss as a sum over units; the step divides once, by the units of all ranks.

    Class attributes:
        needs: kinds of features, the same of both models.
        unit: what the definition's mean runs over, besides heads and width (which `total`
            averages itself): an entry of `Batch.counts`.
        uses_teacher: whether it learns from a teacher at all.
        takes_cut: whether `total` knows what cut knowledge gives in place of whole features.
        first_token_only: whether no other token's hidden state is looked at.
    """

    settings: Settings
    needs: ClassVar[tuple[Kind, ...]]
    unit: ClassVar[Unit]
    uses_teacher: ClassVar[bool] = True
    takes_cut: ClassVar[bool] = False
    first_token_only: ClassVar[bool] = False

    @property
    def counted(self) -> Counted:
        """The unit of this instance; some depend on the settings."""
        kept = self.takes_cut and self.settings.cut == "kept"
        return _KEPT.get(self.unit, self.unit) if kept else self.unit

    @property
    def pairs(self) -> tuple[LayerPair, ...]:
        """The layers that this objective compares."""
        return self.settings.pairs

    def student_features(self) -> frozenset[Feature]:
        """The features that the student must give."""
        return frozenset(Feature(kind, pair.student) for kind in self.needs for pair in self.pairs)

    def teacher_features(self) -> frozenset[Feature]:
        """The features that the teacher must give."""
        return frozenset(Feature(kind, pair.teacher) for kind in self.needs for pair in self.pairs)

    def check(self, name: str, student: Shape, teacher: Shape) -> None:
        """Refuse a pair of models that this objective cannot compare; `name` is the user's.

        Raises:
            InputError: what they do not share, or a layer as in `check_layers`.
        """
        self.check_layers(name)

    def check_layers(self, name: str) -> None:
        """Refuse layers that this objective cannot compare, whatever the models.

        Raises:
            InputError: attention of layer 0 is wanted, the embeddings, which have none.
        """
        layers = [layer for pair in self.pairs for layer in pair]
        if 0 in layers and {"query", "key", "value"} & set(self.needs):
            raise InputError(
                f"--objective {name} compares attention, which layer 0 (the embeddings) has not; "
                "take --layers from 1 on"
            )

    def check_cut(self, name: str, cut: Cut) -> None:
        """Refuse a cut that this objective cannot learn from; `name` is the user's.

        Raises:
            InputError: it compares what the cut leaves out.
        """
        cut_in_length = cut.tokens is not None and bool(set(self.needs) - {"logits", "predictions"})
        cut_in_width = cut.width is not None and "hidden" in self.needs
        if not self.takes_cut and (cut_in_length or cut_in_width):
            part = f"{cut.tokens}t" if cut_in_length else f"{cut.width}h"
            raise InputError(
                f"--keep {part}: --objective {name} compares whole rows and cannot learn from a "
                "part of them; leave that part of --keep out, or take another objective"
            )
        if self.first_token_only and cut_in_length and cut.length != "left_first":
            raise InputError(
                f"--keep_length {cut.length} need not keep the first token, the only one that "
                f"--objective {name} compares; take --keep_length left_first"
            )

    def projections(self, student: Shape, teacher: Shape) -> dict[str, nn.Module]:
        """The learned maps that this objective needs, by a name of their own."""
        return {}

    def flops(self, student: Shape, teacher: Shape, work: Work) -> Cost:
        """FLOPs per token of the products that `total` computes itself, beyond the features."""
        return Cost()

    @abstractmethod
    def total(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        projections: Mapping[str, nn.Module],
    ) -> Tensor:
        """The loss summed over the units of a micro-batch and over the mapped layers.

        Returns:
            A float32 scalar (float64 for float64 features).
        """

    def note(self, teacher: Features) -> Mapping[str, Tensor]:
        """What of a micro-batch's teacher features to keep until the step is done, by any name."""
        return {}

    def remember(  # noqa: B027  (most objectives have nothing to remember)
        self, notes: Sequence[Mapping[str, Tensor]], projections: Mapping[str, nn.Module]
    ) -> None:
        """Learn from a finished step, given the notes of its micro-batches.

        All ranks call it once per step if any note was taken. What it changes must be a buffer of a
        module in `projections`, which checkpoints hold, and the same on every rank.
        """


def full_precision(tensor: Tensor) -> Tensor:
    """At least float32: losses are never computed in half precision."""
    return tensor if tensor.dtype.itemsize > 4 else tensor.float()
