"""What storing knowledge will take, and from how many students on it pays."""

import shutil
from dataclasses import dataclass

import torch
from torch import distributed as dist

from data_prep.shard_format import TRAIN, VALIDATION
from potstill.console import say
from pretrain.knowledge.entries import row_bytes
from pretrain.knowledge.job import Job
from pretrain.knowledge.sample import Sample, place_of, take_sample
from pretrain.knowledge.trial_student import make_student
from pretrain.summary import describe_shape

_BYTES = ("bytes", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Estimate:
    """What a sample says of the whole; a run is one training, of one student or of several.

    Attributes:
        sample: seconds are of one row on one rank, and ranks work beside one another.
        length: L. rows: of the training split, that a pass takes. slots: rows that are stored, of
            all copies and splits. epochs: passes of a run.
    """

    sample: Sample
    length: int
    rows: int
    slots: int
    epochs: int
    ranks: int

    @property
    def total_bytes(self) -> float:
        """Of all files."""
        return self.sample.file_bytes * self.slots

    @property
    def store_seconds(self) -> float:
        """Until all is stored, on these ranks."""
        return (self.sample.storing + self.sample.writing) * self.slots / self.ranks

    @property
    def live_seconds(self) -> float:
        """Of a live teacher, in one pass."""
        return self.sample.teacher * self.rows / self.ranks

    @property
    def stored_seconds(self) -> float:
        """Of reading and decoding in its place, in one pass."""
        return (self.sample.reading + self.sample.decoding) * self.rows / self.ranks

    @property
    def student_seconds(self) -> float:
        """Of the student itself, in one pass."""
        return self.sample.student * self.rows / self.ranks

    @property
    def saved_seconds(self) -> float:
        """That a run takes less; below 0 where reading costs more than the teacher."""
        return (self.live_seconds - self.stored_seconds) * self.epochs

    @property
    def speedup(self) -> float:
        """Of a student's pass."""
        stored = self.student_seconds + self.stored_seconds
        return (self.student_seconds + self.live_seconds) / stored

    @property
    def pays_from(self) -> int | None:
        """The least number of runs that take less with storing than without; None: none does."""
        saved = self.saved_seconds
        return int(self.store_seconds // saved) + 1 if saved > 0 else None

    @property
    def write_rate(self) -> float:
        """Bytes per second that keep the teacher busy."""
        return self.ranks * self.sample.file_bytes / self.sample.storing

    @property
    def read_rate(self) -> float:
        """Bytes per second that students take who never wait for them."""
        return self.ranks * self.sample.file_bytes / (self.sample.student + self.sample.decoding)


def describe(job: Job) -> None:
    """Print what will be stored."""
    contents, bytes_ = job.contents, row_bytes(job.entries)
    rows = sum(contents.slots(split) for split in (TRAIN, VALIDATION))
    say(f"teacher    {describe_shape(job.teacher)}")
    say(f"objective  {contents.objective}, layers {contents.layers}")
    for entry in job.entries:
        fields = ", ".join(f"{name} {shape} {code}" for name, code, shape in entry.fields())
        say(f"stored     {fields}")
    say(
        f"size       {bytes_ / contents.seq_length:,.1f} bytes a token before compression, "
        f"{rows:,} rows, {size_of(rows * bytes_)}"
    )


def show_estimate(job: Job, device: torch.device) -> None:
    """Measure a sample and print what it says; all ranks call it. Nothing stays on the disk.

    Raises:
        InputError: a student that cannot be, or values that the precision cannot hold.
    """
    student, contents = make_student(job), job.contents
    say(f"student    {describe_shape(student.encoder)}")
    estimate = Estimate(
        take_sample(job, student, device),
        length=contents.seq_length,
        rows=contents.rows[TRAIN],
        slots=sum(contents.slots(split) for split in (TRAIN, VALIDATION)),
        epochs=job.config.epochs or contents.copies,
        ranks=dist.get_world_size(),
    )
    _show_bytes(job, estimate)
    _show_rates(estimate, device)
    _show_hours(estimate)
    _show_runs(estimate)


def _show_bytes(job: Job, estimate: Estimate) -> None:
    raw = row_bytes(job.entries)
    a_token = estimate.sample.file_bytes / estimate.length
    ratio = f", {job.contents.compression}, ratio {raw / estimate.sample.file_bytes:.2f}"
    say(
        f"on disk    {a_token:,.1f} bytes a token, {size_of(estimate.total_bytes)} in all (measured"
        f"{'' if job.contents.compression == 'none' else ratio})"
    )
    if job.config.output is not None:
        free = shutil.disk_usage(place_of(job.config.folder)).free
        fits = "" if free > estimate.total_bytes else ": IT DOES NOT FIT"
        say(f"free       {size_of(free)} there{fits}")


def _show_rates(estimate: Estimate, device: torch.device) -> None:
    sample, ranks, length = estimate.sample, estimate.ranks, estimate.length
    say(f"measured   on {ranks} x {device.type}, all at once:")
    for what, seconds in (
        ("teacher, live", sample.teacher),
        ("teacher, and making records of it", sample.storing),
        ("student's step, without the engine", sample.student),
        ("decoding what was read", sample.decoding),
    ):
        say(f"  {ranks * length / seconds:>12,.0f} tokens/s  {what}")
    say(
        f"writing    {size_of(estimate.write_rate)}/s keep the teacher busy; measured: "
        f"{size_of(ranks * sample.file_bytes / sample.writing)}/s, compression included"
    )
    say(
        f"reading    {size_of(estimate.read_rate)}/s are what the student takes; measured, in "
        f"random order: {size_of(ranks * sample.file_bytes / sample.reading)}/s"
    )


def _show_hours(estimate: Estimate) -> None:
    say(f"to store   {duration_of(estimate.store_seconds)}, {estimate.slots:,} rows")
    say(
        f"a pass     over {estimate.rows:,} rows: student {duration_of(estimate.student_seconds)}, "
        f"live teacher {duration_of(estimate.live_seconds)}, reading and decoding instead "
        f"{duration_of(estimate.stored_seconds)}: {estimate.speedup:.2f} times as fast"
    )
    passes = "1 pass" if estimate.epochs == 1 else f"{estimate.epochs} passes"
    gain = "saves" if estimate.saved_seconds > 0 else "loses"
    teacher = duration_of(estimate.live_seconds * estimate.epochs)
    say(
        f"a student  of {passes} {gain} {duration_of(abs(estimate.saved_seconds))} ({teacher} of "
        "the teacher's time)"
    )


def _show_runs(estimate: Estimate) -> None:
    """From when on storing pays, and what sharing a live teacher (`--students`) does to that."""
    runs = estimate.pays_from
    if runs is None:
        say("pays       never: reading and decoding take longer than the teacher")
        return
    shared = duration_of(estimate.live_seconds * estimate.epochs)
    store = duration_of(estimate.store_seconds)
    if runs == 1:
        say(f"pays       for one student already: {shared} of a live teacher, {store} to store")
        return
    say(
        f"pays       from {runs:,} students on that are trained one by one, instead of each beside "
        "a live teacher"
    )
    say(
        f"shared     students of one run (--students) share a live teacher: {shared} for all of "
        f"them, {store} to store; then it pays from {runs:,} such runs on"
    )


def size_of(bytes_: float) -> str:
    """`1.23 GB`."""
    power = 0
    while bytes_ >= 999.5 and power < len(_BYTES) - 1:
        bytes_, power = bytes_ / 1000, power + 1
    return f"{bytes_:.3g} {_BYTES[power]}"


def duration_of(seconds: float) -> str:
    """`12.3 s`, `4.56 min` or `7.89 hours`."""
    for unit, name in ((3600, "hours"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.2f} {name}"
    return f"{seconds:.3g} s"
