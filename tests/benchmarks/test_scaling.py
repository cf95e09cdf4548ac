"""`benchmarks/scaling.py`, `forecast.py` and the formula of `scale_model.py`.

The formula is held against simulations that know nothing of it: messages that travel one by one
around a ring, and buckets that fill during a backward pass.
"""

import json
import math
import os
import pydoc_data.topics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import forecast
import numpy as np
import pyarrow
import pytest
import scaling
from common import launch
from numpy.typing import NDArray
from pyarrow import parquet
from scale_model import (
    Cluster,
    Link,
    Work,
    exposed_seconds,
    fit_line,
    forecasts,
    half_seconds,
    traffic_seconds,
)
from scaling_report import Case, ds_config, exchange_rows, model_inputs, speed_rows

from data_prep.shard import parse
from data_prep.shard import shard as run_sharder
from data_prep.tokenization import train_tokenizer
from potstill.errors import InputError

INSIDE, BETWEEN = Link(4e9, 3e-6), Link(5e8, 2e-5)
CLUSTER = Cluster(INSIDE, BETWEEN, node=4)
WORK = Work(((8, 0.3), (32, 0.9)), trained=10_000_000, bucket=10_000_000, global_batch=64)


def simulate_ring(
    vectors: Sequence[NDArray[np.float64]], link: Link, bytes_per_number: int, halves: int = 2
) -> float:
    """Seconds until every device has the sum, message by message; the vectors are changed.

    Reduce-scatter (a device adds what comes to its own chunk), then all-gather (it takes it over).
    """
    devices = len(vectors)
    chunks = [np.array_split(vector, devices) for vector in vectors]  # views
    clock = [0.0] * devices
    for turn in range(halves * (devices - 1)):
        gathering = turn >= devices - 1
        sent = []
        for device in range(devices):
            index = (device - turn + gathering * devices) % devices
            sent.append((index, chunks[device][index].copy()))
        arrivals = []
        for device, (_, chunk) in enumerate(sent):
            size = chunk.size * bytes_per_number
            arrivals.append(clock[device] + link.latency_seconds + size / link.bytes_per_second)
        for device in range(devices):
            before = (device - 1) % devices
            index, chunk = sent[before]
            chunks[device][index][:] = chunk if gathering else chunks[device][index] + chunk
            clock[device] = max(clock[device], arrivals[before])
    return max(clock)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_an_all_reduce_takes_what_a_simulated_ring_takes(devices: int) -> None:
    numbers = np.random.default_rng(devices).normal(size=(devices, 12 * 1000))
    vectors = [row.copy() for row in numbers]
    seconds = simulate_ring(vectors, INSIDE, 4)
    for vector in vectors:
        np.testing.assert_allclose(vector, numbers.sum(0), rtol=1e-12)
    assert 2 * half_seconds(devices, 4 * 12_000, CLUSTER) == pytest.approx(seconds, rel=1e-9)


def test_over_nodes_it_takes_what_rings_inside_and_between_them_take() -> None:
    nodes, numbers = 3, np.random.default_rng(0).normal(size=(3 * 4, 4 * 3 * 100))
    devices = [row.copy() for row in numbers]
    inside = [simulate_ring(devices[4 * n : 4 * n + 4], INSIDE, 4, halves=1) for n in range(nodes)]
    # after the reduce-scatter, device r of a node holds the node's sum of chunk r + 1
    across = []
    for rank in range(4):
        parts = [np.array_split(devices[4 * n + rank], 4)[(rank + 1) % 4] for n in range(nodes)]
        across.append(simulate_ring(parts, BETWEEN, 4))
        np.testing.assert_allclose(parts[0], np.array_split(numbers.sum(0), 4)[(rank + 1) % 4])
    seconds = 2 * max(inside) + max(across)  # the all-gather inside is as long as the other half
    assert 2 * half_seconds(12, 4 * numbers.shape[1], CLUSTER) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("exchange", [0.01, 0.4, 0.5, 2.0])
@pytest.mark.parametrize("buckets", [1, 4, 7])
def test_overlap_leaves_what_simulated_buckets_leave(exchange: float, buckets: int) -> None:
    window, free = 0.5, 0.0
    for number in range(1, buckets + 1):
        free = max(free, window * number / buckets) + exchange / buckets
    assert exposed_seconds(exchange, window, buckets, True) == pytest.approx(free - window)
    assert exposed_seconds(exchange, window, buckets, False) == exchange


def test_traffic_of_the_zero_stages_by_hand() -> None:
    free = Cluster(Link(1e9, 0.0), Link(1e9, 0.0), node=4)
    gradients, parameters = 40e6 / 1e9 * 3 / 4, 20e6 / 1e9 * 3 / 4  # half an all-reduce each
    by_hand = {
        0: 2 * gradients,
        1: 2 * gradients + parameters,
        2: 5 * 2 * gradients + parameters,
        3: 5 * (gradients + 2 * parameters),
    }
    for stage, seconds in by_hand.items():
        traffic, exposed = traffic_seconds(4, 5, 0.1, replace(WORK, stage=stage), free)
        assert traffic == pytest.approx(seconds)
        assert exposed == pytest.approx(seconds)


