"""From a plan to a run: ranks, engines, teacher on its device, batches, files."""

import atexit
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor
from torch import distributed as dist
from transformers.utils.logging import disable_progress_bar

from potstill.console import say
from potstill.errors import InputError
from potstill.files import remove_leftovers, write_json
from potstill.secrets import redacted
from pretrain.acceleration import offloads_optimizer, use_apex_layer_norm, zero_stage
from pretrain.agreement import from_main_rank
from pretrain.allocator import keep_freed_memory
from pretrain.attention import Attention, choose_attention
from pretrain.checkpoint import (
    CheckpointWriter,
    Progress,
    load_state,
    read_record,
    remove_checkpoints,
)
from pretrain.config import Config, ScheduleConfig
from pretrain.encoder import encode
from pretrain.engine_state import EngineState, holds, write_state
from pretrain.environment import describe_environment, git_commit, single_rank_defaults
from pretrain.export import export_student
from pretrain.features import Feature
from pretrain.knowledge.source import StoredTeacher
from pretrain.learner import Learner
from pretrain.loop import Loop, Run
from pretrain.metrics import Metrics
from pretrain.models import HEADS, UNTRAINED
from pretrain.monitors import Monitors, without_monitors
from pretrain.ops_folder import OpsFolder
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.peak import Peak, find_peak
from pretrain.plan import Plan, StudentPlan, teacher_flops
from pretrain.run_data import RunData
from pretrain.run_folder import CHECKPOINTS, hold_folder, later_checkpoints
from pretrain.schedules import LinearSchedule
from pretrain.signals import Signals
from pretrain.step import (
    Distillation,
    freeze_encoder,
    freeze_unreached,
    skip_if_not_finite,
    untrained_parts,
)
from pretrain.students import check_all_done
from pretrain.summary import planned_tokens
from pretrain.teacher import Teacher

PROBE_ROWS, DRY_STEPS = 8, 2
REFUSALS = (
    *(NotImplementedError, ValueError, ZeRORuntimeException),
    *(AssertionError, AttributeError, KeyError, TypeError),
)
"""What DeepSpeed raises at settings that do not go together."""

_ops: OpsFolder | None = None


def start_ranks() -> torch.device:
    """Join the other ranks (or be the only one) and take a device and a share of the cores."""
    single_rank_defaults()
    global _ops
    _ops = OpsFolder()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()  # the library's bars for loading weights drown our own lines
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        keep_freed_memory()
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks_here))
    if not on_cpu:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False, verbose=False
    )
    if on_cpu:
        unname_shared_memory()
    # gloo's threads must not outlive the interpreter, however the program ends: the process would
    # now and then abort (status -6) in place of its own exit status.
    atexit.register(_leave_ranks)
    return torch.device("cpu" if on_cpu else f"{accelerator.device_name()}:{local_rank}")


