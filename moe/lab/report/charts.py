"""The charts of the page as Vega-Lite specifications (https://vega.github.io/vega-lite): data, and how it is drawn.

`@x` and `@y` stand for the field that the reader has chosen of `choices`. Colours are the page's CSS variables, so that
a chart follows the page from light to dark.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe.config import RunConfig
from moe.lab.report.balance import LoadMap, layer_curves
from moe.lab.report.history import History
from moe.lab.report.reference import Reference

Chart = dict[str, Any]
STEPS = [0.25, 0.5, 0.75, 0.9, 1.1, 1.35, 1.75, 2.5]  # of a load in even shares: borders between the colours
HEAT = [f"var(--heat{number})" for number in range(len(STEPS) + 1)]
LINES = [f"var(--line{number})" for number in range(8)]
ALIKE = [-0.6, -0.35, -0.2, -0.08, 0.08, 0.2, 0.45, 0.8]  # borders of a cosine's colours
MOMENTS = 150  # of a curve that is drawn for each layer
X = {"step": "step", "tokens": "tokens", "seconds": "seconds of training"}
Y = {"nats_per_character": "nats per character", "bits_per_byte": "bits per byte"}


def packed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the same fields as page.js turns them back: the names once, and lists."""
    names = list(rows[0]) if rows else []
    return {"names": names, "rows": [[row[name] for name in names] for row in rows]}


def chart(description: str, height: int, **spec: Any) -> Chart:
    return {"spec": {"width": "container", "height": height, "description": description, **spec}}


def axis(field: str, title: str | None, kind: str = "quantitative", **more: Any) -> dict[str, Any]:
    return {"field": field, "type": kind, "title": title, **more}


def loss_chart(config: RunConfig, history: History, reference: Reference | None) -> Chart:
    """Training and validation, over the band of the reference runs where there is one."""
    training, validation = training_rows(history), validation_rows(history)
    named = {"training": LINES[0], "validation, a part": LINES[1], "validation, all of it": LINES[2]}
    named = {of: line for of, line in named.items() if of in {row["of"] for row in (*training, *validation)}}
    if reference is not None:
        named |= {"reference, validation": LINES[3], "reference, training": LINES[4]}
    color = {
        "field": "of",
        "type": "nominal",
        "scale": {"domain": list(named), "range": list(named.values())},
        "legend": {"title": None, "orient": "bottom"},
    }
    layers = []
    if reference is not None:
        for part in ("training", "validation"):
            rows = band_rows(config, reference, part, bits_ratio(history))
            layers.append(curve(rows, color, {"type": "area", "opacity": 0.3}, "low_@y", "high_@y"))
    layers.append(curve(training, color, {"type": "line", "strokeWidth": 1.2}))
    layers.append(curve(validation, color, {"type": "line", "point": {"size": 45}}))
    description = f"Training and validation loss of {config.preset} over {len(history)} steps"
    return {**chart(description, 320, layer=layers), "choices": {"x": X, "y": Y}}


def curve(
    rows: Sequence[Mapping[str, Any]], color: Mapping[str, Any], mark: Mapping[str, Any], y: str = "@y", y2: str = ""
) -> dict[str, Any]:
    """A layer of the chart of losses: a line, or an area between two."""
    encoding = {"x": axis("@x", "@xtitle"), "y": axis(y, "@ytitle", scale={"zero": False}), "color": color}
    encoding |= {"y2": {"field": y2}} if y2 else {}
    return {"data": packed(rows), "mark": {"tooltip": {"content": "data"}, **mark}, "encoding": encoding}


def training_rows(history: History) -> list[dict[str, Any]]:
    rows, ratio = history.thinned(["step", "tokens", "seconds", "nats_per_character"]), bits_ratio(history)
    return [{**row, "bits_per_byte": row["nats_per_character"] * ratio, "of": "training"} for row in rows]


