"""What a device could compute at most, to see how much of it a training uses: shown, and never a reason for anything.

Model FLOP utilisation (MFU; PaLM, arXiv 2204.02311, appendix B): the operations that the model's tokens take, whatever
was computed for them, over what the device could have done in that time.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch

CARDS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense, by a part of the card's name
SIDES, TIMES = (512, 1024, 2048, 4096, 8192), 4  # of the matrices; the first product of a size is slow
LONGEST = 0.2  # seconds for all of them


@dataclass(frozen=True)
class Peak:
    """Operations a second, and whose word that is."""

    flops: float
    why: str


def peak_of(device: str, dtype: torch.dtype) -> Peak:
    """NVIDIA's figure of a known card in bfloat16, otherwise what one product of two large matrices reaches here."""
    if device == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name()
        known = [flops for part, flops in CARDS.items() if part in name]
        if known:
            return Peak(known[0], f"NVIDIA's figure for the {name}")
    return Peak(measured(device, dtype, torch.get_num_threads()), "what a product of two large matrices reaches here")


@cache  # a process measures it once
def measured(device: str, dtype: torch.dtype, threads: int) -> float:
    """Of the fastest of some products, in a fraction of a second: which size is fastest differs from machine to
    machine. No random numbers are drawn."""
    best, began = 0.0, time.perf_counter()
    for side in SIDES:
        matrix = torch.linspace(-1, 1, side * side, device=device).to(dtype).view(side, side)
        for _ in range(TIMES):
            best = max(best, 2 * side**3 / product(matrix))
            if time.perf_counter() - began > LONGEST:
                return best
    return best


def product(matrix: torch.Tensor) -> float:
    """Seconds that its square takes."""
    settle(matrix.device.type)
    began = time.perf_counter()
    matrix @ matrix
    settle(matrix.device.type)
    return max(time.perf_counter() - began, 1e-9)


def settle(device: str) -> None:
    """Wait for what a GPU still has to do."""
    if device != "cpu":
        torch.accelerator.synchronize()