def test_a_line_of_measured_steps_is_found_again() -> None:
    assert fit_line([(rows, 0.25 + 0.5 * rows) for rows in (1, 4, 16, 64)]) == pytest.approx(
        (0.25, 0.5)
    )
    fixed, per_row = fit_line([(1, 0.9), (2, 2.0)])  # a line through them would start below zero
    assert fixed == 0 and 0.9 < per_row < 1.0


def test_without_cost_of_traffic_only_small_micro_batches_lose() -> None:
    free = Cluster(Link(math.inf, 0.0), Link(math.inf, 0.0), node=4)
    plans = forecasts((1, 2, 8, 64, 128), WORK, free)
    assert [row.devices for row in plans["fixed"]] == [1, 2, 8, 64]  # 128 have no row each
    assert [row.efficiency for row in plans["growing"]] == pytest.approx([1] * 5)
    # by hand: 0.1 + 0.025 rows; 32 rows in 0.9 s at best, 1 row in 0.125 s on 64 devices
    assert [row.accumulation for row in plans["fixed"]] == [2, 1, 1, 1]
    assert plans["fixed"][-1].efficiency == pytest.approx((1 / 0.125) / (32 / 0.9))
    assert plans["fixed"][0].hours == pytest.approx(WORK.tokens * 1.8 / (64 * 128) / 3600)


def test_more_devices_are_never_more_efficient_and_slow_links_never_help() -> None:
    plans = forecasts((1, 2, 4, 8, 16, 32, 64), WORK, CLUSTER)
    for rows in plans.values():
        efficiency = [row.efficiency for row in rows]
        assert efficiency == sorted(efficiency, reverse=True)
    slow = forecasts((64,), WORK, replace(CLUSTER, between=Link(1e8, 1e-3)))
    assert slow["growing"][0].step_seconds > plans["growing"][-1].step_seconds


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: fit_line([(8, 1.0)]), "--step_seconds"),
        (lambda: half_seconds(6, 1.0, CLUSTER), "--devices 6"),
        (lambda: forecast.parse_points("8=1"), "--step_seconds '8=1'"),
        (lambda: forecast.parse_devices("8,no"), "--devices '8,no'"),
        (lambda: forecast.read_measured(Path("nowhere.json")), "--measured nowhere.json"),
        (lambda: forecasts((3, 7), WORK, CLUSTER), "--devices 3,7: --global_batch 64 is a mult"),
    ],
)
def test_bad_input_is_named(act: Callable[[], object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        act()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give either --measured"),
        ("--step_seconds 8:0.3,32:0.9", "--trained is missing"),
        ("--step_seconds 8:0.3,32:0.9 --trained 1e7 --bucket 0", "--bucket 0 must be positive"),
        ("--step_seconds 8:0.3,32:0.9 --trained 1e7 --node 0", "--node 0 must be positive"),
        ("--step_seconds 8:0.3,32:0.9 --trained 1e7 --devices 3,7", "--devices 3,7"),
        ("--measured FILE --node 4", "--node: --measured FILE has its own; leave it out"),
        ("--measured FILE --inside_gigabytes 9", "--inside_gigabytes: --measured FILE has its own"),
        ("--measured FILE --trained 9", "--trained: --measured FILE has its own"),
        ("--measured FILE", "--measured FILE: no figures for the formula there (KeyError('link'))"),
    ],
)
def test_bad_flags_of_the_forecast_are_one_line(
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(tmp_path / "model.json")
    Path(path).write_text(json.dumps({"model": {"points": [[1, 1.0], [2, 2.0]], "trained": 9}}))
    monkeypatch.setattr(sys, "argv", ["forecast.py", *flags.replace("FILE", path).split()])
    with pytest.raises(SystemExit) as stopped:
        forecast.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message.replace("FILE", path) in error and error.count("\n") == 1


def test_the_forecast_program_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = f"--step_seconds 8:0.3,32:0.9 --trained 1e7 --json {tmp_path}/forecast.json"
    monkeypatch.setattr(sys, "argv", ["forecast.py", *flags.split()])
    forecast.main()
    written = json.loads((tmp_path / "forecast.json").read_text())
    assert [row["devices"] for row in written["fixed"]][-1] == 1024
    assert (tmp_path / "forecast.md").read_text() == capsys.readouterr().out
    assert written["cluster"]["inside"]["bytes_per_second"] == 450e9


def test_ratios_are_those_of_a_turn() -> None:
    bare, one, two = Case("a", 1, None), Case("a", 1, 1), Case("a", 2, 1)
    # the second turn is twice as slow for all: no ratio may feel it
    seconds = {
        bare.name: [[1.0, 1.0, 1.2], [2.0, 2.0, 2.0]],
        one.name: [[1.25, 1.25, 1.25], [2.5, 2.4, 2.6]],
        two.name: [[0.625, 0.7, 0.625], [1.25, 1.25, 1.25]],
    }
    (row,) = speed_rows([bare, one, two], seconds, 1000)
    assert row["trainer_over_bare"] == {"ratio": 0.8, "low": 0.8, "high": 0.8}
    assert row["two_ranks_over_one"] == {"ratio": 2.0, "low": 2.0, "high": 2.0}


def test_what_is_left_of_a_step_on_two_ranks_is_told_beside_the_formula() -> None:
    bare, one, two = Case("a", 1, None), Case("a", 1, 1), Case("a", 2, 1)
    small = [Case("a", ranks, 1, micro=64) for ranks in (1, 2)]
    single = [Case("a", 1, 1, micro=micro, single=True) for micro in (16, 64)]
    cases = [bare, one, two, *small, *single]
    seconds = {case.name: [[2.0 / case.ranks]] for case in cases} | {two.name: [[1.3]]}
    seconds |= {case.name: [[0.1 + case.micro / 100]] for case in single}
    facts = {bare.name: {"trained": 1_000_000, "backward_share": 0.5}}
    link = [(size, 2e-4 + size / 1e9) for size in (4096, 65536, 1_048_576)]
    model = model_inputs(cases, seconds, facts, link)
    # not the step of 128 rows over its number of micro-batches: that has one update for all
    assert model["points"] == [(16, 0.26), (64, 0.74)]
    assert len(speed_rows(cases, seconds, 1000)) == 1
    assert model["link"]["bytes_per_second"] == pytest.approx(1e9)
    assert model["link"]["latency_seconds"] == pytest.approx(1e-4)
    rows = exchange_rows(cases, seconds, model, rows=128)
    assert [row["left"] for row in rows] == pytest.approx([0.3, 0.0])
    # 4 MB of gradients there and back, 2 MB of parameters gathered: 4 + 1 ms, and 3 messages
    assert rows[0]["formula"] == pytest.approx(5e-3 + 3e-4)


def test_batch_sizes_and_buckets_are_those_of_the_shipped_configs() -> None:
    single = Case("a", 1, 1, micro=4, single=True)
    config = ds_config(single, 128)
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config[name] for name in sizes] == [4, 1] and single.rows(128) == 4
    config = ds_config(Case("a", 2, 2), 128)
    assert [config[name] for name in sizes] == [16, 4]
    link = {"bytes_per_second": 1e15, "latency_seconds": 1.0}
    model = {"pair": "a", "trained": 100_000_000, "link": link}
    cases = [Case("a", ranks, stage) for stage in (0, 2) for ranks in (1, 2)]
    small = Case("a", 2, 2, zero=(("reduce_bucket_size", 10_000_000),))
    cases.append(small)
    rows = exchange_rows(cases, {case.name: [[1.0]] for case in cases}, model, rows=128)
    # latencies by hand: 2 messages of an all-reduce for each bucket, 1 to gather the parameters
    # stage 0: DeepSpeed's 500 M; stage 2: 50 M, in each of 4 micro-batches; 10 M
    assert [round(row["formula"]) for row in rows] == [2, 4 * 2 * 2 + 2, 4 * 10 * 2 + 10]


