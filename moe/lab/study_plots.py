"""A study's picture: curves where the way there matters, paired differences otherwise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe.lab.studies import Study
from moe.lab.study_runs import Results
from moe.lab.study_summary import CLEAR, compare, paired, priced_split
from moe.metrics import Record

AXES = {"tokens": "tokens", "flops": "floating-point operations of training", "seconds": "seconds of training"}
SKIPPED = 0.15  # of the way: the first steep fall would flatten everything after it


def draw_study(results: Results, study: Study, folder: Path) -> Path:
    """Write NAME.png into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    _, arms = paired(results)
    panels = tuple(AXES) if study.race else ("tokens",)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels) + 1.8, 4), sharey=True, layout="constrained", squeeze=False
    )
    if study.race or len(arms) == 1:
        for axis, column in zip(axes[0], panels, strict=True):
            draw_curves(axis, arms, column)
        axes[0, 0].set_ylabel("bits per byte, validation split")
        axes[0, 0].legend()
    else:
        draw_differences(axes[0, 0], arms, priced_split(arms))
    figure.suptitle(f"{results.study}: {study.question}", fontsize=10, wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{results.study}.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def draw_curves(axis: Any, arms: dict[str, list[Record]], column: str) -> None:
    """Every seed thin, the mean thick."""
    lowest, highest = np.inf, -np.inf
    for number, (name, runs) in enumerate(arms.items()):
        curves = [(np.array(run["curve"][column]), np.array(run["curve"]["val_bits_per_byte"])) for run in runs]
        for x, prices in curves:
            axis.plot(x, prices, color=f"C{number}", linewidth=0.6, alpha=0.5)
            shown = prices[x >= SKIPPED * x[-1]]
            lowest, highest = min(lowest, shown.min()), max(highest, shown.max())
        axis.plot(*mean_curve(curves), color=f"C{number}", linewidth=2, label=name)
    room = 0.05 * max(highest - lowest, 0.01)
    axis.set(xlabel=AXES[column], ylim=(lowest - room, highest + room))
    axis.grid(alpha=0.3)


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Over the part of x that all curves have, between points on straight lines."""
    x = np.linspace(max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves), 200)
    return x, np.mean([np.interp(x, *curve) for curve in curves], axis=0)


def draw_differences(axis: Any, arms: dict[str, list[Record]], split: str) -> None:
    """Of each arm from the first: a dot for every seed, the mean with a bar of three standard errors."""
    prices = {name: [run["finals"][f"{split}_bits_per_byte"] for run in runs] for name, runs in arms.items()}
    first, *others = prices
    for number, name in enumerate(others):
        difference = compare(prices[first], prices[name]).difference
        bar = CLEAR * (difference.standard_error or 0)
        dots = np.subtract(prices[name], prices[first])
        axis.plot(dots, np.full(len(dots), number), ".", color="0.6")
        axis.errorbar(difference.mean, number, xerr=bar, fmt="o", capsize=4, color=f"C{number + 1}")
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set_yticks(range(len(others)), others)
    axis.set(
        xlabel=f"bits per byte against {first} (left: better), {CLEAR} standard errors", ylim=(len(others) - 0.5, -0.5)
    )
    axis.grid(alpha=0.3, axis="x")
