"""What a run will do: everything checked and counted before DeepSpeed or any long work starts."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from data_prep.shard_format import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardReader,
    read_manifest,
    verify_files,
)
from data_prep.tokenization import load_tokenizer, tokenizer_fingerprint
from potstill.console import say
from potstill.errors import InputError
from pretrain.checkpoint import find_checkpoint, read_progress
from pretrain.config import Config
from pretrain.ds_config import (
    BatchSizes,
    batch_sizes,
    check_with_deepspeed,
    precision,
    read_ds_config,
    resolve_ds_config,
)
from pretrain.environment import lacks_bf16
from pretrain.flops import training_flops
from pretrain.models import Encoder, check_local, load_encoder
from pretrain.objectives import Settings, build_objective, check_models
from pretrain.objectives.composite import WeightedSum
from pretrain.student.build import build_student
from pretrain.student.depth import map_layers
from pretrain.teacher import check_teacher


@dataclass(frozen=True)
class Plan:
    """A checked run: its settings, models on the CPU, sizes and costs."""

    config: Config
    manifest: Manifest
    ds_config: dict[str, Any]
    sizes: BatchSizes
    dtype: torch.dtype
    objective: WeightedSum
    student: Encoder
    teacher: Encoder | None
    checkpoint: Path | None
    identity: dict[str, Any]
    flops_per_token: float

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks per optimiser step, rows taken as full."""
        return self.sizes.global_batch * self.manifest.seq_length


def make_plan(config: Config) -> Plan:
    """Read, check and build everything; on each rank alike.

    Raises:
        InputError: anything that would make the run fail or be another one than asked for.
    """
    world_size = dist.get_world_size()
    torch.manual_seed(config.run.seed)  # of weights that neither a checkpoint nor `init` gives
    path = Path(str(config.run.ds_config))
    ds_config = read_ds_config(path)
    sizes = batch_sizes(ds_config, world_size, path)
    folder = Path(str(config.run.output))
    ds_config = resolve_ds_config(ds_config, sizes, None if config.run.dry_run else folder)
    check_with_deepspeed(ds_config, path)
    manifest = _check_data(config)
    teacher = _load_teacher(config, manifest)
    student = build_student(config.student, teacher, manifest, config.run.seed)
    objective = _build_objective(config, student, teacher)
    _check_positions(manifest, student, teacher)
    identity = _identity(config, sizes, ds_config)
    checkpoint = _check_folder(config, folder, identity)
    dist.barrier()  # no rank writes there before all have looked
    flops = training_flops(
        student.shape,
        objective.student_features(),
        teacher.shape if teacher else None,
        objective.teacher_features(),
        manifest.seq_length,
        config.data.mlm_probability,
    )
    return Plan(
        config=config,
        manifest=manifest,
        ds_config=ds_config,
        sizes=sizes,
        dtype=precision(ds_config),
        objective=objective,
        student=student,
        teacher=teacher,
        checkpoint=checkpoint,
        identity=identity,
        flops_per_token=flops,
    )


def _check_data(config: Config) -> Manifest:
    """Shards whole, with validation rows and enough of them masked to learn from."""
    folder = Path(str(config.data.data))
    if not folder.is_dir():
        raise InputError(f"--data {folder}: there is no such folder; make it: data_prep/shard.py")
    manifest = read_manifest(folder)
    for split in (TRAIN, VALIDATION):
        ShardReader(folder, split)  # refuses a split without rows
    if config.data.check_shards:
        share = manifest.files[dist.get_rank() :: dist.get_world_size()]
        _on_every_rank(lambda: verify_files(folder, manifest, share))
    return manifest


def _on_every_rank(check: Any) -> None:
    """Run a check whose work is split over ranks; if one rank fails, all of them do."""
    fault = None
    try:
        check()
    except InputError as error:
        fault = str(error)
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for message in faults:
        if message:
            raise InputError(message)


def _load_teacher(config: Config, manifest: Manifest) -> Encoder | None:
    """The teacher, if the objective learns from one, with the tokenizer of the shards."""
    objective = build_objective(str(config.objective.objective), Settings(()))
    source = config.teacher.teacher
    if source is None:
        if objective.uses_teacher:
            raise InputError(
                f"--objective {config.objective.objective} learns from a teacher: give --teacher"
            )
        return None
    check_local(source, "--teacher")
    _check_tokenizer(source, config, manifest)
    return load_encoder(source, "--teacher", config.teacher.revision)


def _check_tokenizer(source: str, config: Config, manifest: Manifest) -> None:
    """A teacher must read the very token numbers that stand in the shards."""
    fingerprint = tokenizer_fingerprint(load_tokenizer(source))
    if fingerprint != manifest.tokenizer_fingerprint:
        raise InputError(
            f"--teacher {source} has another tokenizer than the shards in {config.data.data} "
            f"(fingerprints {fingerprint[:12]} and {manifest.tokenizer_fingerprint[:12]}); shard "
            f"the corpus again with --tokenizer {source}"
        )


def _build_objective(config: Config, student: Encoder, teacher: Encoder | None) -> WeightedSum:
    settings = config.objective
    teacher_layers = teacher.shape.layers if teacher else student.shape.layers
    pairs = map_layers(settings.layers, student.shape.layers, teacher_layers)
    objective = build_objective(
        str(settings.objective),
        Settings(pairs, settings.kd_temperature, settings.kd_positions, settings.projection),
    )
    if not config.data.mlm_probability and any(o.counted == "masked" for o in objective.objectives):
        raise InputError(
            f"--mlm_probability 0 masks nothing, and --objective {settings.objective} learns at "
            "masked positions; raise it, or use --kd_positions all"
        )
    if teacher is not None:
        check_models(objective, student.shape, teacher.shape)
        check_teacher(teacher, objective.teacher_features(), str(settings.objective))
    return objective


