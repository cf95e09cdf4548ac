"""Extract a student of any width and depth from a teacher (ETD), to start distillation from.

python pretrain/extract.py --teacher google-bert/bert-base-uncased --layers 6 --hidden 384 \\
    --method etd-impt --data shards --output students/etd-6x384
deepspeed --num_gpus 8 pretrain/extract.py ...     shares the rows of etd-impt among 8 ranks

The result is a normal Hugging Face folder: `pretrain/run.py --student students/etd-6x384`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from data_prep.shard_format import TRAIN, VALIDATION, ShardReader
from potstill.console import is_main_rank, program, progress, say
from potstill.signals import Signalled, Stopped, raised_signals
from pretrain.attention import choose_attention
from pretrain.batches import Slices, validation_batches
from pretrain.engine import start_ranks
from pretrain.extract_config import RANDOM, parse_config
from pretrain.masking import shard_masking
from pretrain.models import Encoder
from pretrain.student.extraction import Extraction, is_finished, make_extraction
from pretrain.student.extraction_record import describe, show, write
from pretrain.student.importance import FirstRows, held_out_mlm, importance
from pretrain.student.width import Scores, choose, extract, random_scores
from pretrain.summary import describe_shape


@program
def main(arguments: Sequence[str] | None = None) -> None:
    """The program; see the module's docstring."""
    try:
        with raised_signals():
            config = parse_config(arguments)
            device = start_ranks()
            if is_finished(config):
                say(f"finished already: {config.output}")
            else:
                run(make_extraction(config), device)
            dist.destroy_process_group()
    except Signalled as signalled:
        kept = "a student appears whole or not at all: run the same command again"
        raise Stopped(signalled.number, kept) from None


def run(job: Extraction, device: torch.device) -> None:
    """Choose, cut, measure, write; all ranks call it, rank 0 writes."""
    dist.barrier()  # no rank writes before all have looked
    say(f"teacher    {describe_shape(job.teacher)}")
    kept = choose(score(job, device), job.hidden, job.ffn, job.config.ablation)
    student = extract(job.teacher, kept, job.chosen, job.config.seed)
    say(f"student    {describe_shape(student)}, layers {', '.join(map(str, job.chosen))}")
    record = describe(job, kept, student, mlm_losses(job, student, device))
    show(record)
    if is_main_rank():
        write(Path(str(job.config.output)), student, job.tokenizer, record)
    dist.barrier()
    say(f"written    {job.config.output}")


def score(job: Extraction, device: torch.device) -> Scores:
    """The scores of the method; importance is measured by all ranks together."""
    if job.config.method == RANDOM:
        return random_scores(job.teacher.shape, job.config.seed)
    folder = Path(str(job.config.data))
    reader = ShardReader(folder, TRAIN)
    rows = FirstRows(
        reader,
        shard_masking(folder, job.config.mlm_probability, job.config.seed),
        job.pad_id,
        min(job.config.rows, reader.rows),
        job.config.micro_batch,
        dist.get_rank(),
        dist.get_world_size(),
    )
    bar = progress(rows, total=len(rows), desc="importance", unit="batch")
    return importance(job.teacher, bar, choose_attention("auto", device), device)


def mlm_losses(
    job: Extraction, student: Encoder, device: torch.device
) -> tuple[float, float] | str:
    """Held-out MLM loss of teacher and student, or why there is none."""
    if job.manifest is None:
        return "not measured without --data"
    if not job.teacher.trained_head:
        return "not measured: the teacher has no trained MLM head"
    if not job.manifest.splits[VALIDATION].rows:
        return f"not measured: {job.config.data} has no validation rows"
    folder = Path(str(job.config.data))
    slices = Slices(job.config.micro_batch, 1, dist.get_rank(), dist.get_world_size())

    def loss(encoder: Encoder) -> float:
        batches = validation_batches(
            ShardReader(folder, VALIDATION),
            shard_masking(folder, job.config.mlm_probability, job.config.seed),
            job.pad_id,
            slices,
            job.config.validation_rows,
        )
        bar = progress(batches, desc="held-out loss", unit="batch")
        return held_out_mlm(encoder.model, bar, choose_attention("auto", device), device)

    return loss(job.teacher), loss(student)


if __name__ == "__main__":
    main()
