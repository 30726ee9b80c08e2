"""Two small layers, normalisation and dropout, the number format they hand on, a model at rest, and chance that leaves
no trace.

    RMSNorm(x) = w * x / sqrt(mean(x^2) + eps)        arXiv 1910.07467, eq. 4
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def product_dtype(x: Tensor) -> torch.dtype:
    """What matrix products with x are computed in: autocast's dtype, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(nn.RMSNorm):
    """In float32 whatever comes in; out in the dtype of the products that follow, which autocast would otherwise copy
    it to for each of them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(product_dtype(x))


class Dropout(nn.Dropout):
    """On a CPU a third as expensive as torch's, which draws number by number: a byte of chance for each. The share
    dropped is a whole number of 256ths there."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        dropped = min(max(round(256 * self.p), 1), 255)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
        return x * kept.to(x.dtype).mul_(256 / (256 - dropped))


@contextmanager
def forked_random(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves no trace in the random numbers after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
