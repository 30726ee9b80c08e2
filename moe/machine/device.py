"""Where and how a run computes: decided once, by what the machine can do and never by timing, with a reason for each
choice.

A training run prints the reasons, stores the decisions in `config.json` and keeps them when it is resumed.
"""

import ctypes
import logging
import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch

from moe.config import MoeError, RunConfig, require
from moe.experts import choose_backend
from moe.layers import forked_random
from moe.machine.cost import activation_bytes, count, machine_bytes
from moe.model import Losses, Transformer
from moe.optim import weighs_by_whole_batch

LossFunction = Callable[..., Losses]
Dtype = Literal["float32", "bfloat16"]
DEVICES = ("cpu", "cuda", "mps")
BACKENDS = ("auto", "loop", "grouped", "gather", "none")
CPU_SHARE = 0.25  # of the memory, for activations: a laptop has other things to do
GPU_SHARE = 0.92
UNKNOWN_MEMORY = 8 << 30  # where the system does not say
CPU_FLOPS = 4e10  # a second that a thread gets out of small matrices
COMPILE_MINUTES = 30


class DeviceError(MoeError):
    """A device or number format this machine does not have."""


@dataclass(frozen=True)
class Runtime:
    device: str
    dtype: str
    compile: bool
    expert_backend: str
    micro_batch_size: int
    threads: int

    def __post_init__(self) -> None:
        known = {"device": DEVICES, "dtype": get_args(Dtype), "expert_backend": BACKENDS}
        for name, values in known.items():
            value = getattr(self, name)
            require(value in values, f"runtime.{name} = {value!r} must be one of {', '.join(values)}")
        require(self.micro_batch_size > 0, f"runtime.micro_batch_size = {self.micro_batch_size} must be at least 1")
        require(
            0 < self.threads < 2**16, f"runtime.threads = {self.threads} must be at least 1, and no more than there are"
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def autocast(self) -> AbstractContextManager[Any]:
        """float32 parameters, matrix products in bfloat16; nothing at all in float32."""
        return torch.autocast(self.device, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()

    def describe(self, why: Mapping[str, str]) -> dict[str, str]:
        """A line for each decision. why: the reasons, by the decisions' names."""
        shown = {"compile": "on" if self.compile else "off", "micro_batch_size": f"{self.micro_batch_size} sequences"}
        labels = {"expert_backend": "experts", "micro_batch_size": "batch"}
        return {
            labels.get(name, name): f"{shown.get(name, value)}: {why[name]}" for name, value in asdict(self).items()
        }


def resolve(config: RunConfig) -> tuple[Runtime, dict[str, str]]:
    """The decisions, and why. Raises DeviceError for what was asked for and cannot be had."""
    device, why_device = resolve_device(config.device)
    dtype, why_dtype = resolve_dtype(config.dtype, device)
    check_memory(config, device)
    micro, why_micro = resolve_micro_batch(config, device, dtype)
    tokens = micro * config.train.sequence_length
    backend, why_backend = choose_backend(config.model, device, getattr(torch, dtype), tokens)
    if config.model.num_moe_layers == 0:
        backend, why_backend = "none", "no mixture-of-experts layer"
    compiled, why_compile = resolve_compile(config, device, backend)
    runtime = Runtime(device, dtype, compiled, backend, micro, torch.get_num_threads())
    reasons = (why_device, why_dtype, why_compile, why_backend, why_micro, "torch's default")
    return runtime, dict(zip(asdict(runtime), reasons, strict=True))


def resolve_device(asked: str) -> tuple[str, str]:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        reasons = {"cuda": "an NVIDIA GPU is there", "mps": "an Apple GPU is there", "cpu": "no GPU was found"}
        return next((device, reasons[device]) for device in ("cuda", "mps", "cpu") if has[device])
    if not has.get(asked):
        raise DeviceError(f"--device {asked}: this machine, or this build of PyTorch, has none; use --device auto")
    return asked, "as asked"


def resolve_dtype(asked: str, device: str) -> tuple[str, str]:
    if asked != "auto":
        return asked, "as asked"
    if device == "cuda":  # is_bf16_supported() also says yes to emulation, on a T4 for one
        major, minor = torch.cuda.get_device_capability()
        return "bfloat16" if major >= 8 else "float32", f"compute capability {major}.{minor}; bfloat16 needs 8.0"
    if device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bfloat16", "the processor multiplies it natively"
    return (
        "float32",
        "the processor has no bfloat16 products" if device == "cpu" else f"bfloat16 is untested on {device}",
    )


def resolve_compile(config: RunConfig, device: str, backend: str) -> tuple[bool, str]:
    if config.compile != "auto":
        return config.compile == "on", "as asked"
    if backend == "loop":
        return False, "a loop over the chosen experts is no graph"
    if device == "cpu":
        return resolve_compile_cpu(config)
    if device != "cuda":
        return False, f"untested on {device}"
    try:
        import triton  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError:
        return False, "triton is not installed"
    if torch.cuda.get_device_capability() < (7, 0) or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        return False, "triton needs compute capability 7.0 and a C compiler"
    return True, "triton is there"


def resolve_compile_cpu(config: RunConfig) -> tuple[bool, str]:
    """A tenth of a step is gained, and a minute or two lost at the start (preset tiny, two cores)."""
    flops = count(config.sized_model, config.train.sequence_length).training_flops
    seconds = config.steps * config.train.tokens_per_step * flops / (CPU_FLOPS * torch.get_num_threads())
    minutes = config.minutes or seconds / 60
    if minutes < COMPILE_MINUTES:
        return False, f"its warm-up does not pay on a CPU in less than {COMPILE_MINUTES} minutes"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return False, "it needs a C++ compiler"
    return True, f"some {minutes:,.0f} minutes on a CPU are worth its warm-up"


def check_memory(config: RunConfig, device: str) -> None:
    """Raises DeviceError where not even the weights could be trained."""
    memory, size = machine_bytes(device), count(config.sized_model)
    if memory and size.training_bytes >= memory:
        raise DeviceError(
            f"to train {size.total / 1e9:,.1f}B parameters takes {size.training_bytes / 1e9:,.0f} GB for weights, "
            f"gradients and momentum alone; {device} has {memory / 1e9:,.0f} GB: choose a smaller --preset or model"
        )


def check_room(needed: int, device: str, dtype: str, what: object) -> None:
    """Raises DeviceError where not even a model's weights fit, so many bytes of them."""
    memory = machine_bytes(device)
    if memory and needed >= memory:
        where = "the GPU" if device == "cuda" else "this machine"
        halving = dtype == "float32" and needed / 2 < memory
        advice = "pass dtype bfloat16 (--dtype bfloat16)" if halving else "take a smaller model, or more memory"
        raise DeviceError(
            f"{what} needs {needed / 1e9:,.1f} GB as {dtype}, {where} has {memory / 1e9:,.0f} GB: {advice}"
        )


def resolve_micro_batch(config: RunConfig, device: str, dtype: str) -> tuple[int, str]:
    """Sequences at a time, by estimate; working_losses tries on a GPU."""
    train, model = config.train, config.sized_model
    if train.micro_batch_size != "auto":
        return train.micro_batch_size, "as asked"
    size = count(model)
    left = (machine_bytes(device) or UNKNOWN_MEMORY) - size.training_bytes
    room = left if device == "cuda" else CPU_SHARE * (left - size.snapshot_bytes)

    def needed(micro: int) -> float:
        bfloat16 = activation_bytes(model, micro, train.sequence_length, train.activation_checkpointing)
        return bfloat16 if dtype == "bfloat16" else bfloat16 * 4 / 3

    micro = next((size for size in train.micro_batch_sizes() if needed(size) <= room), 1)
    return micro, f"an estimated {needed(micro) / 1e9:,.1f} GB of activations"


def working_losses(
    model: Transformer, config: RunConfig, runtime: Runtime, fresh: bool, warn: Callable[[str], None]
) -> tuple[LossFunction, Runtime]:
    """model.losses, compiled and with the expert back-end as decided, or with a notice as far as they work; and what
    it came to. Each way is tried on a batch of the real shape: a fast path may load and then fail when it runs.
    fresh: the run begins, so a GPU's micro-batch is still to be found."""
    model.activation_checkpointing = config.train.activation_checkpointing
    search = fresh and runtime.device == "cuda" and config.train.micro_batch_size == "auto"
    attempts = [runtime, replace(runtime, compile=False)] if runtime.compile else [runtime]
    if runtime.expert_backend not in ("none", "loop"):
        attempts.append(replace(runtime, compile=False, expert_backend="loop"))
    # The compiler warns of in-place operations where layers are computed again; there are none
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for attempt in attempts:
        losses_of: LossFunction = torch.compile(model.losses, dynamic=False) if attempt.compile else model.losses
        for layer in model.moe_layers():
            layer.backend = attempt.expert_backend
        if runtime.device == "cpu" and not attempt.compile:
            return losses_of, attempt
        try:
            attempt = fit_micro_batch(model, config, attempt) if search else attempt
            try_steps(model, losses_of, config, attempt)
            return losses_of, attempt
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a kernel throws
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
            way = "compiled" if attempt.compile else attempt.expert_backend
            warn(f"notice: {way} training failed here ({reason}): trying a slower way")
    raise DeviceError(f"no way of computing this model works on {runtime.device}: try --device cpu")


def try_steps(model: Transformer, losses_of: LossFunction, config: RunConfig, runtime: Runtime) -> None:
    """Forward and backward of micro-batches in each of the shapes that training has, the last one beside the gradients
    of those before; without a trace, in the random numbers either."""
    shape = (runtime.micro_batch_size, config.train.sequence_length)
    whole = torch.zeros(shape, dtype=torch.int64, device=runtime.device)
    shapes = {config.train.parts(progress) for progress in (0, 1)}
    weight, load = torch.ones((), device=runtime.device), None
    if weighs_by_whole_batch(config.model, config.train.sequences_per_step // runtime.micro_batch_size):
        load = torch.ones(
            len(model.moe_layers()), config.model.n_routed_experts, dtype=torch.int64, device=runtime.device
        )
    try:
        with forked_random(whole.device):
            for parts in (*shapes, 1):
                tokens = whole.view(-1, whole.shape[1] // parts)
                with runtime.autocast():
                    losses = losses_of(tokens, tokens.clone(), load, weight)
                losses.objective.backward()
    finally:
        model.zero_grad(set_to_none=True)


def fit_micro_batch(model: Transformer, config: RunConfig, runtime: Runtime) -> Runtime:
    """The largest micro-batch that fits the GPU beside momentum and AdamW's moments, found by trying, not compiled."""
    memory, train = machine_bytes("cuda") or UNKNOWN_MEMORY, config.train
    moments = 2 * sum(weight.numel() * weight.element_size() for weight in model.parameters())
    for micro in train.micro_batch_sizes():
        attempt = replace(runtime, micro_batch_size=micro)
        estimate = activation_bytes(config.model, micro, train.sequence_length, train.activation_checkpointing)
        if micro > 1 and estimate > 2 * memory:
            continue  # it is not that far off
        torch.cuda.reset_peak_memory_stats()
        try:
            try_steps(model, model.losses, config, attempt)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        if torch.cuda.max_memory_allocated() + moments < GPU_SHARE * memory:
            return attempt
    return attempt


def reuse_memory() -> bool:
    """Let the allocator keep freed memory, where it is glibc's: handing every large tensor back costs a sixth of a
    step on a CPU."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def hardware(runtime: Runtime) -> str:
    if runtime.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {runtime.threads} thread{'s' * (runtime.threads > 1)}"


def processor() -> str:
    """The CPU's name where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named or platform.processor() or platform.machine()
