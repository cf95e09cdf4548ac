"""What training changes, as whole float32 tensors by parameter name, whatever ZeRO made of it.

An optimiser of DeepSpeed steps master weights that may be copies in another precision, flattened
together, and cut over the ranks. `Piece` says where this rank's part of a parameter stands in
them; with it a state is read and written alike under every ZeRO stage, world size and precision.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor, nn
from torch import distributed as dist

from potstill.console import is_main_rank
from potstill.errors import InputError

SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's loss scalers know, under their own names."""


GROUP_STEP = "group step"
"""The steps that some optimisers count once for all their parameters."""


class Piece(NamedTuple):
    """This rank's part of one parameter's master weights.

    Attributes:
        owner: the tensor that the optimiser steps, of any shape.
        start: where the part begins in it, flattened. first: where in the parameter, flattened.
        size: of the part, in elements.
    """

    owner: Tensor
    start: int
    first: int
    size: int

    def of(self, state: Tensor) -> Tensor:
        """The part of the owner, or of an optimiser state of its shape: a view (size,)."""
        return state.detach().view(-1).narrow(0, self.start, self.size)


@dataclass(frozen=True)
class EngineState:
    """Tensors on the CPU: complete on rank 0, empty on the others.

    Attributes:
        weights: float32 master weights by parameter name. buffers: in their own precision.
        moments: float32 optimiser states, by `STATE/PARAMETER`.
        numbers: what the optimiser counts, by its own names: steps taken.
        scale: of the fp16 loss, empty without one. skipped: updates that were left out.
        optimizer: its class's name; another one could not read these states.
    """

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    moments: dict[str, Tensor]
    numbers: dict[str, float]
    scale: dict[str, float]
    skipped: int
    optimizer: str


def read_state(engine: Any) -> EngineState:
    """Copies of all that training changes; all ranks call it."""
    keys, moments = _tensor_states(engine), {}
    for name, parameter in trained(engine.module):
        for key in keys:
            whole = _whole(engine, parameter, key)
            if whole is not None:
                moments[f"{key}/{name}"] = whole
    return EngineState(
        weights=whole_weights(engine),
        buffers={name: b.detach().cpu().clone() for name, b in _buffers(engine.module)},
        moments=moments,
        numbers=_numbers(engine),
        scale=loss_scale(engine),
        skipped=engine.skipped_steps,
        optimizer=type(base_optimizer(engine)).__name__,
    )


def write_state(engine: Any, state: EngineState, step: int) -> None:
    """Put a state back, complete on every rank, as it is after `step` updates.

    Raises:
        InputError: it is of another model or optimiser.
    """
    _check_fits(engine, state)
    optimizer = base_optimizer(engine)
    _prepare_states(engine, state)
    for name, parameter in trained(engine.module):
        _set_parameter(parameter, state.weights[name])
        piece = _piece(engine, parameter)
        if piece is None:
            continue
        piece.of(piece.owner).copy_(_part(piece, state.weights[name]))
        for key in {full.partition("/")[0] for full in state.moments}:
            held = optimizer.state[piece.owner][key]
            piece.of(held).copy_(_part(piece, state.moments[f"{key}/{name}"]))
    for name, buffer in _buffers(engine.module):
        buffer.copy_(state.buffers[name])
    scaler = _scaler(engine)
    for key, value in state.scale.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value if key == "cur_scale" else int(value))
    engine.skipped_steps, engine.global_steps = state.skipped, step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()


def holds(engine: Any, state: EngineState) -> bool:
    """Whether the engine has these very weights, bit by bit; all ranks call it, rank 0 knows."""
    weights = whole_weights(engine)
    return all(weight.equal(state.weights[name]) for name, weight in weights.items())


