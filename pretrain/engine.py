"""From a plan to a run: ranks, engine, teacher on its device, batches, files."""

import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor
from torch import distributed as dist
from transformers.utils.logging import disable_progress_bar

from data_prep.shard_format import TOKENIZER_FOLDER, TRAIN, VALIDATION, ShardReader
from data_prep.tokenization import load_tokenizer
from potstill.console import is_main_rank, say
from potstill.errors import InputError
from potstill.files import write_json
from pretrain.attention import choose_attention
from pretrain.batches import (
    Batch,
    Slices,
    TrainingBatches,
    training_batches,
    validation_batches,
)
from pretrain.checkpoint import Progress, load_checkpoint
from pretrain.config import ScheduleConfig
from pretrain.encoder import encode
from pretrain.environment import describe_environment, git_commit, single_rank_defaults
from pretrain.export import export_student
from pretrain.flops import peak_flops
from pretrain.loop import Loop, Run
from pretrain.masking import Masking, word_continuations
from pretrain.metrics import Metrics
from pretrain.optim import build_optimizer, parameter_groups
from pretrain.plan import Plan, planned_tokens
from pretrain.step import Distillation, freeze_unreached, untrained_parts
from pretrain.teacher import Teacher

PROBE_ROWS, DRY_STEPS, DRY_ROWS = 8, 2, 256


def start_ranks() -> torch.device:
    """Join the other ranks (or be the only one) and take a device and a share of the cores."""
    single_rank_defaults()
    _own_folder_for_builds()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()  # the library's bars for loading weights drown our own lines
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks_here))
    if not on_cpu:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend="gloo" if on_cpu else None, auto_mpi_discovery=False, verbose=False
    )
    return torch.device("cpu" if on_cpu else f"{accelerator.device_name()}:{local_rank}")


def _own_folder_for_builds() -> None:
    """Let DeepSpeed build its ops where no other project does, and name a build that was killed.

    A build that was killed half-way leaves a lock behind, on which every later start would wait
    for ever without a word.
    """
    folder = Path.home() / ".cache" / "potstill" / "torch_extensions"
    place = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder)))
    for lock in place.rglob("lock"):
        say(
            f"note: {lock} says that another start is building DeepSpeed's op, or was killed while "
            "it did; if no other run is starting, delete that file, or this one waits for ever"
        )


def build_run(plan: Plan, device: torch.device) -> tuple[Run, Progress]:
    """Build the engine and everything around it, and load the checkpoint if there is one."""
    settings, folder = plan.config.run, Path(str(plan.config.run.output))
    data = _Data(plan)
    attention = choose_attention(settings.attention, device)
    shape = plan.teacher.shape if plan.teacher else plan.student.shape
    module = Distillation(plan.student, shape, plan.objective, attention)
    frozen = freeze_unreached(module, _teacher_probe(plan, data, attention), data.probe(2))
    untrained = untrained_parts(frozen, module.student)
    _record_run(plan, folder)
    engine = _start_engine(plan, module)
    start = load_checkpoint(engine, plan.checkpoint) if plan.checkpoint else Progress()
    metrics = _open_metrics(plan, folder, engine, start)

    def export(target: Path, step: int) -> None:
        facts = _facts(plan, target.name, step)
        probe = data.probe(PROBE_ROWS)
        shards = Path(str(plan.config.data.data))
        difference = export_student(engine, frozen, untrained, facts, shards, target, probe)
        path = str(target.relative_to(folder))
        metrics.write("event", step, event="export", path=path, max_abs_difference=difference)
        say(f"step {step}: student in {target} (reopened, logits within {difference})")

    run = Run(
        engine=engine,
        teacher=_live_teacher(plan, device),
        batches=data.training,
        validation=data.validation,
        export=export,
        metrics=metrics,
        settings=settings,
        schedule=_schedule(plan),
        save=not settings.dry_run and plan.config.schedule.max_steps != 0,
        resumed=plan.checkpoint is not None,
        tokens_per_step=plan.tokens_per_step,
        flops_per_token=plan.flops_per_token,
        peak_flops=_peak_of_all(device),
    )
    return run, start


def _schedule(plan: Plan) -> ScheduleConfig:
    """The run's schedule; a dry run takes two steps of it."""
    if not plan.config.run.dry_run:
        return plan.config.schedule
    return replace(plan.config.schedule, max_steps=DRY_STEPS, max_hours=None, schedule="step")


def finish(loop: Loop, plan: Plan) -> None:
    """Validate, save and export at the end of a run; say where things are."""
    run, end = loop.run, loop.now
    if end.validated != end.step:
        loop.validate()
    if run.save:
        loop.save()
        run.export(run.folder / "student", end.step)
    elif run.settings.dry_run:
        say(f"dry run  {end.step} steps in {end.seconds:.1f} s; {_estimate(plan, end)}")
    say(f"finished {end.step} steps, {end.tokens:,} tokens, {end.seconds:.0f} s of training")
    dist.barrier()
    dist.destroy_process_group()