def unname_shared_memory() -> None:
    """Let the memory through which DeepSpeed's ranks on a CPU reduce end with them.

    DeepSpeed never removes it: each start would leave 66 MiB a rank behind, until the machine is
    full. Once all ranks have it open, it needs no name.
    """
    dist.barrier()
    here = [
        str(os.getuid()),
        *(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")),
    ]
    Path("/dev/shm", "_".join(["deepspeed_allreduce_buffer", *here])).unlink(missing_ok=True)


def _leave_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def build_run(
    plan: Plan, device: torch.device, signals: Signals, writer: CheckpointWriter
) -> tuple[Run, Progress]:
    """Build each student's engine and everything around it; load checkpoints if there are any.

    Raises:
        InputError: another run holds the folder, or a checkpoint is not of this run.
    """
    data = RunData(plan)
    attention = choose_attention(plan.config.acceleration.attention, device)
    probe = _teacher_probe(plan, data, attention)
    if not plan.config.run.dry_run:
        from_main_rank(lambda: hold_folder(Path(str(plan.config.run.output))))
    peak = find_peak(device, plan.dtype, _planned_flops(plan))
    _record_run(plan, peak)
    learners = [_build_learner(plan, own, data, attention, probe, device) for own in plan.students]
    starts = [learner.progress for learner in learners]
    folders = [own.member.folder / CHECKPOINTS for own in plan.students]
    pairs = zip(plan.students, folders, strict=True)
    goes_on = all(own.checkpoint and own.checkpoint.parent == place for own, place in pairs)
    run = Run(
        learners=learners,
        stopped=dict(plan.stopped),
        teacher=_teacher(plan, attention, device),
        batches=data.training,
        accumulation=plan.sizes.accumulation,
        validation=data.validation,
        probe=data.probe(PROBE_ROWS),
        write_rows=data.write_rows,
        teacher_flops=lambda wanted: teacher_flops(plan, wanted),
        settings=plan.config.run,
        schedule=_length(plan.config),
        save=not plan.config.run.dry_run and plan.config.schedule.max_steps != 0,
        goes_on=goes_on,
        begin=lambda: _begin(plan, learners),
        tokens_per_step=plan.tokens_per_step,
        peak_flops=peak.flops_per_second if peak else None,
        device=device,
        signals=signals,
        writer=writer,
        loader_workers=plan.config.data.loader_workers,
    )
    if _ops is not None:
        _ops.release()
    validated = min(start.validated for start in starts)
    return run, replace(starts[0], flops=0.0, validated=validated)


def _build_learner(
    plan: Plan,
    own: StudentPlan,
    data: RunData,
    attention: Attention,
    probe: dict[Feature, Any],
    device: torch.device,
) -> Learner:
    """One student with its engine, from its checkpoint if there is one."""
    config = own.config
    shape = plan.teacher.shape if plan.teacher else own.student.shape
    torch.manual_seed(config.student_seed)  # of projections
    speed = config.acceleration
    if speed.fused == "apex":
        use_apex_layer_norm(own.student.model)
    module = Distillation(
        own.student, shape, own.objective, attention, speed.gradient_checkpointing
    )
    kept = freeze_encoder(module) if config.student.freeze else set()
    frozen = freeze_unreached(module, probe, data.probe(2))
    with own.member.blamed():
        start, state, saved_probe = _read_checkpoint(own, data, module, frozen)
    unreached = {name: value for name, value in frozen.items() if name not in kept}
    untrained = [*untrained_parts(unreached, module.student), *_untrained_before(own)]
    with own.member.blamed():
        engine = _start_engine(plan, own, module, device)
        if state is not None:
            write_state(engine, state, start.step)
            _check_read_back(own, engine, state)
    metrics = Metrics(None if config.run.dry_run else own.member.folder / "metrics.jsonl")

    def export(target: Path, step: int) -> None:
        flops = learner.progress.flops
        facts = {**_facts(plan, own, target.name, step), "FLOPs": flops}
        rows, shards = data.probe(PROBE_ROWS), Path(str(config.data.data))
        difference = export_student(engine, frozen, untrained, facts, shards, target, rows)
        path = str(target.relative_to(own.member.folder))
        metrics.write("event", step, event="export", path=path, max_abs_difference=difference)
        say(f"step {step}: student in {target} (reopened, logits within {difference})")

    learner = Learner(
        name=own.member.name,
        folder=own.member.folder,
        engine=engine,
        export=export,
        metrics=metrics,
        schedule=_schedule(_length(config)),
        seeds=(config.run.seed, config.student_seed),
        flops_per_token=own.flops_per_token,
        frozen=frozen,
        identity=own.identity,
        progress=start,
        probe_rows=data.probe_digest(PROBE_ROWS),
        probe=saved_probe,
        held_out=from_main_rank(lambda: metrics.last_validation(start.step)),
    )
    return learner


def _read_checkpoint(
    own: StudentPlan, data: RunData, module: Distillation, frozen: dict[str, Tensor]
) -> tuple[Progress, EngineState | None, dict[str, float] | None]:
    """Where a student goes on, its state, and its loss on the probe; its frozen parts are set.

    The probe of a run with other settings, or of other rows, cannot be compared.
    """
    if own.checkpoint is None:
        return Progress(), None, None
    record, (state, parts) = read_record(own.checkpoint), load_state(own.checkpoint)
    if parts.keys() != frozen.keys():
        raise InputError(
            f"{own.checkpoint} is of another run: what is frozen there is not what is frozen here; "
            "give this run another --output"
        )
    for name, value in parts.items():
        frozen[name] = value
        module.student.get_parameter(name).data.copy_(value)
    changed = sorted(n for n in own.identity if own.identity[n] != record.identity.get(n))
    if changed:
        say(f"note: {own.checkpoint} is of a run with another {', '.join(changed)}")
    same_rows = record.probe_rows == data.probe_digest(PROBE_ROWS)
    if not same_rows or changed:
        say("note: the loss on the probe is not compared: its rows or the settings differ")
    return record.progress, state, record.probe if same_rows and not changed else None


def _untrained_before(own: StudentPlan) -> list[str]:
    """Parts of a frozen encoder that were never trained in the run that it comes from either."""
    model: Any = own.student.model
    before = getattr(model.config, UNTRAINED, None) or []
    if not (own.config.student.freeze and own.config.student.student):
        return []
    return [part for part in before if part.split(".")[0] not in HEADS[model.config.model_type]]


def _length(config: Config) -> ScheduleConfig:
    """The run's schedule; a dry run takes two steps of it."""
    if not config.run.dry_run:
        return config.schedule
    return replace(config.schedule, max_steps=DRY_STEPS, max_hours=None, schedule="step")


def _schedule(settings: ScheduleConfig) -> LinearSchedule:
    if settings.schedule == "time":
        return LinearSchedule(settings.lr, settings.warmup, hours=settings.max_hours)
    return LinearSchedule(settings.lr, settings.warmup, steps=settings.max_steps)


def finish(loop: Loop, plan: Plan) -> None:
    """Validate, save and export at the end of a run; say where things are.

    Raises:
        TrainingError: a student stopped on the way; the others are done.
    """
    run, end = loop.run, loop.now
    if end.validated != end.step:
        loop.validate()
    if run.save:
        loop.save()
    loop.saver.settle()
    for learner in run.learners if run.save else ():
        learner.export(learner.folder / "student", end.step)
    if run.settings.dry_run:
        say(f"dry run  {end.step} steps in {end.seconds:.1f} s; {_estimate(plan, end)}")
    if run.learners:
        say(f"finished {end.step} steps, {end.tokens:,} tokens, {end.seconds:.0f} s of training")
    check_all_done(run.stopped)


def _teacher_probe(plan: Plan, data: RunData, attention: Attention) -> dict[Feature, Any]:
    """The teacher's features of a few rows, on the CPU, to find what the students' losses reach."""
    if plan.teacher is None:
        return {}
    if plan.knowledge is not None:
        stored = plan.knowledge.source(plan.teacher_features, torch.float32)
        return dict(stored.features(data.probe(2)))
    with torch.no_grad():
        return encode(plan.teacher.model.eval(), data.probe(2), plan.teacher_features, attention)


def _teacher(
    plan: Plan, attention: Attention, device: torch.device
) -> Teacher | StoredTeacher | None:
    """What gives the teacher's features: itself, or its stored knowledge."""
    wanted = plan.teacher_features
    if plan.teacher is None or not wanted:
        return None
    if plan.knowledge is not None:
        return plan.knowledge.source(wanted, plan.dtype)
    speed = plan.config.acceleration
    if speed.fused == "apex":
        use_apex_layer_norm(plan.teacher.model)
    teacher = Teacher(plan.teacher, wanted, attention, device, plan.dtype)
    if speed.teacher_precision == "fp8":
        teacher.quantize()
    if speed.compiles(device, zero_stage(plan.students[0].ds_config)):
        teacher.compile()
    if speed.teacher_stream:
        teacher.stream = torch.cuda.Stream(device)
    return teacher


def _start_engine(plan: Plan, own: StudentPlan, module: Distillation, device: torch.device) -> Any:
    module.train()
    settings, speed = own.config.schedule, own.config.acceleration
    if speed.compiles(device, zero_stage(own.ds_config)):
        module.compile()
    groups = parameter_groups(module, settings.weight_decay)
    optimizer = None
    if "optimizer" not in own.ds_config:
        on_cpu = device.type == "cpu" or offloads_optimizer(own.ds_config)
        optimizer = build_optimizer(groups, settings, speed.fused, on_cpu)
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=groups,
            optimizer=optimizer,
            config=without_monitors(own.ds_config),
        )
    except REFUSALS as error:
        raise InputError(
            f"--ds_config {plan.config.run.ds_config}: DeepSpeed cannot start with it: "
            f"{type(error).__name__}: {error}; ds_configs/ has configs that work"
        ) from error
    skip_if_not_finite(engine)
    return engine


