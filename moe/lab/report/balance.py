"""How evenly the experts were used while training went on, in numbers and in words.

Notation: M moments at which the load was written, L MoE layers, E routed experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe.config import ModelConfig
from moe.lab.report.history import History, mean
from moe.lab.report.verdict import counted
from moe.model import Transformer

CELLS = 10_000  # of all heat maps together
SHOWN = 8  # layers that get a heat map
EVENNESS = ((0.25, "evenly"), (0.5, "fairly evenly"), (1.0, "unevenly"), (np.inf, "very unevenly"))  # MaxVio below
SETTLED = 0.5  # a MaxVio from which on the work counts as shared evenly enough


@dataclass(frozen=True)
class LoadMap:
    """The load of a layer's experts over time, in even shares."""

    layer: str
    steps: Sequence[int]  # the ends of the columns
    load: np.ndarray  # (columns, E), 1 where even


def layer_names(model: Transformer) -> list[str]:
    """Of the L MoE layers, by their numbers; those of multi-token prediction are behind the last."""
    layers = model.config.num_hidden_layers
    return [f"{number}{' (MTP)' * (number >= layers)}" for number in model.moe_layer_numbers()]


def load_maps(history: History, layers: Sequence[str]) -> list[LoadMap]:
    """Of at most SHOWN layers, spread evenly over the model, neighbouring moments taken together where there are many.
    layers: the names of the L layers."""
    loads = history.loads
    if not loads.size:
        return []
    moments, number, experts = loads.shape
    shown = np.unique(np.linspace(0, number - 1, min(SHOWN, number)).round().astype(int))
    columns = max(min(moments, CELLS // (len(shown) * experts)), 1)
    groups = np.array_split(np.arange(moments), columns)
    steps = [int(history.detailed["step"][group[-1]]) for group in groups]
    maps = []
    for index in shown:
        load = np.stack([loads[group, index].sum(0) for group in groups])
        even = np.maximum(load.mean(1, keepdims=True), 1e-9)
        maps.append(LoadMap(layers[index], steps, load / even))
    return maps


def layer_curves(history: History, name: str, layers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of step, layer and value of a field that is written layer by layer."""
    return [
        {"step": int(step), "layer": layer, "value": float(value)}
        for step, values in zip(history.detailed["step"], history.by_layer(name), strict=True)
        for layer, value in zip(layers, values, strict=True)
    ]


def expert_biases(model: Transformer) -> list[np.ndarray]:
    """(E,) for each MoE layer."""
    return [layer.router.expert_bias.cpu().numpy() for layer in model.moe_layers()]


def meaning(history: History, config: ModelConfig, layers: Sequence[str], biases: Sequence[np.ndarray]) -> list[str]:
    """What the figures say of this run, a sentence each."""
    if not layers:
        return ["This model has no experts to balance."]
    sentences = []
    if len(history) and history.has("max_vio"):
        sentences += [means_of_balance(config), first_and_last(history, layers), settling(history), starving(history)]
    if config.bias_update_speed and any(bias.any() for bias in biases):
        sentences.append(pushing(config, layers, biases))
    return [sentence for sentence in sentences if sentence]


def means_of_balance(config: ModelConfig) -> str:
    bias = f"the bias (a step of {config.bias_update_speed:g})" * bool(config.bias_update_speed)
    loss = {"sequence": "the sequence-wise loss", "switch": "the switch loss", "none": ""}[config.balance_loss]
    loss += f" (alpha {config.aux_loss_alpha:g})" * bool(loss)
    means = " and ".join(filter(None, (bias, loss if config.aux_loss_alpha else "")))
    return f"Balanced by {means}." if means else "Nothing balanced this run: neither bias nor balance loss."


def first_and_last(history: History, layers: Sequence[str]) -> str:
    vio = history["max_vio"]
    last = mean(vio[-max(len(vio) // 10, 1) :])
    if np.isnan(last):
        return ""
    words = next(word for most, word in EVENNESS if last < most)
    begin = float(vio[0]) if not np.isnan(vio[0]) else last
    worst = ""
    if history.loads.size and len(layers) > 1:
        load = history.loads[-max(len(history.loads) // 10, 1) :].sum(0)
        worst = f", most in layer {layers[int((load.max(-1) / np.maximum(load.mean(-1), 1e-9)).argmax())]}"
    return (
        f"The work is shared {words}: in the last tenth of the steps the busiest expert of the worst layer had "
        f"{1 + last:.2f} times an even share (MaxVio {last:.2f}{worst}), at the first step {1 + begin:.2f} times."
    )


def settling(history: History) -> str:
    """From which step on MaxVio stayed low, by the mean of ten steps."""
    vio = history["max_vio"]
    groups = np.array_split(np.arange(len(vio)), max(len(vio) // 10, 1))
    high = [index for index, group in enumerate(groups) if mean(vio[group]) > SETTLED]
    if not high:
        return f"MaxVio was below {SETTLED} all the time."
    if high[-1] + 1 >= len(groups):
        return f"MaxVio did not come to stay below {SETTLED}."
    return f"MaxVio has stayed below {SETTLED} since step {int(history['step'][groups[high[-1] + 1][0]])}."


def starving(history: History) -> str:
    dead = history["dead_experts"]
    late = dead[-max(len(dead) // 10, 1) :]
    if dead_now := history.last.get("val_dead_experts"):
        return f"{counted(dead_now, 'expert is', 'experts are')} dead: without a token in the last evaluation."
    if np.nanmax(np.append(late, 0)) > 0:
        return f"Up to {int(np.nanmax(late))} at a time got nothing in one of the last steps: they starve."
    if np.nanmax(np.append(dead, 0)) > 0:
        return "Some experts got nothing in early steps; all of them work by now."
    return "No expert was ever without work."


def pushing(config: ModelConfig, layers: Sequence[str], biases: Sequence[np.ndarray]) -> str:
    """How hard the bias has to push."""
    ranges = [float(bias.max() - bias.min()) for bias in biases]
    index = int(np.argmax(ranges))
    steps = ranges[index] / config.bias_update_speed
    return (
        f"The biases lie up to {ranges[index]:.3f} apart (layer {layers[index]}), {steps:.0f} of their steps: so much "
        "better, on a scale from 0 to 1, has a token to fit one expert to be sent to it and not to the other."
    )