def validation_rows(history: History) -> list[dict[str, Any]]:
    records = history.evaluated.records
    whole = max((record["val_tokens"] for record in records), default=0)
    return [
        {name: record[name] for name in ("step", "tokens", "seconds")}
        | {name: record[f"val_{name}"] for name in Y}
        | {"of": "validation, all of it" if record["val_tokens"] == whole else "validation, a part"}
        for record in records
    ]


def bits_ratio(history: History) -> float:
    """Bits per byte over nats per character of the run's text."""
    last = history.evaluated.records[-1:]
    return last[0]["val_bits_per_byte"] / max(last[0]["val_nats_per_character"], 1e-9) if last else 1 / np.log(2)


def band_rows(config: RunConfig, reference: Reference, part: str, ratio: float) -> list[dict[str, Any]]:
    """Of the reference's training or validation loss."""
    name = {"training": "train_nats_per_character", "validation": "val_nats_per_character"}[part]
    back = reference.stride / 2 if part == "training" else 0  # to the middle of the steps that a mean is of
    return [
        {"step": end - back, "tokens": (end - back) * config.train.tokens_per_step, "seconds": None}
        | {f"{edge}_nats_per_character": row[edge] for edge in ("low", "high")}
        | {f"{edge}_bits_per_byte": row[edge] * ratio for edge in ("low", "high")}
        | {"of": f"reference, {part}"}
        for end, row in reference.band(name).items()
    ]


def step_chart(history: History, name: str, title: str, description: str) -> Chart:
    rows = [row for row in history.thinned(["step", name]) if not np.isnan(row[name])]
    encoding = {"x": axis("step", "step"), "y": axis(name, title, scale={"zero": False})}
    mark = {"type": "line", "strokeWidth": 1.2, "color": LINES[0], "tooltip": {"content": "data"}}
    return chart(description, 160, data=packed(rows), mark=mark, encoding=encoding)


def rate_chart(config: RunConfig, history: History) -> Chart:
    """The learning rates: what the schedule leaves of each."""
    optim = config.optim
    rates = {"Muon": optim.muon_lr, "AdamW": optim.adam_lr, "routers": optim.router_lr}
    if optim.matrix_optimizer != "muon":
        del rates["Muon"]
    rows = [
        {"step": row["step"], "rate": row["lr_share"] * rate, "of": name}
        for row in history.thinned(["step", "lr_share"], 100)
        for name, rate in rates.items()
    ]
    return lines_chart("Learning rates over the steps", rows, "rate", "learning rate", "of")


def lines_chart(
    description: str, rows: Sequence[Mapping[str, Any]], field: str, title: str, of: str, most: float | None = None
) -> Chart:
    """most: the end of the axis that begins at 0; without it the axis is as long as the values need."""
    names = list(dict.fromkeys(row[of] for row in rows))
    color = {
        "field": of,
        "type": "nominal",
        "title": None if of == "of" else of,
        "scale": {"domain": names, "range": [LINES[place % len(LINES)] for place in range(len(names))]},
        "legend": {"orient": "bottom", "columns": 8},
    }
    scale = {"zero": False} if most is None else {"domain": [0, most]}
    encoding = {"x": axis("step", "step"), "y": axis(field, title, scale=scale), "color": color}
    mark = {"type": "line", "strokeWidth": 1.4, "point": len(rows) < 60, "tooltip": {"content": "data"}}
    return chart(description, 160, data=packed(rows), mark=mark, encoding=encoding)


def layer_chart(history: History, name: str, title: str, layers: Sequence[str]) -> Chart:
    """A curve for each layer; of many layers, for eight of them."""
    rows = layer_curves(history, name, layers)
    most = max((row["value"] for row in rows), default=0.0)
    end = None if name == "entropy" else max(most, 1.0 if name == "dead_experts" else 0.1)
    rows = some_of(some_of(rows, "layer", len(LINES)), "step", MOMENTS)
    return lines_chart(f"{title} of each layer", rows, "value", title, "layer", end)


def some_of(rows: Sequence[dict[str, Any]], name: str, most: int) -> list[dict[str, Any]]:
    """The rows with some values of a field, spread evenly, where it has more than so many."""
    values = list(dict.fromkeys(row[name] for row in rows))  # as they come, from the first to the last
    kept = {values[place] for place in np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int)}
    return [row for row in rows if row[name] in kept]


