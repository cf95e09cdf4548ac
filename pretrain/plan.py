"""What a run will do: everything checked and counted before DeepSpeed or any long work starts."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from data_prep.shard_format import (
    TRAIN,
    VALIDATION,
    Manifest,
    ShardReader,
    damaged_files,
    read_manifest,
)
from data_prep.tokenization import load_tokenizer
from potstill.console import say
from potstill.errors import InputError
from pretrain.agreement import from_main_rank
from pretrain.checkpoint import read_record
from pretrain.checks import check_positions, check_tokenizer
from pretrain.config import Config
from pretrain.ds_config import (
    BatchSizes,
    batch_sizes,
    check_with_deepspeed,
    precision,
    read_ds_config,
    resolve_ds_config,
)
from pretrain.features import Feature
from pretrain.flops import Work, forward_flops, student_flops
from pretrain.knowledge.cuts import Cut
from pretrain.knowledge.source import (
    Knowledge,
    check_agrees,
    open_knowledge,
    stored_run,
)
from pretrain.models import Encoder, check_local, fingerprint, load_config, load_encoder
from pretrain.objectives import Settings, build_objective, check_models
from pretrain.objectives.composite import WeightedSum
from pretrain.run_folder import (
    check_folders,
    data_identity,
    identity_of,
    keep_global_batch,
)
from pretrain.student.build import build_student
from pretrain.student.depth import map_layers
from pretrain.students import FOLDER as STUDENTS
from pretrain.students import Member, Stop, read_members
from pretrain.teacher import check_teacher


@dataclass(frozen=True)
class StudentPlan:
    """One student, checked and built: its model on the CPU, and what training it costs.

    Attributes:
        flops_per_token: of its own forward and backward.
        checkpoint: where it goes on, if it does.
    """

    member: Member
    ds_config: dict[str, Any]
    objective: WeightedSum
    student: Encoder
    identity: dict[str, Any]
    checkpoint: Path | None
    flops_per_token: float

    @property
    def config(self) -> Config:
        """Its settings: those of a lone run."""
        return self.member.config


@dataclass(frozen=True)
class Plan:
    """A checked run: its settings, students, teacher, sizes.

    Attributes:
        left_out: names of bad shards, under `--on_bad_shard skip`.
        knowledge: what the students learn from in place of the teacher, which then never runs.
        students: those that are trained, one in a lone run.
        stopped: those of `--students` that an earlier start had to stop, by name.
        begun_on: how many ranks the run had when it began.
    """

    config: Config
    manifest: Manifest
    left_out: frozenset[str]
    sizes: BatchSizes
    dtype: torch.dtype
    teacher: Encoder | None
    knowledge: Knowledge | None
    students: tuple[StudentPlan, ...]
    stopped: dict[str, Stop]
    identity: dict[str, Any]
    begun_on: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all ranks per optimiser step, rows taken as full."""
        return self.sizes.global_batch * self.manifest.seq_length

    @property
    def teacher_features(self) -> frozenset[Feature]:
        """What the teacher must give to all students together."""
        wanted = (own.objective.teacher_features() for own in self.students)
        return frozenset[Feature]().union(*wanted)

    @property
    def flops_per_token(self) -> float:
        """Of all students, and one forward of the teacher."""
        own = sum(own.flops_per_token for own in self.students)
        return own + teacher_flops(self, self.teacher_features)


def make_plan(config: Config, device: torch.device) -> Plan:
    """Read, check and build everything; on each rank alike.

    Args:
        device: of this rank, that can do what `config.acceleration` asks for or not.

    Raises:
        InputError: anything that would make the run fail or be another one than asked for.
    """
    knowledge = _open_knowledge(config)
    if knowledge is not None:
        data, objective = stored_run(knowledge, config.data, config.objective)
        config = replace(config, data=data, objective=objective)
    members = read_members(config)
    path = Path(str(config.run.ds_config))
    ds_config = read_ds_config(path)
    world_size = dist.get_world_size()
    sizes = batch_sizes(ds_config, world_size, path)
    sizes, begun_on = from_main_rank(
        lambda: keep_global_batch(sizes, ds_config, config, world_size)
    )
    ds_configs = [_resolve(member, ds_config, sizes) for member in members]
    check_with_deepspeed(ds_configs[0], path)
    config.acceleration.check(device, ds_config, sizes.accumulation, precision(ds_config))
    manifest, left_out = _check_data(config)
    teacher = _load_teacher(members, manifest, knowledge)
    if knowledge is not None:
        _check_knowledge(config, knowledge, manifest, left_out)
    identities = [identity_of(member.config, sizes, ds_config) for member in members]
    whole = {STUDENTS: [m.name for m in members]} if config.run.students else identities[0]
    checkpoints, stopped = from_main_rank(lambda: check_folders(config, whole, members, identities))
    students, work = [], _work(config, manifest, sizes)
    for member, own_ds_config, own_identity in zip(members, ds_configs, identities, strict=True):
        with member.blamed():
            student, objective = _build_student(member.config, teacher, manifest, sizes, knowledge)
        if member.name in checkpoints:
            shape, frozen = student.shape, member.config.student.freeze is not None
            compared = teacher.shape if teacher else shape
            cost = student_flops(objective, shape, compared, work, frozen)
            students.append(
                StudentPlan(
                    member,
                    own_ds_config,
                    objective,
                    student,
                    own_identity,
                    checkpoints[member.name],
                    cost,
                )
            )
    if knowledge is not None and config.data.check_shards:
        knowledge.check_files()  # last: it reads all of them
    dist.barrier()  # no rank writes to the folder before all have looked
    return Plan(
        config=config,
        manifest=manifest,
        left_out=left_out,
        sizes=sizes,
        dtype=precision(ds_config),
        teacher=teacher,
        knowledge=knowledge,
        students=tuple(students),
        stopped=stopped,
        identity=whole,
        begun_on=begun_on,
    )


