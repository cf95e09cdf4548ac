"""Peaks: datasheets by the device's name and precision, products elsewhere; totals of a run."""

import time

import pytest
import torch

from pretrain import peak
from pretrain.checkpoint import Progress
from pretrain.meter import Reading, Slot
from pretrain.peak import PROBE_SECONDS, datasheet_peak, find_peak, measure_peak
from pretrain.totals import PAPERS, Totals, totals

CPU = torch.device("cpu")
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_a_gpu_is_known_by_its_own_name(name: str, half: float) -> None:
    assert datasheet_peak(name, HALF, tf32=False) == half
    assert datasheet_peak(name, torch.float16, tf32=False) == half


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA A10G", "NVIDIA H20", "NVIDIA GeForce GTX 1080", "AMD"),
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_other_gpus_are_not_taken_for_known_ones(name: str) -> None:
    """A10G holds the name A10, H200 the name H20."""
    assert datasheet_peak(name, HALF, tf32=False) is None


def test_float32_goes_by_whether_tensor_cores_may_help() -> None:
    a100 = "NVIDIA A100-SXM4-80GB"
    assert datasheet_peak(a100, FULL, tf32=False) == 19.5e12
    assert datasheet_peak(a100, FULL, tf32=True) == 156e12
    assert datasheet_peak("Tesla V100-SXM2-16GB", FULL, tf32=True) == 15.7e12


def test_a_gpu_without_bfloat16_has_no_datasheet_for_it() -> None:
    assert datasheet_peak("Tesla V100-SXM2-16GB", HALF, tf32=False) is None
    assert datasheet_peak("Tesla V100-PCIE-16GB", torch.float16, tf32=False) == 112e12


def test_datasheets_are_in_order() -> None:
    for sheet in peak.DATASHEETS.values():
        tensor_cores = sheet.fp32 if sheet.tf32 is None else sheet.tf32
        assert sheet.half > tensor_cores >= sheet.fp32


def test_a_probe_finds_what_a_plain_product_reaches() -> None:
    size = 768
    left, right = torch.randn(size, size), torch.randn(size, size)
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - start)
    measured = measure_peak(CPU, FULL, 1e13)
    assert 0.3 < measured / (2 * size**3 / min(taken)) < 3  # others work on this machine


def test_a_short_run_gets_a_short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size, four products, no more."""
    asked: list[tuple[int, float]] = []

    def speed(size: int, device: torch.device, dtype: torch.dtype, limit: float) -> float:
        asked.append((size, limit))
        return 1e11

    monkeypatch.setattr(peak, "_speed", speed)
    measure_peak(CPU, FULL, 1e9)
    assert asked == [(512, 0.0)]
    asked.clear()
    measure_peak(CPU, FULL, None)
    assert [size for size, _ in asked] == [512, 512, 1024], "2048 would take over a third"
    assert all(limit <= PROBE_SECONDS / 3 for _, limit in asked)


def test_no_training_needs_no_probe(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "measure_peak", lambda *_: pytest.fail("measured"))
    assert find_peak(CPU, FULL, 0.0) is None


def test_ranks_add_up(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "measure_peak", lambda *_: 1e11)
    assert find_peak(CPU, FULL, 1e12) == (1e11, "measured")


# --- what a run took


def measured(**changes: float) -> Totals:
    given = {"step": 10, "tokens": 63_000 * 100, "flops": 2e15, "seconds": 100.0} | changes
    now = Progress(**given)  # type: ignore[arg-type]
    return totals(now, 1e14, Reading({Slot("student", ""): 3.0, Slot("data", ""): 1.0}, 2**31), "")


def test_totals_are_per_second_and_per_device_hour(one_rank: None) -> None:
    result = measured()
    assert result.tokens_per_second == 63_000
    assert result.device_hours == pytest.approx(100 / 3600)
    assert result.mfu == pytest.approx(0.2)
    assert result.shares is not None and result.shares["data"] == 0.25


def test_at_the_papers_rate_a_run_takes_the_papers_hours(one_rank: None) -> None:
    """HTD: 13.1 B tokens in 58 hours are 63 k tokens/s; ETD: 1.55e19 FLOP at 2e13/s."""
    hours = measured().paper_hours()
    assert hours["HTD"] == pytest.approx(58, rel=0.01)
    assert hours["ETD"] == pytest.approx(1.55e19 / 2e13 / 3600)


def test_lines_name_what_was_measured_and_the_papers_beside(one_rank: None) -> None:
    text = "\n".join([*measured().lines(), *measured().paper_lines()])
    for fact in ("63,000 tokens/s", "20.00 TFLOP/s (20.0% of the peak)", "2.00 GiB", "data 25.0%"):
        assert fact in text
    for run in PAPERS:
        assert run.paper in text
    assert "13.1 B tokens in 58 A100-hours; at this run's rate 57.79 device-hours" in text


def test_an_unknown_peak_gives_no_share_of_it(one_rank: None) -> None:
    now = Progress(step=1, tokens=10, flops=1e9, seconds=2.0)
    result = totals(now, None, Reading({}, 2**20), "")
    assert result.mfu is None and result.shares is None
    assert not any("peak)" in line or line.startswith("time") for line in result.lines())
