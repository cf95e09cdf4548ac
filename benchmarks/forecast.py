"""What many devices would give, by the formula of `scale_model.py`: nothing is run.

    python benchmarks/forecast.py --measured benchmarks/results/scaling-cpu.json
    python benchmarks/forecast.py --step_seconds ROWS:SECONDS,ROWS:SECONDS --trained NUMBER

The step times are inputs: whole training steps (teacher, student, optimiser) of one device at two
micro-batches or more, measured on a GPU by `benchmarks/gpu.py` or a CPU by `benchmarks/scaling.py`,
whose file `--measured` takes. Bandwidths are gigabytes per second of one device in one direction;
their defaults are datasheet figures (NVLink 4, and a 400 Gbit/s adapter for each device), not
measurements. `docs/scale.md` has the formula in words, and what it assumes.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common import write_report
from scale_model import Cluster, Link, Row, Work, forecasts

from potstill.console import program
from potstill.errors import InputError

DEVICES = "1,2,8,16,32,64,128,256,512,1024"
MEASURED = {
    "trained": None,
    "backward_share": 0.4,
    "node": 8,
    "inside_gigabytes": 450.0,
    "inside_microseconds": 3.0,
}
"""What `--measured` knows, and what stands for it without."""
POSITIVE = (
    *("bucket", "global_batch", "length", "tokens", "node", "gradient_bytes", "parameter_bytes"),
    *("inside_gigabytes", "between_gigabytes"),
)
NEEDED = ("points", "trained", "backward_share", "link", "ranks")


def parse_points(text: str) -> tuple[tuple[int, float], ...]:
    """Rows and seconds of `"32:0.021,64:0.035"`.

    Raises:
        InputError: malformed.
    """
    try:
        pairs = [point.split(":") for point in text.split(",")]
        return tuple((int(rows), float(seconds)) for rows, seconds in pairs)
    except ValueError as error:
        raise InputError(
            f"--step_seconds {text!r}: write ROWS:SECONDS,ROWS:SECONDS, such as 32:0.021,64:0.035"
        ) from error


def parse_devices(text: str) -> tuple[int, ...]:
    """Numbers of devices, `"1,8,64"`.

    Raises:
        InputError: not positive whole numbers.
    """
    if not all(word.isdecimal() and int(word) > 0 for word in text.split(",")):
        raise InputError(f"--devices {text!r}: write positive numbers, such as 8,64,1024")
    return tuple(int(word) for word in text.split(","))


def read_measured(path: Path) -> dict[str, Any]:
    """Points, trained numbers, backward share and link that `benchmarks/scaling.py` measured.

    Raises:
        InputError: no such file, or of another program.
    """
    try:
        found = json.loads(path.read_text())["model"]
        found["link"] = Link(**found["link"])
        found["points"] = tuple((int(rows), float(seconds)) for rows, seconds in found["points"])
        return {name: found[name] for name in NEEDED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--measured {path}: no figures for the formula there ({error!r}); make them with "
            "benchmarks/scaling.py --json"
        ) from error


def check_flags(options: argparse.Namespace) -> None:
    """Refuse what does not go together, such as what `--measured` would override.

    Fills in what stands for flags of `MEASURED` that are not given.

    Raises:
        InputError: names the flag.
    """
    if bool(options.measured) == bool(options.step_seconds):
        raise InputError(
            "give either --measured FILE, or --step_seconds with --trained: one device's times"
        )
    for name, default in MEASURED.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.measured:
            raise InputError(f"--{name}: --measured {options.measured} has its own; leave it out")
    if not (options.measured or options.trained):
        raise InputError("--trained is missing: how many numbers of the student have a gradient")
    check_numbers(options)


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers that the formula cannot take.

    Raises:
        InputError: names the flag.
    """
    for name in POSITIVE:
        if not 0 < getattr(options, name) < math.inf:
            raise InputError(f"--{name} {getattr(options, name)} must be positive and finite")
    for name in ("inside_microseconds", "between_microseconds", "backward_share", "trained"):
        if not 0 <= (getattr(options, name) or 0) < math.inf:
            raise InputError(f"--{name} {getattr(options, name)} must not be negative")