def heat_map(load: LoadMap, last: bool) -> Chart:
    """The load of each expert of a layer over time."""
    begins = [0, *load.steps[:-1]]
    rows = [
        {"from": begin, "step": end, "expert": expert, "load": round(float(share), 3)}
        for begin, end, shares in zip(begins, load.steps, load.load, strict=True)
        for expert, share in enumerate(shares)
    ]
    experts = load.load.shape[1]
    values = [0, experts - 1] if experts > 16 else list(range(experts))
    encoding = {
        "x": axis("from", "step" if last else None, scale={"nice": False, "zero": False}),
        "x2": {"field": "step"},
        "y": axis("expert", f"layer {load.layer}", "ordinal", axis={"values": values, "domain": False, "ticks": False}),
        "color": {
            "field": "load",
            "type": "quantitative",
            "scale": {"type": "threshold", "domain": STEPS, "range": HEAT},
            "legend": None,
        },
    }
    mark = {"type": "rect", "tooltip": {"content": "data"}, "aria": False}  # too many to be read out one by one
    height = int(np.clip(11 * experts, 60, 260))
    description = f"Load of the {experts} experts of layer {load.layer} over time, in even shares"
    return chart(description, height, data=packed(rows), mark=mark, encoding=encoding)


def bias_chart(layers: Sequence[str], biases: Sequence[np.ndarray]) -> Chart:
    rows = [
        {"layer": layer, "expert": expert, "bias": round(float(value), 5)}
        for layer, bias in zip(layers, biases, strict=True)
        for expert, value in enumerate(bias)
    ]
    encoding = {
        "x": axis("layer", "layer", "ordinal", axis={"labelAngle": 0}),
        "y": axis("bias", "bias of each expert"),
    }
    mark = {"type": "tick", "color": LINES[0], "thickness": 2, "tooltip": {"content": "data"}}
    return chart("The experts' biases by layer", 160, data=packed(rows), mark=mark, encoding=encoding)


def specialisation_chart(pages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Chart:
    """names: what the choice is told by."""
    rows = [
        {"layer": page["layer"], "told by": name, "share": share}
        for page in pages
        for name, share in page["specialisation"].items()
    ]
    encoding = {
        "x": axis("layer", "layer", "ordinal", axis={"labelAngle": 0}),
        "xOffset": {"field": "told by", "sort": names},
        "y": axis("share", "share of the choice", axis={"format": "%"}),
        "color": {
            "field": "told by",
            "type": "nominal",
            "sort": names,
            "scale": {"domain": names, "range": LINES[: len(names)]},
            "legend": {"title": "told by the", "orient": "bottom"},
        },
    }
    mark = {"type": "bar", "tooltip": {"content": "data"}}
    return chart("What the choice of an expert follows", 180, data=packed(rows), mark=mark, encoding=encoding)


def similarity_chart(layer: int, cosines: np.ndarray) -> Chart:
    """cosines: (E, E)."""
    rows = [
        {"expert": expert, "other": other, "cosine": round(float(value), 2)}
        for expert, values in enumerate(cosines)
        for other, value in enumerate(values)
    ]
    experts = len(cosines)
    plain = {"domain": False, "ticks": False, "labelAngle": 0, "labelOverlap": True}
    encoding = {
        "x": axis("other", "expert", "ordinal", axis=plain),
        "y": axis("expert", "expert", "ordinal", axis=plain),
        "color": {
            "field": "cosine",
            "type": "quantitative",
            "scale": {"type": "threshold", "domain": ALIKE, "range": HEAT},
            "legend": None,
        },
    }
    mark = {"type": "rect", "tooltip": {"content": "data"}, "aria": False}
    description = f"How alike the outputs of the experts of layer {layer} are"
    return chart(description, int(np.clip(16 * experts, 120, 320)), data=packed(rows), mark=mark, encoding=encoding)
