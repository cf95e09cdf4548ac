"""The live teacher: a frozen source of features, outside the engine."""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import GELUActivation

from potstill.errors import InputError
from pretrain.acceleration import to_fp8
from pretrain.attention import Attention
from pretrain.batches import Batch
from pretrain.encoder import encode
from pretrain.features import Feature, Features, Predictions, depth_needed
from pretrain.meter import Phase, untimed
from pretrain.models import Encoder, freeze


class Teacher:
    """Gives the wanted features of any batch, and never changes.

    It is in evaluation mode, without gradients, in the precision of the student, and runs only
    as far as the deepest wanted feature.
    """

    def __init__(
        self,
        encoder: Encoder,
        wanted: Set[Feature],
        attention: Attention,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.wanted, self.attention = frozenset(wanted), attention
        self.model = freeze(encoder.model).to(device=device, dtype=dtype)
        _overwrite_inputs_of_gelu(self.model)
        self._encode: Callable[..., Features] = encode
        self._context: Callable[[], AbstractContextManager[Any]] = torch.inference_mode
        self.stream: torch.cuda.Stream | None = None

    def compile(self, **options: Any) -> None:
        """Compile its forward pass at the next batch, with options of `torch.compile`."""
        # The compiler cannot trace within inference mode.
        self._encode, self._context = torch.compile(encode, **options), torch.no_grad

    def quantize(self) -> None:
        """Let its layers multiply in FP8."""
        to_fp8(self.model)
        # Quantised weights are a tensor subclass, which inference mode does not take.
        self._context = torch.no_grad

    def features(self, batch: Batch) -> Features:
        """The wanted features of a batch on the teacher's device."""
        with self._context():
            return self._encode(self.model, batch, self.wanted, self.attention)

    def ahead(
        self, batches: Iterable[Batch], phase: Phase = untimed
    ) -> Iterator[tuple[Batch, Features]]:
        """Each batch with its features, those of the next one under way on `stream`.

        What the main stream does with a batch runs beside the teacher's work on the next one; its
        wait for the teacher is the time in `phase`.
        """
        ready: tuple[Batch, Features, torch.cuda.Event] | None = None
        for batch in batches:
            under_way = self._start(batch)
            if ready is not None:
                with phase("teacher"):
                    done = _wait(*ready)
                yield done
            ready = under_way
        if ready is not None:
            with phase("teacher"):
                done = _wait(*ready)
            yield done

    def _start(self, batch: Batch) -> tuple[Batch, Features, torch.cuda.Event]:
        assert self.stream is not None, "a teacher that runs ahead needs a stream of its own"
        self.stream.wait_stream(torch.cuda.current_stream())  # on which the batch is copied
        with torch.cuda.stream(self.stream):
            return batch, self.features(batch), self.stream.record_event()


def _wait(batch: Batch, features: Features, done: torch.cuda.Event) -> tuple[Batch, Features]:
    """Let the main stream, not the host, wait for the features of a batch."""
    main = torch.cuda.current_stream()
    main.wait_event(done)
    for value in features.values():  # its memory must not be given away while main reads it
        (value.hidden if isinstance(value, Predictions) else value).record_stream(main)
    return batch, features


def _overwrite_inputs_of_gelu(model: nn.Module) -> None:
    """Let GELUs write over their input, which nobody reads again in a model without a backward.

    The widest tensor of a layer is not made twice: on a CPU fresh memory costs as much as the GELU.
    """
    for module in model.modules():
        if isinstance(module, GELUActivation) and module.act is functional.gelu:
            module.act = torch.ops.aten.gelu_


def check_teacher(encoder: Encoder, wanted: Set[Feature], objective: str) -> None:
    """Refuse a teacher that cannot give what the objective asks for.

    Raises:
        InputError: logits are wanted, but the checkpoint has no trained MLM head.
    """
    if depth_needed(wanted, encoder.shape.layers).head and not encoder.trained_head:
        raise InputError(
            f"--teacher {encoder.source} has no trained MLM head, and --objective {objective} "
            "learns from its logits; use an objective on attention or hidden states (att-mse, "
            "hid-seq, …), or a teacher that was trained with one"
        )
