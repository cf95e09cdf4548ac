"""What a device can do at most: FLOP/s from the vendor's datasheet, or measured by matrix products.

MFU, the share of it that a run reaches, is only as good as this number: on GPUs it is what the
datasheet says (a chip reaches about 80 % of that in large products), elsewhere what large
products reach on this very machine.
"""

import re
import statistics
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import distributed as dist

PROBE_SECONDS = 1.0
PROBE_SHARE = 0.01
"""A probe takes at most this share of what the whole run would take at the peak."""

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Rows of the square matrices that a probe multiplies, ascending."""

LEAST = 4
"""Blocks of products of a size that are timed at least; the first does not count."""

BLOCK = {"cpu": 1, "cuda": 20}
"""Products of a block: a GPU's clock stands still for starting and for waiting once a block."""


class Datasheet(NamedTuple):
    """Dense FLOP/s of a GPU, sparsity left out, accumulated in float32.

    Attributes:
        half: in float16, and in bfloat16 where `bfloat16` says so.
        tf32: float32 products on tensor cores, None where there are none. fp32: without them.
    """

    half: float
    tf32: float | None
    fp32: float
    bfloat16: bool = True


DATASHEETS: dict[str, Datasheet] = {  # a device's is the first whose words are in its name
    "GB200": Datasheet(2500e12, 1250e12, 80e12),
    "B200": Datasheet(2250e12, 1125e12, 75e12),
    "H200 NVL": Datasheet(835e12, 418e12, 60e12),
    "H200": Datasheet(989e12, 494e12, 67e12),
    "GH200": Datasheet(989e12, 494e12, 67e12),
    "H100 PCIe": Datasheet(756e12, 378e12, 51e12),
    "H100 NVL": Datasheet(835e12, 418e12, 60e12),
    "H100": Datasheet(989e12, 494e12, 67e12),
    "A100": Datasheet(312e12, 156e12, 19.5e12),
    "A40": Datasheet(149.7e12, 74.8e12, 37.4e12),
    "A30": Datasheet(165e12, 82e12, 10.3e12),
    "A10": Datasheet(125e12, 62.5e12, 31.2e12),
    "L40S": Datasheet(362e12, 183e12, 91.6e12),
    "L40": Datasheet(181e12, 90.5e12, 90.5e12),
    "L4": Datasheet(121e12, 60e12, 30.3e12),
    "RTX 5090": Datasheet(209.5e12, 104.8e12, 104.8e12),
    "RTX 4090": Datasheet(165.2e12, 82.6e12, 82.6e12),
    "RTX 3090": Datasheet(71e12, 35.6e12, 35.6e12),
    "V100-PCIE": Datasheet(112e12, None, 14e12, bfloat16=False),
    "V100": Datasheet(125e12, None, 15.7e12, bfloat16=False),
    "T4": Datasheet(65e12, None, 8.1e12, bfloat16=False),
}


OTHERS = re.compile(r"\b(MIG|Laptop|Ti|SUPER|D)\b")
"""Words of devices that are a part or a variant of those: they are measured."""


class Peak(NamedTuple):
    """FLOP/s of all devices together, and where the number comes from."""

    flops_per_second: float
    source: Literal["datasheet", "measured"]


def datasheet_peak(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """FLOP/s of the GPU of this name in a precision; None where no datasheet is known.

    Args:
        tf32: whether products of float32 matrices may use tensor cores.
    """
    if OTHERS.search(name):
        return None
    sheets = (s for part, s in DATASHEETS.items() if re.search(rf"\b{part}\b", name))
    sheet = next(sheets, None)
    if sheet is None or (dtype == torch.bfloat16 and not sheet.bfloat16):
        return None
    if dtype != torch.float32:
        return sheet.half
    return sheet.tf32 if tf32 and sheet.tf32 else sheet.fp32


def find_peak(device: torch.device, dtype: torch.dtype, flops: float | None) -> Peak | None:
    """The peak of all ranks' devices in the run's precision; all ranks call it.

    A measurement is made on all ranks at once, since they share caches and memory.

    Args:
        flops: of the whole run on all ranks, None if only time ends it; what is nothing or short
            gets no probe, or a short one.

    Returns:
        None for a run without training on a device of no known datasheet.
    """
    known = None
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = datasheet_peak(torch.cuda.get_device_name(device), dtype, tf32)
    if known is not None:
        return Peak(known * dist.get_world_size(), "datasheet")
    if flops == 0:
        return None
    dist.barrier()
    own = None if flops is None else flops / dist.get_world_size()
    total = torch.tensor(measure_peak(device, dtype, own), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return Peak(float(total), "measured")


def measure_peak(device: torch.device, dtype: torch.dtype, flops: float | None = None) -> float:
    """FLOP/s of square matrix products: the median of the fastest size that fits the time.

    Args:
        flops: of the run on this device; None gives the probe all of `PROBE_SECONDS`.
    """
    kind = "cpu" if device.type == "cpu" else "cuda"
    sizes, least = SIZES[kind], LEAST * BLOCK[kind]
    best = _speed(sizes[0], device, dtype, 0.0)
    budget = PROBE_SECONDS if flops is None else min(PROBE_SECONDS, PROBE_SHARE * flops / best)
    for size in sizes:
        limit = budget / len(sizes)
        if least * 2 * size**3 / best > limit:
            break
        best = max(best, _speed(size, device, dtype, limit))
    return best


def _speed(size: int, device: torch.device, dtype: torch.dtype, limit: float) -> float:
    """FLOP/s of products of square matrices of `size` rows; see `product_speed`."""
    return product_speed((size, size, size), device, dtype, limit)


def product_speed(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """FLOP/s of products (m, k) x (k, n), by the median time of all blocks but the first.

    Args:
        limit: seconds to go on for, once `LEAST` blocks are done.
    """
    m, k, n = shape
    left, right = (torch.randn(s, device=device, dtype=dtype) for s in ((m, k), (k, n)))
    block = BLOCK["cpu" if device.type == "cpu" else "cuda"]
    taken: list[float] = []
    while len(taken) < LEAST or sum(taken) < limit:
        start = clock()
        for _ in range(block):
            torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
    return 2 * m * k * n * block / statistics.median(taken[1:])