def _resolve(member: Member, ds_config: dict[str, Any], sizes: BatchSizes) -> dict[str, Any]:
    """What DeepSpeed gets for one student: its monitors write where no other student's do.

    Raises:
        InputError: a monitor that can follow only one training per process.
    """
    for section in ("wandb", "comet") if member.name else ():
        if ds_config.get(section, {}).get("enabled"):
            raise InputError(
                f"--ds_config {member.config.run.ds_config}: {section} follows one training per "
                "process, and --students has several; use tensorboard or csv_monitor, which write "
                "to each student's folder"
            )
    own = dict(ds_config)
    for section in ("tensorboard", "csv_monitor"):
        place = own.get(section, {}).get("output_path")
        if member.name and place:
            own[section] = {**own[section], "output_path": str(Path(place) / member.name)}
    return resolve_ds_config(own, sizes, None if member.config.run.dry_run else member.folder)


def _build_student(
    config: Config,
    teacher: Encoder | None,
    manifest: Manifest,
    sizes: BatchSizes,
    knowledge: Knowledge | None,
) -> tuple[Encoder, WeightedSum]:
    """A student and what it learns; no matter which others there are."""
    torch.manual_seed(config.student_seed)  # of weights that neither a checkpoint nor `init` gives
    student = build_student(config.student, teacher, manifest, config.student_seed)
    cut = knowledge.cut if knowledge is not None else None
    objective = _build_objective(config, student, teacher, manifest, sizes, cut)
    if knowledge is not None:
        knowledge.check_objective(objective)
        knowledge.check_cut_form(config.objective.cut_form)
    if teacher is not None:
        check_positions(teacher, "teacher", manifest)
    check_positions(student, "student", manifest)
    _check_freeze(config, objective)
    return student, objective


def _check_freeze(config: Config, objective: WeightedSum) -> None:
    head_learns = any(kind in ("logits", "predictions") for kind, _ in objective.student_features())
    if config.student.freeze and not head_learns:
        raise InputError(
            f"--freeze {config.student.freeze} leaves the MLM head to train, which --objective "
            f"{config.objective.objective} does not reach; use mlm or kd"
        )


def teacher_flops(plan: Plan, wanted: Set[Feature]) -> float:
    """FLOPs per token of one forward of the teacher."""
    if plan.teacher is None or plan.knowledge is not None:
        return 0.0
    work = _work(plan.config, plan.manifest, plan.sizes)
    return forward_flops(plan.teacher.shape, wanted, work.length, work.masked_share)


def _work(config: Config, manifest: Manifest, sizes: BatchSizes) -> Work:
    return Work(sizes.micro_batch, manifest.seq_length, config.data.mlm_probability)


def _check_data(config: Config) -> tuple[Manifest, frozenset[str]]:
    """Shards with training and validation rows; the names of the bad ones, which are left out."""
    folder = Path(str(config.data.data))
    if not folder.is_dir():
        raise InputError(f"--data {folder}: there is no such folder; make it: data_prep/shard.py")
    manifest = read_manifest(folder)
    bad = _bad_files(folder, manifest) if config.data.check_shards else {}
    shards = {file.name for file in manifest.files}
    for name, fault in sorted(bad.items()):
        if name not in shards:
            raise InputError(fault)
        if config.data.on_bad_shard == "stop":
            raise InputError(f"{fault}, or go on without it: --on_bad_shard skip")
    for split in (TRAIN, VALIDATION):
        ShardReader(folder, split, bad.keys())  # refuses a split without rows
    for _, fault in sorted(bad.items()):
        say(f"note: left out: {fault}")
    return manifest, frozenset(bad)


