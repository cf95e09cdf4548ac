"""What a run will do, printed before it starts: shapes, parameters, cost, memory."""

import torch
from torch import distributed as dist

from data_prep.shard_format import TRAIN
from potstill.console import say
from pretrain.environment import lacks_bf16
from pretrain.models import Encoder
from pretrain.plan import Plan, StudentPlan, teacher_flops


def show_plan(plan: Plan, device: torch.device) -> None:
    """Print what the run will do."""
    for name, stop in plan.stopped.items():
        say(f"stopped    {name}, at step {stop.step}: its loss was {stop.loss}")
    if not plan.students:
        return
    _show_models(plan)
    say(
        f"batch      {plan.sizes.global_batch} rows of {plan.manifest.seq_length} = "
        f"{plan.tokens_per_step:,} tokens: {plan.sizes.micro_batch} x "
        f"{plan.sizes.accumulation} micro-batches x {dist.get_world_size()} ranks, {plan.dtype}"
    )
    _show_cost(plan)
    say(f"memory     about {memory_estimate(plan) / 2**30:.2f} GiB per rank on {device}")
    if device.type == "cpu" and plan.dtype == torch.bfloat16 and lacks_bf16():
        say("note       this CPU has no bf16 instructions: ds_configs/cpu.json is much faster")
    for own in plan.students:
        if own.checkpoint:
            say(f"resume     from {own.checkpoint}")


def _show_models(plan: Plan) -> None:
    """What each student learns, the teacher, and the students' shapes."""
    for own in plan.students:
        settings = own.config.objective
        layers = settings.defaulted["layers"]
        say(f"objective  {_title(own)}{settings.objective}, layers {layers}")
    if plan.teacher is not None:
        stored = f", stored in {plan.knowledge.folder}" if plan.knowledge is not None else ""
        say(f"teacher    {describe_shape(plan.teacher)}{stored}")
    for own in plan.students:
        frozen = ", encoder frozen" if own.config.student.freeze else ""
        say(f"student    {_title(own)}{describe_shape(own.student)}{frozen}")


def _title(own: StudentPlan) -> str:
    return f"{own.member.name}: " if own.member.name else ""


def _show_cost(plan: Plan) -> None:
    """FLOPs, and what is saved by one teacher forward for all students."""
    schedule, together = plan.config.schedule, plan.flops_per_token
    models = "both models" if len(plan.students) == 1 else "teacher and all students"
    if plan.knowledge is not None:
        models = "the student alone" if len(plan.students) == 1 else "all students"
    say(f"cost       {together / 1e6:.1f} MFLOP per token, {models}")
    if len(plan.students) > 1 and plan.knowledge is None:
        alone = sum(alone_flops(plan, own) for own in plan.students)
        say(
            f"sharing    one teacher forward for {len(plan.students)} students: "
            f"{together / 1e6:.1f} instead of {alone / 1e6:.1f} MFLOP per token "
            f"(-{1 - together / alone:.0%})"
        )
    tokens = planned_tokens(plan)
    if tokens is not None:
        rows = plan.manifest.splits[TRAIN].rows
        say(
            f"run        {schedule.max_steps:,} steps, {tokens:,} tokens "
            f"({tokens / plan.manifest.seq_length / rows:.2f} epochs), "
            f"{tokens * together:.2e} FLOP"
        )


def alone_flops(plan: Plan, own: StudentPlan) -> float:
    """FLOPs per token of a student that is trained alone, with a teacher of its own."""
    return own.flops_per_token + teacher_flops(plan, own.objective.teacher_features())


def planned_tokens(plan: Plan) -> int | None:
    """Tokens of the whole run; None where only time ends it."""
    steps = plan.config.schedule.max_steps
    return None if steps is None else steps * plan.tokens_per_step


def describe_shape(encoder: Encoder) -> str:
    """A model's sizes and parameters in a line."""
    shape = encoder.shape
    parameters = sum(p.numel() for p in encoder.model.parameters())
    return (
        f"{shape.layers} layers x {shape.hidden}, {shape.heads} heads, ffn {shape.ffn}, "
        f"{parameters / 1e6:.1f} M parameters, from {encoder.source}"
    )


def memory_estimate(plan: Plan) -> float:
    """Bytes per rank: weights, gradients, AdamW's states, and the activations of a micro-batch.

    An estimate to tell 2 GiB from 20: about 34 values of the width per token and layer are kept
    for backward, plus the attention's L x L of each head where it is written out. Students keep
    theirs in turn.
    """
    half = plan.dtype != torch.float32
    size, per_trained = (2, 2 + 4 + 12) if half else (4, 4 + 4 + 8)
    trained = sum(p.numel() for own in plan.students for p in own.student.model.parameters())
    running = plan.teacher if plan.knowledge is None else None
    frozen = sum(p.numel() for p in running.model.parameters()) if running else 0
    length = plan.manifest.seq_length
    shapes = [own.student.shape for own in plan.students]
    kept = max(s.layers * (34 * s.hidden + 2 * s.heads * length) for s in shapes)
    return trained * per_trained + (frozen + kept * plan.sizes.micro_batch * length) * size
