"""What every objective is: a frozen object that names the features it wants and returns sums."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from pretrain.batches import Batch
from pretrain.features import Feature, Features, Kind, Positions
from pretrain.models import Shape

Unit = Literal["sequences", "tokens", "masked", "pairs"]
ProjectionMode = Literal["auto", "always", "none"]


class LayerPair(NamedTuple):
    """Student layer `student` learns from teacher layer `teacher`; 0 is the embedding output."""

    student: int
    teacher: int


@dataclass(frozen=True)
class Settings:
    """What the objectives of a run share.

    Attributes:
        pairs: the mapped layers.
        temperature, positions: of `kd`.
        projection: where a learned map W from the student's to the teacher's width stands.
    """

    pairs: tuple[LayerPair, ...]
    temperature: float = 1.0
    positions: Positions = "masked"
    projection: ProjectionMode = "auto"


@dataclass(frozen=True)
class Objective(ABC):
    """A loss as a sum over units; the step divides once, by the units of all ranks.

    Class attributes:
        needs: kinds of features, the same of both models.
        unit: what the definition's mean runs over, besides heads and width (which `total`
            averages itself): an entry of `Batch.counts`.
        uses_teacher: whether it learns from a teacher at all.
        same_heads: whether both models must have the same number of heads.
    """

    settings: Settings
    needs: ClassVar[tuple[Kind, ...]]
    unit: ClassVar[Unit]
    uses_teacher: ClassVar[bool] = True
    same_heads: ClassVar[bool] = False

    @property
    def counted(self) -> Unit:
        """The unit of this instance; some depend on the settings."""
        return self.unit

    def student_features(self) -> frozenset[Feature]:
        """The features that the student must give."""
        return frozenset(
            Feature(kind, pair.student) for kind in self.needs for pair in self.settings.pairs
        )

    def teacher_features(self) -> frozenset[Feature]:
        """The features that the teacher must give."""
        return frozenset(
            Feature(kind, pair.teacher) for kind in self.needs for pair in self.settings.pairs
        )

    def projections(self, student: Shape, teacher: Shape) -> dict[str, nn.Module]:
        """The learned maps that this objective needs, by a name of their own."""
        return {}

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


def full_precision(tensor: Tensor) -> Tensor:
    """At least float32: losses are never computed in half precision."""
    return tensor if tensor.dtype.itemsize > 4 else tensor.float()