class _Data:
    """The run's batches, by what they are for."""

    def __init__(self, plan: Plan) -> None:
        folder = Path(str(plan.config.data.data))
        tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
        settings = plan.config.data
        special = np.zeros(plan.manifest.vocab_size, bool)
        special[list(tokenizer.all_special_ids)] = True
        self._masking = Masking(
            probability=settings.mlm_probability,
            mask_id=plan.manifest.special_ids["mask"],
            vocab_size=plan.manifest.vocab_size,
            special=special,
            continues=word_continuations(tokenizer) if settings.mask_whole_words else None,
            seed=plan.config.run.seed,
        )
        self._plan, self._pad = plan, plan.manifest.special_ids["pad"]
        self._slices = Slices(
            plan.sizes.micro_batch,
            plan.sizes.accumulation,
            dist.get_rank(),
            dist.get_world_size(),
        )
        self._train = ShardReader(folder, TRAIN)
        self._validation = ShardReader(folder, VALIDATION)

    def training(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step on."""
        config = self._plan.config
        batches = TrainingBatches(
            self._train, self._masking, self._pad, self._slices, config.run.seed
        )
        return training_batches(
            batches, step, config.data.loader_workers, pin=torch.cuda.is_available()
        )

    def validation(self) -> Iterator[tuple[Batch, bool]]:
        """This rank's share of the held-out rows."""
        run = self._plan.config.run
        limit = (
            min(run.validation_rows or DRY_ROWS, DRY_ROWS) if run.dry_run else run.validation_rows
        )
        return validation_batches(self._validation, self._masking, self._pad, self._slices, limit)

    def probe(self, rows: int) -> Batch:
        """The first held-out rows, the same on every rank."""
        slices = Slices(min(rows, self._validation.rows), 1, 0, 1)
        batches = validation_batches(self._validation, self._masking, self._pad, slices, rows)
        return next(iter(batches))[0]


def _teacher_probe(plan: Plan, data: _Data, attention: Any) -> dict[Any, Tensor]:
    """The teacher's features of a few rows, on the CPU, to find what the student's loss reaches."""
    if plan.teacher is None:
        return {}
    wanted = plan.objective.teacher_features()
    with torch.no_grad():
        return encode(plan.teacher.model.eval(), data.probe(2), wanted, attention)


def _live_teacher(plan: Plan, device: torch.device) -> Teacher | None:
    wanted = plan.objective.teacher_features()
    if plan.teacher is None or not wanted:
        return None
    attention = choose_attention(plan.config.run.attention, device)
    return Teacher(plan.teacher, wanted, attention, device, plan.dtype)


def _start_engine(plan: Plan, module: Distillation) -> Any:
    module.train()
    groups = parameter_groups(module, plan.config.schedule.weight_decay)
    own = "optimizer" not in plan.ds_config
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=groups,
            optimizer=build_optimizer(groups, plan.config.schedule) if own else None,
            config=plan.ds_config,
        )
    except (NotImplementedError, ValueError, ZeRORuntimeException) as error:
        raise InputError(
            f"--ds_config {plan.config.run.ds_config}: DeepSpeed cannot start with it: {error}"
        ) from error
    return engine


def _record_run(plan: Plan, folder: Path) -> None:
    """Write what the run was told and where it runs, before DeepSpeed writes anything there."""
    if is_main_rank() and not plan.config.run.dry_run:
        settings = {k: v for part in asdict(plan.config).values() for k, v in part.items()}
        write_json(folder / "config.json", {"settings": settings, "identity": plan.identity})
        write_json(folder / "ds_config.json", plan.ds_config)
        write_json(folder / "environment.json", describe_environment(dist.get_world_size()))
    dist.barrier()


def _open_metrics(plan: Plan, folder: Path, engine: Any, start: Progress) -> Metrics:
    """The run's metrics, without lines that a resumed run will write again."""
    if plan.config.run.dry_run:
        return Metrics(None)
    metrics = Metrics(folder / "metrics.jsonl", engine.monitor)
    metrics.cut_behind(start.step if plan.checkpoint else -1)
    if plan.checkpoint:
        metrics.write("event", start.step, event="resume", checkpoint=plan.checkpoint.name)
    return metrics


def _facts(plan: Plan, name: str, step: int) -> dict[str, Any]:
    """The model card's rows."""
    config, manifest = plan.config, plan.manifest
    shape = plan.student.shape
    return {
        "name": f"{shape.layers}x{shape.hidden} student" if plan.teacher else "Encoder",
        "teacher": config.teacher.teacher or "none (pretrained from scratch)",
        "objective": config.objective.objective,
        "layers": config.objective.layers,
        "initialisation": config.student.student or config.student.init,
        "data": "; ".join(str(source.get("name", source)) for source in manifest.sources),
        "tokens per row": manifest.seq_length,
        "steps": step,
        "tokens": step * plan.tokens_per_step,
        "learning rate": config.schedule.lr,
        "global batch": plan.sizes.global_batch,
        "precision": str(plan.dtype).removeprefix("torch."),
        "seed": config.run.seed,
        "code commit": git_commit() or "unknown",
    }


def _peak_of_all(device: torch.device) -> float | None:
    peak = peak_flops(device)
    return peak * dist.get_world_size() if peak else None


def _estimate(plan: Plan, end: Progress) -> str:
    """Speed of a dry run, and how long the whole run would take at it."""
    speed, tokens = end.tokens / end.seconds, planned_tokens(plan)
    text = f"about {speed:,.0f} tokens/s (the first steps are slower than the rest)"
    return (
        text if tokens is None else f"{text}, {tokens / speed / 3600:.2f} hours for the whole run"
    )