def _planned_flops(plan: Plan) -> float | None:
    """Of the whole run; None where only time ends it."""
    steps = _length(plan.config).max_steps
    return None if steps is None else steps * plan.tokens_per_step * plan.flops_per_token


def _record_run(plan: Plan, peak: Peak | None) -> None:
    """Write what the run was told and where it runs."""
    if plan.config.run.dry_run:
        return
    environment = describe_environment(dist.get_world_size())
    environment["peak"] = peak._asdict() if peak else None

    def write() -> None:
        folder = Path(str(plan.config.run.output))
        remove_leftovers(folder)
        if plan.config.run.students is not None:
            write_json(folder / "config.json", _record(plan, plan.config, plan.identity))
        for own in plan.students:
            place = own.member.folder
            write_json(place / "config.json", _record(plan, own.config, own.identity))
            write_json(place / "ds_config.json", redacted(own.ds_config))
            write_json(place / "environment.json", environment)

    from_main_rank(write)


def _record(plan: Plan, config: Config, identity: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for part in asdict(config).values() for k, v in part.items()}
    record = {"settings": settings, "identity": identity, "begun_on_ranks": plan.begun_on}
    return redacted(record)


def _begin(plan: Plan, learners: Sequence[Learner]) -> None:
    """Forget what lies behind the checkpoints that were loaded, now that they proved right."""

    def forget() -> None:
        for own, learner in zip(plan.students, learners, strict=True):
            remove_checkpoints(later_checkpoints(own.member, own.checkpoint))
            done = learner.progress if own.checkpoint else Progress(step=-1)
            learner.metrics.cut_behind(done.step, done.validated)

    if plan.config.run.dry_run:
        return
    from_main_rank(forget)
    for own, learner in zip(plan.students, learners, strict=True):
        step, metrics = learner.progress.step, learner.metrics
        metrics.monitor = Monitors(own.ds_config, step, metrics.monitor_failed)
        if own.checkpoint:
            metrics.write("event", step, event="resume", checkpoint=own.checkpoint.name)
        for name in sorted(plan.left_out):
            metrics.write("event", step, event="bad shard", file=name)