def base_optimizer(engine: Any) -> Any:
    """The optimiser proper, inside DeepSpeed's wrapper if there is one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that an optimiser steps, by name; tied ones once."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Master weights by parameter name, float32 on the CPU; all ranks call it, rank 0 gets them."""
    weights = {name: _whole(engine, p, None) for name, p in trained(engine.module)}
    return {name: whole for name, whole in weights.items() if whole is not None}


def loss_scale(engine: Any) -> dict[str, float]:
    """What the fp16 loss scaler knows; empty where losses are not scaled."""
    scaler = _scaler(engine)
    known = {key: getattr(scaler, key, None) for key in SCALE}
    return {key: float(value) for key, value in known.items() if value is not None}


def scale_is_at_floor(engine: Any) -> bool | None:
    """Whether the fp16 loss scale cannot sink any further; None where losses are not scaled."""
    scaler = _scaler(engine)
    if scaler is None:
        return None
    floor = getattr(scaler, "min_scale", getattr(scaler, "min_loss_scale", None))
    return floor is None or scaler.cur_scale <= floor


def _scaler(engine: Any) -> Any:
    """DeepSpeed's loss scaler under fp16, of whichever kind."""
    if not engine.fp16_enabled():
        return None
    wrapper = engine.optimizer
    return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to the state: the contrastive memory, not the constants."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def _piece(engine: Any, parameter: nn.Parameter) -> Piece | None:
    """Where this rank's part of a parameter's master weights stands; None if it has none."""
    wrapper: Any = engine.optimizer
    held: Any = parameter  # DeepSpeed's own attributes
    if hasattr(held, "ds_id"):  # ZeRO-3: an equal share for every rank, the last one padded
        group, start, share = wrapper.grad_position[wrapper.get_param_id(held)]
        first = share * dist.get_rank()
        size = min(share, held.ds_numel - first)
        owner = wrapper.fp32_partitioned_groups_flat[group]
        return Piece(owner, start, first, size) if size > 0 else None
    if hasattr(held, "_hp_mapping"):  # ZeRO-1 and 2
        mapping = held._hp_mapping
        if mapping is None:
            return None
        masters, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        owners = getattr(wrapper, "single_partition_of_fp32_groups", None)
        owners = wrapper.fp32_groups_flat_partition if owners is None else owners
        return Piece(owners[mapping.param_group_index], masters.start, there.start, masters.numel)
    return _unpartitioned(wrapper, parameter)


def _unpartitioned(wrapper: Any, parameter: nn.Parameter) -> Piece:
    """Without ZeRO: the parameter itself, or its float32 copy under half precision."""
    if isinstance(wrapper, FP16_UnfusedOptimizer):
        for halves, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                if half is parameter:
                    return Piece(master, 0, 0, master.numel())
    if isinstance(wrapper, FP16_Optimizer):
        for halves, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            start = 0
            for half in halves:
                if half is parameter:
                    return Piece(flat, start, 0, half.numel())
                start += half.numel()
    assert parameter.dtype == torch.float32, "a half-precision parameter without master weights"
    return Piece(parameter, 0, 0, parameter.numel())


def _whole(engine: Any, parameter: nn.Parameter, key: str | None) -> Tensor | None:
    """A parameter's optimiser state (None: its master weights), float32 on rank 0's CPU.

    All ranks call it; the others get None.
    """
    held: Any = parameter
    shape = getattr(held, "ds_shape", parameter.shape)
    buffer = torch.zeros(shape.numel(), dtype=torch.float32, device=engine.device)
    piece = _piece(engine, parameter)
    if piece is not None:
        state = piece.owner if key is None else base_optimizer(engine).state[piece.owner][key]
        buffer.narrow(0, piece.first, piece.size).copy_(piece.of(state))
    if engine.zero_optimization_stage() > 0 and dist.get_world_size() > 1:
        dist.reduce(buffer, dst=0)
    return buffer.cpu().reshape(shape) if is_main_rank() else None


def _part(piece: Piece, value: Tensor) -> Tensor:
    return value.reshape(-1).narrow(0, piece.first, piece.size)


