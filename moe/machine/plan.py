"""What a training will take, said before it does: the model, memory part by part, the length, and the time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moe.checkpoint import State
from moe.config import RunConfig
from moe.corpus import Corpus
from moe.machine.cost import activation_bytes, count, machine_bytes, outline, readable
from moe.machine.device import Runtime
from moe.machine.peak import Peak
from moe.metrics import clock
from moe.optim import sort_parameters
from moe.presets import NOTES, presets

WARM = 1  # steps of a start whose time says nothing of the others
MEASURED = 2  # those after them, whose time does
# How much longer an operation of attention takes than one of a product of matrices: on two cores a step of preset tiny
# takes 1.3 times as long with windows of 256 as with 128, for 1.07 times the operations
ATTENTION = {"cpu": 6}


@dataclass(frozen=True)
class Memory:
    """Bytes that a training takes at its fullest, by estimate, and how many there are. `moments`: Muon's momentum and
    AdamW's; `saving`: the copy that is written while training goes on."""

    parts: Mapping[str, int]
    there: int | None  # None where the system does not say

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.there is None or self.total <= self.there

    def __str__(self) -> str:
        there = f" of {size(self.there)}" if self.there else ""
        return f"{size(self.total)}{there}: " + ", ".join(f"{name} {size(of)}" for name, of in self.parts.items())


def memory(config: RunConfig, runtime: Runtime) -> Memory:
    """Of a configuration, computed in this way. What saving copies lies in the machine's memory, which may be another
    than the device's."""
    model, train = config.sized_model, config.train
    groups = {name: sum(weight.numel() for weight in some) for name, some in sort_parameters(outline(model)).items()}
    weights = sum(groups.values())
    matrices = groups["matrices"] + groups["fused"] if config.optim.matrix_optimizer == "muon" else 0
    moments = matrices + 2 * (weights - matrices)  # Muon keeps one number for each weight, AdamW two
    average = weights if config.optim.ema_decay else 0
    sequences, bfloat16 = runtime.micro_batch_size, runtime.dtype == "bfloat16"
    activations = activation_bytes(model, sequences, train.sequence_length, train.activation_checkpointing)
    parts = {
        "weights": 4 * weights,
        "gradients": 4 * weights,
        "moments": 4 * moments,
        "average": 4 * average,
        "bfloat16 weights": 2 * weights * bfloat16,
        "activations": activations if bfloat16 else activations * 4 // 3,
        "saving": 4 * (weights + moments + average) * (runtime.device != "cuda"),
    }
    return Memory({name: of for name, of in parts.items() if of}, machine_bytes(runtime.device))


def memory_warning(config: RunConfig, runtime: Runtime) -> str | None:
    """Where weights may fit and the whole does not: what would help, the cheapest first."""
    needed = memory(config, runtime)
    if needed.fits or needed.there is None:
        return None
    said = f"warning: this takes an estimated {size(needed.total)} of memory, and there are {size(needed.there)}: "
    for flags, changed, way in smaller(config, runtime):
        if (less := memory(changed, way)).fits:
            return f"{said}{flags} would take {size(less.total)}"
    few = "no micro-batch is small enough, not even with --train.activation-checkpointing"
    return f"{said}{few}: choose a smaller --preset or model, or lower --train.sequence-length"


def smaller(config: RunConfig, runtime: Runtime) -> Iterator[tuple[str, RunConfig, Runtime]]:
    """Ways of making the same step with less memory: fewer sequences at a time, then computing layers again."""
    already, most = config.train.activation_checkpointing, runtime.micro_batch_size
    for again in (True,) if already else (False, True):
        changed = replace(config, train=replace(config.train, activation_checkpointing=again))
        for micro in (micro for micro in config.train.micro_batch_sizes() if micro <= most):
            flags = ["--train.activation-checkpointing"] * (again and not already)
            flags += [f"--train.micro-batch-size {micro}"] * (micro < most)
            if flags:
                yield " ".join(flags), changed, replace(runtime, micro_batch_size=micro)


def plan(config: RunConfig, runtime: Runtime, reasons: Mapping[str, str], corpus: Corpus, peak: Peak) -> dict[str, str]:
    """A line for everything that is known before the first step."""
    cost = count(config.model, config.train.sequence_length)
    return {
        "text": f"{config.data.source}: {corpus.tokens('train'):,} tokens, vocabulary {corpus.tokenizer.vocab_size:,}",
        "model": f"{readable(cost.total)} parameters, {readable(cost.active)} active for a token; "
        f"{readable(cost.training_flops)} FLOP to train on one",
        "plan": length(config, corpus.tokens("train")),
        **runtime.describe(reasons),
        "memory": str(memory(config, runtime)),
        "peak": f"{readable(peak.flops, giga='G')}FLOP/s: {peak.why}; MFU is the share of it that is used",
    }


