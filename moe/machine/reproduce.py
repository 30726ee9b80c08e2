"""What has to be the same again for a run to go on as if nothing had happened, beside its tensors."""

import base64
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from moe.machine.stored import CheckpointError


def random_state() -> dict[str, Any]:
    """Of every generator training may draw from, as JSON."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():  # a run on the CPU leaves GPUs alone
        states += torch.cuda.get_rng_state_all()
    encoded = [base64.b64encode(state.numpy().tobytes()).decode() for state in states]
    return {"torch": encoded[0], "cuda": encoded[1:]}


def set_random_state(stored: dict[str, Any]) -> None:
    try:
        encoded = [base64.b64decode(text) for text in (stored["torch"], *stored["cuda"])]
        states = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in encoded]
        torch.set_rng_state(states[0])
        for index, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"state.json: the random state is damaged: {error}") from None


def versions() -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken", "safetensors")}
    try:
        command, here = ["git", "rev-parse", "HEAD"], Path(__file__).resolve().parent
        asked = subprocess.run(command, cwd=here, capture_output=True, encoding="utf-8", timeout=10, check=False)
        revision = asked.stdout.strip() or "unknown"
    except (OSError, ValueError, subprocess.SubprocessError):
        revision = "unknown"
    return {"python": platform.python_version(), **found, "git": revision}