def _check_positions(manifest: Manifest, student: Encoder, teacher: Encoder | None) -> None:
    for who, encoder in (("teacher", teacher), ("student", student)):
        if encoder is None:
            continue
        if encoder.shape.positions < manifest.seq_length:
            raise InputError(
                f"the shards' seq_length is {manifest.seq_length}, but the {who} has only "
                f"{encoder.shape.positions} positions; shard with a smaller --seq_length"
            )
        if encoder.shape.vocab < manifest.vocab_size:
            raise InputError(
                f"the shards' vocabulary has {manifest.vocab_size} tokens, the {who}'s only "
                f"{encoder.shape.vocab}; shard with the {who}'s tokenizer"
            )


def _identity(config: Config, sizes: BatchSizes, ds_config: dict[str, Any]) -> dict[str, Any]:
    """What makes it this run: its settings, the shards' content, batch, precision and ZeRO."""
    manifest = (Path(str(config.data.data)) / MANIFEST).read_bytes()
    return {
        **config.identity(),
        "data": hashlib.sha256(manifest).hexdigest(),
        "global_batch": sizes.global_batch,
        "precision": str(precision(ds_config)),
        "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0),
    }


def _check_folder(config: Config, folder: Path, identity: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        InputError: the folder belongs to another run, or is something else.
    """
    if config.run.dry_run:
        return None
    record = folder / "config.json"
    if record.exists():
        try:
            before = json.loads(record.read_text())["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{record} is unreadable ({error!r}); give another --output"
            ) from error
        changed = sorted(n for n in identity if identity[n] != before.get(n))
        if changed:
            name = changed[0]
            raise InputError(
                f"--output {folder} holds another run: {', '.join(changed)} differ "
                f"({name} was {before.get(name)!r}, is {identity[name]!r}); give another --output"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"--output {folder} is not empty and holds no run; give another folder")
    if not os.access(next(p for p in (folder, *folder.absolute().parents) if p.exists()), os.W_OK):
        raise InputError(f"--output {folder}: the folder cannot be written")
    return find_checkpoint(config.run.resume, folder)


def is_finished(plan: Plan) -> bool:
    """Whether the folder holds the whole run already: its last step and the exported student."""
    if plan.checkpoint is None or not (Path(str(plan.config.run.output)) / "student").is_dir():
        return False
    done, schedule = read_progress(plan.checkpoint)[0], plan.config.schedule
    out_of_time = schedule.max_hours is not None and done.seconds >= schedule.max_hours * 3600
    return out_of_time or done.step == schedule.max_steps


def show_plan(plan: Plan, device: torch.device) -> None:
    """Print what the run will do: shapes, parameters, cost."""
    trained = sum(p.numel() for p in plan.student.model.parameters())
    schedule = plan.config.schedule
    say(f"objective  {plan.config.objective.objective}, layers {plan.config.objective.layers}")
    for who, encoder in (("teacher", plan.teacher), ("student", plan.student)):
        if encoder is not None:
            say(f"{who}    {describe_shape(encoder)}")
    say(
        f"batch      {plan.sizes.global_batch} rows of {plan.manifest.seq_length} = "
        f"{plan.tokens_per_step:,} tokens: {plan.sizes.micro_batch} x "
        f"{plan.sizes.accumulation} micro-batches x {dist.get_world_size()} ranks, {plan.dtype}"
    )
    say(f"cost       {plan.flops_per_token / 1e6:.1f} MFLOP per token, both models")
    tokens = planned_tokens(plan)
    if tokens is not None:
        rows = plan.manifest.splits[TRAIN].rows
        say(
            f"run        {schedule.max_steps:,} steps, {tokens:,} tokens "
            f"({tokens / plan.manifest.seq_length / rows:.2f} epochs), "
            f"{tokens * plan.flops_per_token:.2e} FLOP"
        )
    say(f"memory     about {memory_estimate(plan, trained) / 2**30:.2f} GiB per rank on {device}")
    if device.type == "cpu" and plan.dtype == torch.bfloat16 and lacks_bf16():
        say("note       this CPU has no bf16 instructions: ds_configs/cpu.json is much faster")
    if plan.checkpoint:
        say(f"resume     from {plan.checkpoint}")


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


def memory_estimate(plan: Plan, trained: int) -> float:
    """Bytes per rank: weights, gradients, AdamW's states, and the activations of a micro-batch.

    An estimate to tell 2 GiB from 20: about 34 values of the width per token and layer are kept
    for backward, plus the attention's L x L of each head where it is written out.
    """
    half = plan.dtype != torch.float32
    states = trained * (2 + 4 + 12 if half else 4 + 4 + 8)
    frozen = sum(p.numel() for p in plan.teacher.model.parameters()) if plan.teacher else 0
    weights = frozen * (2 if half else 4)
    shape, tokens = plan.student.shape, plan.sizes.micro_batch * plan.manifest.seq_length
    kept = tokens * shape.layers * (34 * shape.hidden + 2 * shape.heads * plan.manifest.seq_length)
    return states + weights + kept * (2 if half else 4)