def start_of_ranks(ranks: int, program: str) -> list[str]:
    """The launcher for two ranks; for one PyTorch's, which does not import DeepSpeed twice."""
    return ["torchrun", "--nproc_per_node", "1", program] if ranks == 1 else launch(ranks, program)


def shard_here(corpus: Path, tokenizer: Path, output: Path) -> Path:
    """What `common.shard` does, without a process."""
    words = ["--input", str(corpus), "--output", str(output), "--tokenizer", str(tokenizer)]
    run_sharder(parse([*words, "--workers", "1"]))
    return output


@pytest.mark.slow
@pytest.mark.distributed
def test_the_real_trainer_is_measured_on_one_and_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two ranks are bound to a core each; this process has one")
    texts = [" ".join(text.split()) for text in pydoc_data.topics.topics.values()]
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "corpus.parquet")
    train_tokenizer(lambda: iter(texts), 2000, tmp_path / "tokenizer")
    out = tmp_path / "scaling.json"
    flags = f"--quick --corpus {tmp_path} --tokenizer {tmp_path}/tokenizer --rows 64 --json {out}"
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setattr(scaling, "launch", start_of_ranks)
    monkeypatch.setattr(scaling, "shard", shard_here)
    monkeypatch.setattr(sys, "argv", ["scaling.py", *flags.split()])
    scaling.main()
    figures = json.loads(out.read_text())
    (row,) = figures["speed"]
    assert row["stage"] == 1 and row["trainer_over_bare"]["ratio"] > 0
    assert [row["accumulation"] for row in figures["exchange"]] == [2]
    assert [rows for rows, _ in figures["model"]["points"]] == [4, 32]
    assert figures["model"]["trained"] > 0 and 0 < figures["model"]["backward_share"] <= 1
    for part in ("speed", "exchange"):
        assert out.with_name(f"scaling-{part}.md").read_text().startswith("| ")
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["forecast.py", "--measured", str(out)])
    forecast.main()
    assert "1,024" in capsys.readouterr().out
