"""The picture of a run: its loss curve, and where its tokens went."""

from pathlib import Path

import numpy as np

from moe.metrics import read_metrics


def draw_run(folder: Path) -> Path:
    """Read metrics.jsonl, write `training.png` beside it: losses over steps, and each expert's load over time, a
    strip per MoE layer. A load is drawn from the step before until its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(folder / "metrics.jsonl")
    loads = [record for record in records if "load_by_layer" in record]
    layers = len(loads[-1]["load_by_layer"]) if loads else 0
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
    prices = {record["step"]: record["nats_per_character"] for record in records if record["loss"] is not None}
    curve.plot(list(prices), list(prices.values()), linewidth=0.7, alpha=0.6, label="training, each step")
    evaluated = [record for record in records if "val_loss" in record]
    whole = max((record["val_tokens"] for record in evaluated), default=0)
    for name, style in (("a part of the split", ".-"), ("the whole split", "o-")):
        shown = [record for record in evaluated if (record["val_tokens"] == whole) == (name == "the whole split")]
        if shown:
            points = {record["step"]: record["val_nats_per_character"] for record in shown}
            curve.plot(list(points), list(points.values()), style, label=f"validation, {name}")
    curve.set(
        ylabel="nats per character",
        title=f"{folder.name}: {evaluated[-1]['val_nats_per_character']:.3f} nats per character" if evaluated else "",
    )
    curve.set_ylim(top=min(4.0, max(prices.values(), default=4.0) + 0.1))
    curve.grid(alpha=0.3)
    curve.legend()
    for layer in range(layers):
        load = np.array([record["load_by_layer"][layer] for record in loads], dtype=float).T  # (E, times)
        strip = axes[1 + layer, 0]
        relative = load / load.mean(0, keepdims=True).clip(min=1e-9)
        edges = [0, *(record["step"] for record in loads)], np.arange(len(load) + 1) - 0.5
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
