"""What makes a step fast changes nothing else, and is refused where it cannot be had."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from potstill.errors import InputError
from pretrain.acceleration import AccelerationConfig, use_apex_layer_norm
from pretrain.attention import cpu_attention, plain_attention
from pretrain.batches import Batch
from pretrain.config import ScheduleConfig
from pretrain.dropout import drop
from pretrain.features import Feature
from pretrain.objectives import LayerPair, Settings, build_objective
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.step import Distillation, eagerly, with_features
from pretrain.teacher import Teacher
from tests.pretrain.tiny import FAMILIES, ragged_batch, tiny_encoder

CPU = torch.device("cpu")
ZERO_3 = {"zero_optimization": {"stage": 3}}
RAGGED, FULL = (9, 4, 1, 7), (6, 6)


@pytest.fixture
def seed() -> int:
    chosen = int.from_bytes(os.urandom(4), "little")
    print(f"seed {chosen}")
    return chosen


# -- attention for training on a CPU


def attended(
    attention: Any, sides: list[Tensor], mask: Tensor | None, dropout: float, weights: Tensor
) -> list[Tensor]:
    """Output and gradients of an attention function, the same dropout at every call."""
    torch.manual_seed(11)
    output = attention(*sides, mask, dropout)
    return [output, *torch.autograd.grad(output, sides, weights)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_trained_attention_equals_a_float64_reference(
    dropout: float, masked: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    sides = [torch.randn(2, 3, 9, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = (torch.arange(9) < torch.tensor([[9], [4]]))[:, None, None] if masked else None
    weights = torch.randn(2, 3, 9, 5, dtype=torch.float64)

    def reference(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", query, key) / 5**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        probabilities = scores.softmax(-1)
        if dropout:
            kept, scale = drop(torch.empty(probabilities.shape), dropout)[1:]
            probabilities = probabilities * kept * scale
        return torch.einsum("bhij,bhjd->bhid", probabilities, value)

    found = attended(cpu_attention, sides, mask, dropout, weights)
    expected = attended(reference, sides, mask, dropout, weights)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


def test_bfloat16_gradients_are_as_good_as_those_of_the_form_written_out(seed: int) -> None:
    torch.manual_seed(seed)
    exact = [torch.randn(4, 4, 64, 16, dtype=torch.float64) for _ in range(3)]
    weights = torch.randn(4, 4, 64, 16, dtype=torch.float64)

    def error(attention: Any) -> Tensor:
        half = [side.bfloat16().requires_grad_() for side in exact]
        rounded = [side.detach().double().requires_grad_() for side in half]
        found = attended(attention, half, None, 0.0, weights.bfloat16())
        wanted = attended(plain_attention, rounded, None, 0.0, weights.bfloat16().double())
        pairs = zip(found, wanted, strict=True)
        return torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])

    assert (error(cpu_attention) < 1.5 * error(plain_attention)).all()


# -- gradient checkpointing and compiling


def check(ds_config: dict[str, Any] | None = None, **settings: Any) -> None:
    AccelerationConfig(**settings).check(CPU, ds_config or {}, 2, torch.float32)


def distillation(family: str, expression: str, dropout: float, checkpointing: bool) -> Distillation:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    student = tiny_encoder(family, 1, layers=3, **dict.fromkeys(names, dropout))
    objective = build_objective(expression, Settings((LayerPair(2, 3), LayerPair(3, 4))))
    torch.manual_seed(0)
    teacher = tiny_encoder(family, 2, layers=4).shape
    return Distillation(student, teacher, objective, cpu_attention, checkpointing).double().train()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("expression", ["att-mse+hid-seq", "mlm+kd+val-kl"])
def test_gradient_checkpointing_changes_no_bit(family: str, expression: str) -> None:
    teacher = tiny_encoder(family, 2, layers=4)
    batch = ragged_batch(RAGGED, teacher.model.config.pad_token_id)
    results = []
    for checkpointing in (False, True):
        module = distillation(family, expression, 0.3, checkpointing)
        wanted = module.objective.teacher_features()
        features = Teacher(teacher, wanted, cpu_attention, CPU, torch.float64).features(batch)
        torch.manual_seed(4)
        totals = module(batch, features)
        totals.sum().backward()
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append((totals, gradients))
    (plain, gradients), (checkpointed, others) = results
    assert torch.equal(plain, checkpointed)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_gradient_checkpointing_keeps_one_tensor_of_a_layer() -> None:
    kept = {}
    for checkpointing in (False, True):
        module = distillation("bert", "hid-cls", 0.1, checkpointing)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            batch = ragged_batch(FULL)
            teacher = {Feature("hidden", at): torch.zeros(2, 6, 24).double() for at in (3, 4)}
            module(batch, teacher)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.4 * kept[False]


# -- torch.compile


@pytest.mark.parametrize(
    ("backend", "batches"), [("inductor", (FULL,)), ("aot_eager", (FULL, RAGGED, FULL))]
)
def test_compiled_losses_and_gradients_are_the_same(
    backend: str, batches: tuple[tuple[int, ...], ...]
) -> None:
    results = []
    teacher = tiny_encoder("bert", 2, layers=4)
    for compiled in (False, True):
        module = distillation("bert", "att-mse+kd", 0.0, False)
        wanted = module.objective.teacher_features()
        source = Teacher(teacher, wanted, cpu_attention, CPU, torch.float64)
        if compiled:
            module.compile(backend=backend)
            source.compile(backend=backend)
        found = []
        for lengths in batches:
            batch = ragged_batch(lengths)
            totals = module(batch, source.features(batch))
            totals.sum().backward()
            found.append(totals.detach())
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append((found, gradients))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# -- optimisers and layer norm of other libraries


class FusedAdam(torch.optim.AdamW):
    """Stands for apex's, which exists on GPU machines only: it takes `adam_w_mode`."""

    def __init__(self, groups: Any, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(groups, **settings)


class FusedLayerNorm(nn.LayerNorm):
    """Stands for apex's."""


def put_apex(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / "apex" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(folder)


NVIDIA = {
    "__init__.py": "",
    "optimizers.py": "from tests.pretrain.test_acceleration import FusedAdam\n",
    "normalization.py": "from tests.pretrain.test_acceleration import FusedLayerNorm\n",
}
WEB_TOOLKIT = {"__init__.py": "raise ImportError('pyramid.session')", "views.py": ""}


@pytest.fixture(autouse=True)
def no_apex_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import sys

    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_a_compiled_step_keeps_its_shapes_whatever_validation_sees() -> None:
    """Validated on rows of two lengths first, the training step is compiled for one shape."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    teacher = tiny_encoder("bert", 2, layers=4, dtype=torch.float32)
    module = distillation("bert", "att-mse", 0.0, False).float()
    source = Teacher(
        teacher, module.objective.teacher_features(), cpu_attention, CPU, torch.float32
    )
    torch._dynamo.reset()
    module.compile(backend=backend)
    source.compile(backend=backend)
    with torch.no_grad(), eagerly():
        for lengths in (FULL, FULL[:1]):
            module(ragged_batch(lengths), source.features(ragged_batch(lengths)))
    assert not graphs
    batch = ragged_batch(FULL)
    module(batch, source.features(batch))
    inputs = [
        n.meta["example_value"] for g in graphs for n in g.graph.nodes if n.op == "placeholder"
    ]
    assert len(graphs) == 2 and not any(isinstance(value, torch.SymInt) for value in inputs)


@pytest.mark.parametrize("fused", ["auto", "torch"])
def test_default_optimizer_is_torchs_fused_adamw(fused: Any) -> None:
    groups = parameter_groups(nn.Linear(3, 2), 0.01)
    optimizer = build_optimizer(groups, ScheduleConfig(max_steps=1), fused)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]


def test_deepspeeds_kernel_that_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("deepspeed.ops.adam.DeepSpeedCPUAdam", fail)
    groups = parameter_groups(nn.Linear(3, 2), 0.01)
    with pytest.raises(InputError, match="--fused deepspeed: .*no compiler.*--fused torch"):
        build_optimizer(groups, ScheduleConfig(max_steps=1), "deepspeed", on_cpu=True)


def test_apex_gives_optimizer_and_layer_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_apex(tmp_path, monkeypatch, NVIDIA)
    encoder, batch = tiny_encoder("bert", 3), ragged_batch(RAGGED)
    names = list(encoder.model.state_dict())
    logits = encoder.model(batch.input_ids).logits
    use_apex_layer_norm(encoder.model)
    norms = [module for module in encoder.model.modules() if isinstance(module, nn.LayerNorm)]
    assert norms and all(type(norm) is FusedLayerNorm for norm in norms)
    assert list(encoder.model.state_dict()) == names
    assert torch.equal(encoder.model(batch.input_ids).logits, logits)
    groups = parameter_groups(encoder.model, 0.01)
    settings = ScheduleConfig(max_steps=1, lr=0.25)
    optimizer = build_optimizer(groups, settings, "apex")
    assert type(optimizer) is FusedAdam and optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, ("--fused apex", "apex is missing", "--fused torch")),
        (NVIDIA | {"optimizers.py": ""}, ("--fused apex", "cannot be used", "FusedAdam")),
        (WEB_TOOLKIT, ("--fused apex", "github.com/NVIDIA/apex", "--fused torch")),
        (NVIDIA, ("--fused apex", "cpu", "--fused torch")),
    ],
)
def test_apex_is_refused_where_it_cannot_be_used(
    files: dict[str, str],
    named: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_apex(tmp_path, monkeypatch, files)
    with pytest.raises(InputError) as error:
        check(fused="apex")
    assert all(part in str(error.value) for part in named)


def test_the_wrong_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_apex(tmp_path, monkeypatch, WEB_TOOLKIT)
    record = tmp_path / "apex-0.9.10.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\n")
    with pytest.raises(InputError, match=r"apex 0\.9\.10 is installed, but is not NVIDIA's"):
        check(fused="apex")


@pytest.mark.parametrize(
    ("settings", "ds_config", "named"),
    [
        ({"compile": "on"}, ZERO_3, ("--compile on", "ZeRO-3", "--compile auto")),
        ({"fused": "torch"}, {"optimizer": {"type": "Lamb"}}, ("--fused torch", "optimizer")),
        ({"teacher_precision": "fp8"}, {}, ("--teacher_precision fp8", "cpu", "auto")),
        ({"teacher_stream": True}, {}, ("--teacher_stream", "cpu")),
    ],
)
def test_what_this_machine_or_stage_cannot_do_is_refused(
    settings: dict[str, Any], ds_config: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as error:
        check(ds_config, **settings)
    assert all(part in str(error.value) for part in named)


@pytest.mark.parametrize(
    ("compile", "device", "stage", "compiles"),
    [
        ("auto", "cpu", 0, False),
        ("auto", "cuda", 2, True),
        ("auto", "cuda", 3, False),
        ("on", "cpu", 1, True),
        ("off", "cuda", 0, False),
    ],
)
def test_compile_is_automatic_on_a_gpu(
    compile: Any, device: str, stage: int, compiles: bool
) -> None:
    config = AccelerationConfig(compile=compile)
    assert config.compiles(torch.device(device), stage) is compiles


# -- the teacher's own stream


class Streams:
    """Stands for CUDA's streams, which do not exist here: it writes down who waits for what."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.teachers = 0

    def record_event(self) -> str:
        self.teachers += 1
        return f"teacher {self.teachers}"

    def wait_stream(self, other: Any) -> None:
        self.log.append("teacher waits for main")

    def wait_event(self, event: str) -> None:
        self.log.append(f"main waits for {event}")


def test_a_teacher_on_its_own_stream_runs_ahead_by_one_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams()

    @contextmanager
    def stream(chosen: Any) -> Iterator[None]:
        streams.log.append("teacher starts")
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, main: None)
    teacher = Teacher(
        tiny_encoder("bert", 2), {Feature("hidden", 2)}, cpu_attention, CPU, torch.float64
    )
    batches: list[Batch] = [ragged_batch(lengths) for lengths in (FULL, RAGGED, (3, 2))]
    expected = [features for _, features in with_features(teacher, batches, CPU)]
    teacher.stream = streams  # type: ignore[assignment]
    found = []
    for number, (batch, features) in enumerate(with_features(teacher, batches, CPU), start=1):
        streams.log.append(f"student {number}")
        assert torch.equal(batch.input_ids, batches[number - 1].input_ids)
        found.append(features)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one[Feature("hidden", 2)], two[Feature("hidden", 2)])
    starts = ["teacher waits for main", "teacher starts"]
    assert streams.log == [
        *starts,
        *starts,
        *("main waits for teacher 1", "student 1"),
        *starts,
        *("main waits for teacher 2", "student 2"),
        *("main waits for teacher 3", "student 3"),
    ]