def gather_inputs(options: argparse.Namespace) -> tuple[Work, Cluster]:
    """What the formula is fed, from the flags and from the file that `--measured` names.

    Raises:
        InputError: flags that do not go together, or a file of another program.
    """
    check_flags(options)
    names = {part.name for part in fields(Work)} - {"points"}
    given: dict[str, Any] = {name: getattr(options, name) for name in names}
    inside = Link(1e9 * options.inside_gigabytes, 1e-6 * options.inside_microseconds)
    between = Link(1e9 * options.between_gigabytes, 1e-6 * options.between_microseconds)
    if options.measured:
        found = read_measured(options.measured)
        given |= {name: found[name] for name in ("trained", "backward_share")}
        return Work(found["points"], **given), Cluster(found["link"], between, int(found["ranks"]))
    return Work(parse_points(options.step_seconds), **given), Cluster(inside, between, options.node)


def last_sensible(rows: Sequence[Row], floor: float) -> int | None:
    """The largest number of devices up to which efficiency never falls below `floor`."""
    last = None
    for row in rows:
        if row.efficiency < floor:
            break
        last = row.devices
    return last


def table(plans: dict[str, list[Row]], work: Work, floor: float) -> str:
    """The forecast as Markdown."""
    lines: list[str] = []
    titles = {
        "fixed": f"Global batch {work.global_batch:,} rows, whatever the number of devices:",
        "growing": "The global batch grows, each device keeping its largest micro-batch:",
    }
    for name, rows in plans.items():
        lines += ["", titles[name], ""] if lines else [titles[name], ""]
        lines.append(
            "| devices | global batch | rows a device | micro-batches | exchange, ms "
            "| waited for, ms | step, ms | efficiency | tokens/s | hours |"
        )
        lines.append("|---:" * 10 + "|")
        lines += [_line(row) for row in rows]
        last = last_sensible(rows, floor)
        upto = f"up to {last:,} devices" if last else "not even on the fewest devices"
        lines += ["", f"At {floor:.0%} efficiency or more: {upto}."]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    return (
        f"| {row.devices:,} | {row.devices * row.rows_per_device:,} | {row.rows_per_device:,} "
        f"| {row.accumulation} | {1e3 * row.traffic_seconds:,.2f} "
        f"| {1e3 * row.exposed_seconds:,.2f} | {1e3 * row.step_seconds:,.1f} "
        f"| {row.efficiency:.0%} | {row.tokens_per_second:,.0f} | {row.hours:,.1f} |"
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags; those of a run of the ACL 2023 paper are the defaults."""
    add = parser.add_argument
    add("--measured", type=Path, help="figures of benchmarks/scaling.py, with its link as 'inside'")
    add("--step_seconds", help="ROWS:SECONDS,...: whole steps of one device by micro-batch")
    add("--trained", type=lambda text: int(float(text)), help="numbers with a gradient")
    add("--gradient_bytes", type=int, default=4, help="of one, as it travels (ds_config)")
    add("--parameter_bytes", type=int, default=2, help="of one parameter, as ZeRO gathers it")
    add("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="of ZeRO")
    add("--bucket", type=lambda text: int(float(text)), default=500_000_000, help="numbers in one")
    add("--overlap", action="store_true", help="exchange during the backward pass (overlap_comm)")
    add("--backward_share", type=float, help="of the student's backward in a step (default: 0.4)")
    add("--global_batch", type=int, default=1024, help="rows of a step")
    add("--length", type=int, default=128, help="tokens of a row")
    add("--tokens", type=float, default=13.1e9, help="of the whole run")
    add("--devices", default=DEVICES)
    add("--node", type=int, help="devices of a node (default: 8)")
    add("--inside_gigabytes", type=float, help="a second, within a node (default: 450)")
    add("--inside_microseconds", type=float, help="latency of a message there (default: 3)")
    add("--between_gigabytes", type=float, default=50, help="a second, between nodes, per device")
    add("--between_microseconds", type=float, default=10, help="latency of a message there")
    add("--floor", type=float, default=0.5, help="efficiency that still makes sense")
    add("--json", type=Path, help="write the forecast to this file, its table beside it as .md")


@program
def main() -> None:
    """The program; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    options = parser.parse_args()
    work, cluster = gather_inputs(options)
    plans = forecasts(parse_devices(options.devices), work, cluster)
    text = table(plans, work, options.floor)
    print(text, end="")
    if options.json:
        rows = {name: [asdict(row) for row in plan] for name, plan in plans.items()}
        inputs = {"work": asdict(work), "cluster": asdict(cluster), "floor": options.floor}
        write_report(options.json, {**inputs, **rows}, text)


if __name__ == "__main__":
    main()
