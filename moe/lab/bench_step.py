"""A whole training step of a preset against its dense twin's, or another preset's.

The steps are those of train.py, on random tokens: forward, backward, clipping, optimizer, balance, average. What lies
between them there (reading text, logs, evaluation) is left out. Utilisation is of the operations that the active
parameters and attention take, over the device's peak: NVIDIA's figure where it is known, otherwise what one large
product reaches here.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from moe.config import RunConfig
from moe.lab.bench import BenchError, Row, alternate, check_rounds, medians, present, ratio
from moe.lab.studies import configure, dense_twin
from moe.machine.cost import count
from moe.machine.device import Runtime, resolve, reuse_memory, working_losses
from moe.machine.nearest import instead_of
from moe.machine.peak import peak_of
from moe.model import Losses, Transformer
from moe.optim import Average, Optimizers, accumulate, mtp_weight
from moe.presets import presets

PROGRESS = 0.2  # the part of the training that is over: past warm-up, before decay


@dataclass(frozen=True)
class StepBench:
    """A training step of a preset against its dense twin's, or another preset's."""

    preset: str = "tiny"
    against: str | None = None  # another; by default its dense twin
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    rounds: int = 15
    json: bool = False  # print one JSON object

    def main(self) -> None:
        configs = self.configs()
        device = resolve(configs[0])[0].device
        if device == "cpu":
            reuse_memory()
        present(measure(configs, self.rounds), cells, device, self.json)

    def configs(self) -> list[RunConfig]:
        check_rounds(self.rounds)
        known = presets()
        names = [name for name in (self.preset, self.against) if name is not None]
        if missing := [name for name in names if name not in known]:
            raise BenchError(f"preset {missing[0]} is not known: {instead_of(missing[0], known)}")
        found = [known[name] for name in names]
        if self.against is None:
            twin = configure(self.preset, dense_twin(found[0].sized_model))
            found.append(replace(twin, preset="dense twin"))
        first, second = found
        if first == second:
            raise BenchError(f"--preset and --against are both {self.preset}: name two presets")
        sizes = [config.train.tokens_per_step for config in found]
        if sizes[0] != sizes[1]:
            raise BenchError(
                f"steps of {first.preset} have {sizes[0]:,} tokens and of {second.preset} {sizes[1]:,}, so their times "
                "do not compare: leave --against out for the dense twin"
            )
        return [self.configured(config) for config in found]

    def configured(self, preset: RunConfig) -> RunConfig:
        return replace(preset, model=preset.sized_model, device=self.device, dtype=self.dtype, compile=self.compile)


@dataclass(frozen=True)
class Trainer:
    """What a step needs."""

    config: RunConfig
    runtime: Runtime
    step: Callable[[], Losses]
    memory: int  # the most bytes of a GPU that it took

    @property
    def flops(self) -> int:
        """For a token."""
        train = self.config.train
        return count(self.config.model, train.sequence_length // train.parts(PROGRESS)).training_flops


def measure(configs: list[RunConfig], rounds: int) -> Iterator[Row]:
    first, second = (config.preset for config in configs)
    trainers = {config.preset: build(config) for config in configs}
    runtime = trainers[first].runtime
    times = alternate({name: trainer.step for name, trainer in trainers.items()}, rounds, 120.0, runtime.device)
    took, peak = medians(times), peak_of(runtime.device, runtime.torch_dtype).flops
    speeds = {name: trainer.config.train.tokens_per_step / took[name] for name, trainer in trainers.items()}
    figures: dict[str, Any] = {
        "tokens_per_second": speeds,
        "flop_utilisation": {name: speeds[name] * trainer.flops / peak for name, trainer in trainers.items()},
        "peak_flops": peak,
    }
    if runtime.device == "cuda":
        figures["peak_bytes"] = {name: trainer.memory for name, trainer in trainers.items()}
    shape = {
        "preset": first,
        "against": second,
        "tokens_per_step": trainers[first].config.train.tokens_per_step,
        "dtype": runtime.dtype,
        "compiled": runtime.compile,
    }
    yield Row(shape, took, ratio(times, first, second), figures)


def build(config: RunConfig) -> Trainer:
    """A preset's step as train.py makes it, run once."""
    runtime = resolve(config)[0]
    before = 0
    if runtime.device == "cuda":
        before = torch.cuda.memory_allocated()
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(runtime.device)
    optimizers = Optimizers(model, config.optim, runtime.torch_dtype)
    average = Average(model, config.optim.ema_decay)
    losses_of, runtime = working_losses(model, config, runtime, True, lambda message: None)
    if runtime.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    shape = (runtime.micro_batch_size, config.train.sequence_length + 1)
    window, weight = (
        (-1, config.train.sequence_length // config.train.parts(PROGRESS)),
        mtp_weight(PROGRESS, config.optim),
    )
    random = [
        torch.randint(config.model.vocab_size, shape, device=runtime.device)
        for _ in range(config.train.sequences_per_step // runtime.micro_batch_size)
    ]
    batches = [(tokens[:, :-1].reshape(window), tokens[:, 1:].reshape(window)) for tokens in random]
    model.train()

    def step() -> Losses:
        losses = accumulate(losses_of, batches, runtime.autocast, model, weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or math.inf).item()
        losses.loss.item()
        optimizers.step(PROGRESS)
        optimizers.zero_grad()
        if losses.routing is not None:
            model.update_expert_bias(losses.routing.load)
        average.update(1000)
        return losses

    step()
    memory = torch.cuda.max_memory_allocated() - before if runtime.device == "cuda" else 0
    return Trainer(config, runtime, step, memory)


def cells(row: Row) -> dict[str, str]:
    def each(values: dict[str, float], form: str, scale: float = 1.0) -> str:
        return " / ".join(format(value * scale, form) for value in values.values())

    columns = {"preset": " / ".join(row.medians), "dtype": row.shape["dtype"] + ", compiled" * row.shape["compiled"]}
    columns["step, ms"] = each(row.medians, ",.0f", 1e3)
    columns["tokens a second"] = each(row.further["tokens_per_second"], ",.0f")
    columns["FLOP utilisation"] = each(row.further["flop_utilisation"], ".1%")
    if "peak_bytes" in row.further:
        columns["memory, GB"] = each(row.further["peak_bytes"], ".1f", 1e-9)
    return columns | {"ratio": f"{row.ratio:.2f}"}