def length(config: RunConfig, split: int) -> str:
    tokens = config.train.tokens_per_step
    if config.minutes:
        return f"{config.minutes:g} minutes, in steps of {tokens:,} tokens"
    return f"{config.steps:,} steps of {tokens:,} tokens: {amount(config.steps * tokens, split)}"


def amount(tokens: int, split: int) -> str:
    epochs = tokens / split
    return f"{readable(tokens)} tokens, {epochs:,.{0 if epochs >= 10 else 2}f} epochs"


def model_warnings(config: RunConfig) -> Iterator[str]:
    """What a configuration is likely not meant to be."""
    if config.model.router_learns_nothing:
        yield (
            "warning: with num_experts_per_tok = 1 and norm_topk_prob every gate is 1, so the router learns nothing "
            "from the language-model loss: pass --model.no-norm-topk-prob, or choose 2 experts"
        )
    if config.model.num_moe_layers and not config.model.balanced:
        yield "warning: load balancing is off, neither bias nor balance loss: expect experts to starve"


class Forecast:
    """How long a training takes, by the time of its first steps. Where later ones have longer windows, theirs is longer
    as attention has more to do."""

    def __init__(self, config: RunConfig, split: int, device: str = "cpu") -> None:
        """split: tokens of the training split."""
        train = config.train
        self.config, self.split = config, split
        cuts = {train.parts(0), train.parts(1)}
        costs = {parts: count(config.model, train.sequence_length // parts) for parts in cuts}
        self.flops = {parts: train.tokens_per_step * cost.training_flops for parts, cost in costs.items()}
        further = ATTENTION.get(device, 1) - 1
        self.work = {
            parts: self.flops[parts] + train.tokens_per_step * further * 3 * cost.attention_flops
            for parts, cost in costs.items()
        }
        self.took: list[tuple[float, int]] = []

    def step(self, seconds: float, parts: int) -> bool:
        """A step was made, its windows cut in so many parts; whether it was the last of those that are measured."""
        if len(self.took) < WARM + MEASURED:
            self.took.append((seconds, parts))
            return len(self.took) == WARM + MEASURED
        return False

    def line(self, state: State) -> str:
        """What is left after the last of them, or of fewer in a shorter training; state: where it stands."""
        measured = self.took[WARM:] or self.took
        fastest, windows = min(measured)  # what else the machine did makes a step slower and never faster
        pace = fastest / self.work[windows]
        numbers = " and ".join(str(state.step - back) for back in reversed(range(len(measured))))
        which = f"the faster of steps {numbers}" if len(measured) > 1 else f"step {numbers}"
        rest = self.rest_by_clock(pace, state) if self.config.minutes else self.rest_by_steps(pace, state)
        return f"{rest} ({which} took {short(fastest)}; evaluation and saving not counted)"

    def rest_by_steps(self, pace: float, state: State) -> str:
        total = self.config.steps
        switch = min(max(math.ceil(self.config.train.short_until * total), state.step), total)
        first, last = (pace * self.work[self.config.train.parts(part)] for part in (0, 1))
        rest = first * (switch - state.step) + last * (total - switch)
        if len(self.took) == state.step:
            return f"about {clock(state.seconds + rest)} for {total:,} steps"
        return f"about {clock(rest)} for the {total - state.step:,} steps that are left"

    def rest_by_clock(self, pace: float, state: State) -> str:
        budget = 60 * (self.config.minutes or 0)
        switch = max(min(self.config.train.short_until * budget, budget), state.seconds)
        first, last = (pace * self.work[self.config.train.parts(part)] for part in (0, 1))
        steps = round(state.step + (switch - state.seconds) / first + max(budget - switch, 0) / last)
        tokens = steps * self.config.train.tokens_per_step
        return f"{self.config.minutes:g} minutes make about {steps:,} steps: {amount(tokens, self.split)}"


def preset_lines() -> Iterator[str]:
    """What there is to say of every preset."""
    for name, config in presets().items():
        model, train, note = config.sized_model, config.train, NOTES[name]
        cost = count(model, train.sequence_length)
        least = cost.training_bytes + activation_bytes(model, 1, train.sequence_length, train.activation_checkpointing)
        duration = f"{config.minutes:g} minutes" if config.minutes else f"{config.steps:,} steps"
        yield f"{name:8} {readable(cost.total)} parameters, {readable(cost.active)} active for a token"
        yield f"{'':8} {duration}, {train.tokens_per_step:,} tokens a step, on {config.data.source}"
        yield f"{'':8} {size(least)} of memory or more: {note.machine}"
        yield f"{'':8} {note.reached}"


def size(number: float) -> str:
    return f"{readable(number, giga='G')}B"


def short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1e3 * seconds:.0f} ms"