def _set_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """The parameter that forward uses, rounded to its precision."""
    if hasattr(parameter, "ds_id"):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if is_main_rank():
                parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)


def _owners(engine: Any) -> list[Tensor]:
    """What the optimiser steps; under ZeRO-3 it is handed its tensors only while it does."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in base_optimizer(engine).param_groups for p in group["params"]]


def _tensor_states(engine: Any) -> list[str]:
    """Names of the optimiser's states of its parameters' shape; none before its first update."""
    states = base_optimizer(engine).state
    for owner in _owners(engine):
        if owner in states:
            names = states[owner].items()
            return sorted(n for n, s in names if isinstance(s, Tensor) and s.shape == owner.shape)
    return []


def _numbers(engine: Any) -> dict[str, float]:
    """What the optimiser counts; every parameter takes part in every update, so one speaks for all.

    Raises:
        InputError: it keeps a state that cannot be cut by parameter.
    """
    optimizer = base_optimizer(engine)
    found: dict[str, float] = {}
    for owner in _owners(engine):
        for name, state in optimizer.state.get(owner, {}).items():
            tensor = isinstance(state, Tensor)
            if isinstance(state, int | float) or (tensor and state.ndim == 0):
                found[name] = max(float(state), found.get(name, 0.0))
            elif not tensor or state.shape != owner.shape:
                raise InputError(
                    f"optimizer {type(optimizer).__name__} keeps {name!r}, which checkpoints "
                    "cannot hold; choose AdamW in the ds_config"
                )
    steps = [group["step"] for group in optimizer.param_groups if "step" in group]
    return {**found, GROUP_STEP: float(max(steps))} if steps else found


def _prepare_states(engine: Any, state: EngineState) -> None:
    """Make the states that a fresh optimiser only makes at its first update."""
    optimizer = base_optimizer(engine)
    keys = {full.partition("/")[0] for full in state.moments}
    settings = optimizer.param_groups[0]
    counts_there = settings.get("fused") or settings.get("capturable")
    for owner in _owners(engine):
        states = optimizer.state[owner]
        for key in keys - states.keys():
            states[key] = torch.zeros_like(owner, requires_grad=False)
        for key, value in state.numbers.items():
            if key == GROUP_STEP:
                continue
            if isinstance(states.get(key), Tensor):
                states[key].fill_(value)
            elif type(optimizer).__module__.startswith("torch."):  # torch counts in tensors
                place = owner.device if counts_there else torch.device("cpu")
                states[key] = torch.tensor(value, dtype=torch.float32, device=place)
            else:
                states[key] = int(value)
    for group in optimizer.param_groups:
        if GROUP_STEP in state.numbers:
            group["step"] = int(state.numbers[GROUP_STEP])


def _check_fits(engine: Any, state: EngineState) -> None:
    """Refuse a state of another model or optimiser, before anything of it is taken over."""
    optimizer = type(base_optimizer(engine)).__name__
    if state.optimizer != optimizer:
        raise InputError(
            f"the checkpoint is of optimizer {state.optimizer}, this run has {optimizer}; "
            "start it with the same ds_config section and --fused"
        )
    ours: dict[str, Any] = {}
    for name, parameter in trained(engine.module):
        held: Any = parameter
        ours[name] = tuple(getattr(held, "ds_shape", parameter.shape))
    ours |= {name: tuple(buffer.shape) for name, buffer in _buffers(engine.module)}
    theirs = {n: tuple(t.shape) for n, t in _tensors(state.weights, state.buffers)}
    wrong = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
    if wrong:
        name = wrong[0]
        raise InputError(
            f"the checkpoint is of another model: {name} has shape {theirs.get(name)} there and "
            f"{ours.get(name)} here ({len(wrong)} differ); give this run another --output"
        )


def _tensors(*groups: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for group in groups:
        yield from group.items()
