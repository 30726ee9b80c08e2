"""The picture of a run: its loss curve, and where its tokens went."""

from pathlib import Path

import numpy as np

from moe.config import MoeError
from moe.metrics import Record, read_metrics


def draw_run(folder: Path) -> Path:
    """Read metrics.jsonl, write `training.png` beside it: losses over steps, and each expert's load over time, a
    strip per MoE layer. A load is drawn from the step before until its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise MoeError(f"{folder / 'metrics.jsonl'} has no step to draw")
    detailed = [record for record in records if "load_by_layer" in record]
    evaluated = [record for record in records if "val_loss" in record]
    try:
        made = [record for record in records if record["nats_per_character"] is not None]  # those left out have none
        steps, prices = column(made, "step"), column(made, "nats_per_character")
        val_steps, val_prices = column(evaluated, "step"), column(evaluated, "val_nats_per_character")
        val_tokens = column(evaluated, "val_tokens")
        times, loads = column(detailed, "step"), column(detailed, "load_by_layer", 3)  # (times,), (times, L, E)
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise MoeError(f"{folder / 'metrics.jsonl'} does not hold what training writes ({what})") from None
    layers = loads.shape[1] if len(detailed) else 0
    figure, axes = plt.subplots(
        1 + layers,
        1,
        figsize=(9, 4 + 1.5 * layers),
        height_ratios=[3] + [1] * layers,
        layout="constrained",
        squeeze=False,
        sharex=True,
    )
    curve = axes[0, 0]
    curve.plot(steps, prices, linewidth=0.7, alpha=0.6, label="training, each step")
    whole = val_tokens == val_tokens.max(initial=0)
    for name, style, shown in (("a part of the split", ".-", ~whole), ("the whole split", "o-", whole)):
        if shown.any():
            curve.plot(val_steps[shown], val_prices[shown], style, label=f"validation, {name}")
    curve.set(
        ylabel="nats per character",
        title=f"{folder.name}: {val_prices[-1]:.3f} nats per character" if evaluated else "",
    )
    curve.set_ylim(top=min(4.0, prices.max(initial=0) + 0.1))
    curve.grid(alpha=0.3)
    curve.legend()
    for layer in range(layers):
        load = loads[:, layer].T  # (E, times)
        strip = axes[1 + layer, 0]
        relative = load / load.mean(0, keepdims=True).clip(min=1e-9)
        edges = [0, *times], np.arange(len(load) + 1) - 0.5
        image = strip.pcolormesh(*edges, relative, cmap="RdBu_r", vmin=0, vmax=2)
        strip.invert_yaxis()
        strip.set(ylabel=f"MoE layer {layer}\nexpert")
    if layers:
        figure.colorbar(image, ax=list(axes[1:, 0]), label="load, in means (white: even)", shrink=0.9)
    axes[-1, 0].set_xlabel("step")
    path = folder / "training.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def column(records: list[Record], name: str, dimensions: int = 1) -> np.ndarray:
    """A field of every record, float64. Raises KeyError, TypeError or ValueError where that cannot be drawn."""
    values = np.array([record[name] for record in records], dtype=float)
    if not (np.abs(values) < 1e15).all():
        raise ValueError(f"{name} is not finite, or beyond measure")
    if records and (values.ndim != dimensions or not values.size):
        raise ValueError(f"{name} has the shape {values.shape[1:]}")
    return values