def _bad_files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """What is wrong with shards and tokenizer files, by name; each rank looks at its share."""
    files = manifest.files + manifest.tokenizer_files
    found: list[dict[str, str]] = [{}] * dist.get_world_size()
    own = damaged_files(folder, files[dist.get_rank() :: dist.get_world_size()])
    dist.all_gather_object(found, own)
    return {name: fault for share in found for name, fault in share.items()}


def _open_knowledge(config: Config) -> Knowledge | None:
    folder = config.teacher.knowledge
    return None if folder is None else open_knowledge(Path(folder))


def _check_knowledge(
    config: Config, knowledge: Knowledge, manifest: Manifest, left_out: Set[str]
) -> None:
    """Refuse knowledge that is not of the run's rows, masked as the run masks them."""
    if left_out:
        raise InputError(
            f"--on_bad_shard skip lets other rows stand in for those of {min(left_out)}, of which "
            "--knowledge knows nothing; copy the shards again"
        )
    asked = {**vars(config.data), **vars(config.run)}
    check_agrees(knowledge, data_identity(Path(str(config.data.data))), manifest, asked)
    knowledge.reader().check_sizes()


def _load_teacher(
    members: Sequence[Member], manifest: Manifest, knowledge: Knowledge | None
) -> Encoder | None:
    """The teacher, if an objective learns from one, with the tokenizer of the shards.

    Of stored knowledge its shape only, unless a student starts from its layers.
    """
    config = members[0].config
    source = config.teacher.teacher
    if source is None and knowledge is not None:
        return _known_teacher(members, knowledge)
    for member in members:
        with member.blamed():
            expression = str(member.config.objective.objective)
            objective = build_objective(expression, Settings(()))
            if source is None and objective.uses_teacher:
                raise InputError(f"--objective {expression} learns from a teacher: give --teacher")
    if source is None:
        return None
    check_local(source, "--teacher")
    load_config(source, "--teacher", config.teacher.revision)  # not to be blamed on the tokenizer
    tokenizer = load_tokenizer(source, config.teacher.revision)
    check_tokenizer(tokenizer, source, Path(str(config.data.data)), manifest)
    teacher = load_encoder(source, "--teacher", config.teacher.revision)
    if knowledge is not None and fingerprint(teacher) != knowledge.manifest.contents.teacher:
        raise InputError(
            f"--teacher {source} is not the teacher whose knowledge is in {knowledge.folder} "
            f"({knowledge.manifest.contents.teacher_name}): their weights differ"
        )
    return teacher


def _known_teacher(members: Sequence[Member], knowledge: Knowledge) -> Encoder:
    for member in members:
        with member.blamed():
            settings = member.config.student
            if settings.init != "random":
                raise InputError(
                    f"--init {settings.init} copies teacher layers, which --knowledge does not "
                    "hold: give --teacher too"
                )
    return knowledge.teacher


def _build_objective(
    config: Config,
    student: Encoder,
    teacher: Encoder | None,
    manifest: Manifest,
    sizes: BatchSizes,
    cut: Cut | None,
) -> WeightedSum:
    settings = config.objective
    teacher_layers = teacher.shape.layers if teacher else student.shape.layers
    chosen = settings.defaulted
    pairs = map_layers(chosen["layers"], student.shape.layers, teacher_layers)
    work = _work(config, manifest, sizes)
    logits = work.logits(chosen["kd_positions"], manifest.vocab_size)
    objective = build_objective(str(settings.objective), settings.settings(pairs, logits, cut))
    if not config.data.mlm_probability and any(o.counted == "masked" for o in objective.objectives):
        raise InputError(
            f"--mlm_probability 0 masks nothing, and --objective {settings.objective} learns at "
            "masked positions; raise it, or use --kd_positions all"
        )
    if teacher is not None:
        check_models(objective, student.shape, teacher.shape)
        check_teacher(teacher, objective.teacher_features(), str(settings.objective))
    return objective


def is_finished(plan: Plan) -> bool:
    """Whether the folder holds the whole run already: its last step and the exported students."""
    return from_main_rank(lambda: all(_is_trained(own) for own in plan.students))


def _is_trained(own: StudentPlan) -> bool:
    if own.checkpoint is None or not (own.member.folder / "student").is_dir():
        return False
    done, schedule = read_record(own.checkpoint).progress, own.config.schedule
    out_of_time = schedule.max_hours is not None and done.seconds >= schedule.max_hours * 3600
    return out_of_time or done.step == schedule.max_steps