def _check_read_back(own: StudentPlan, engine: Any, state: EngineState) -> None:
    """Refuse an engine that does not have, bit by bit, the weights that it was given."""
    right = holds(engine, state)  # rank 0 knows
    if not from_main_rank(lambda: right):
        raise InputError(f"{own.checkpoint}: DeepSpeed did not take its weights over")


def _facts(plan: Plan, own: StudentPlan, name: str, step: int) -> dict[str, Any]:
    """The model card's rows."""
    config, shape = own.config, own.student.shape
    facts = {
        "name": f"{shape.layers}x{shape.hidden} student" if plan.teacher else "Encoder",
        "teacher": plan.teacher.source if plan.teacher else "none (pretrained from scratch)",
        "objective": config.objective.objective,
        "layers": config.objective.defaulted["layers"],
        "initialisation": config.student.student or config.student.init,
        "data": "; ".join(str(source.get("name", source)) for source in plan.manifest.sources),
        "tokens per row": plan.manifest.seq_length,
        "steps": step,
        "tokens": step * plan.tokens_per_step,
        "learning rate": config.schedule.lr,
        "global batch": plan.sizes.global_batch,
        "precision": str(plan.dtype).removeprefix("torch."),
        "seed": config.run.seed,
        "code commit": git_commit() or "unknown",
    }
    return redacted(facts)


def _estimate(plan: Plan, end: Progress) -> str:
    """Speed of a dry run, and how long the whole run would take at it."""
    speed, tokens = end.tokens / end.seconds, planned_tokens(plan)
    text = f"about {speed:,.0f} tokens/s (the first steps are slower than the rest)"
    return (
        text if tokens is None else f"{text}, {tokens / speed / 3600:.2f} hours for the whole run"
    )
