"""From a run's folder to its report.html."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moe.checkpoint import Run, RunFolder
from moe.config import MoeError, RunConfig, SampleConfig
from moe.corpus import Corpus, prepare
from moe.corpus.streams import at_hand
from moe.data import TokenStream
from moe.lab.report import charts
from moe.lab.report.atlas import Routed, atlas, enough_tokens, in_words, route, told_by
from moe.lab.report.balance import SHOWN, expert_biases, layer_names, load_maps, meaning
from moe.lab.report.cost import Rate, cost_table, peak_of, usual_rate
from moe.lab.report.history import History
from moe.lab.report.page import (
    assemble,
    atlas_of,
    cost_of,
    facts,
    figure,
    heat_legend,
    paragraph,
    reading_of,
    verdict_of,
    words_of,
)
from moe.lab.report.reading import Text, read
from moe.lab.report.reference import reference_of
from moe.lab.report.verdict import judge
from moe.machine.cost import count, readable
from moe.machine.files import write_whole
from moe.metrics import clock
from moe.sampling import SamplingError, prompt_tokens, sample
from moe.tokenizer import NoTokenizer

WRITTEN = 250  # tokens of the sample
QUOTED = 300  # of the validation split
SHOWN_BYTES, READ_BYTES = 1 << 16, 1 << 20  # of a text that is given: for its colours, for the atlas
WINDOW = 1024  # the most positions at a time that the atlas reads


def make_report(
    folder: Path, run: Run, corpus: Corpus | None, given: Mapping[str, bytes] | None = None, rate: float | None = None
) -> Path:
    """Write report.html beside a run's metrics.jsonl. corpus: its text, where it is at hand. given: further texts to
    colour, by name. rate: dollars that an hour of its machine costs. Raises MoeError."""
    history, setup = History.read(folder / "metrics.jsonl"), json.loads((folder / "config.json").read_text("utf-8"))
    layers = layer_names(run.model)
    biases = expert_biases(run.model)
    texts = [read(run, text) for text in texts_of(run, corpus, given or {})]
    routed = text_for_atlas(run, corpus, given or {})
    pages = atlas(run.model, run.tokenizer, routed) if routed is not None else []
    drawn = curves(run.config, history) | balance(history, layers, biases)
    if names := told_by(pages):
        drawn["specialisation"] = charts.specialisation_chart(pages, names)
    parts = {
        "title": escape(folder.resolve().name),
        "subtitle": escape(subtitle(run, history, setup)),
        "facts": facts(key_figures(history)),
        "curves": curves_part(run.config, history, setup["data"].get("text", ""), drawn),
        "balance": balance_part(meaning(history, run.model.config, layers, biases), drawn),
        "atlas": atlas_part(run, pages, routed, corpus is not None),
        "reading": reading_of() if texts else paragraph("This model has no tokenizer, so it neither reads nor writes."),
        "cost": cost_part(run.config, history, setup, rate),
        "words": words_of(),
        "setup": escape(json.dumps(setup, indent=1)),
    }
    data = {"charts": drawn, "atlas": pages, "texts": texts, "experts": run.model.config.n_routed_experts}
    path = folder / "report.html"
    write_whole(path, assemble(data, **parts).encode("utf-8", "replace"))
    return path


def text_at_hand(run: Run, folder: Path) -> Corpus | None:
    """The text a run was trained on, where it can be opened without a network and is still the same."""
    data = RunFolder(folder).read_setup()[2]
    if not at_hand(run.config.data.source):
        return None
    try:
        corpus = prepare(run.config.data, tokenizer=run.tokenizer if run.config.init_from else None)
    except MoeError:
        return None
    return corpus if (corpus.hash, corpus.tokenizer.hash) == (data.get("text"), run.tokenizer.hash) else None


# -- what is shown of a text -------------------------------------------------------------------------------------------


def texts_of(run: Run, corpus: Corpus | None, given: Mapping[str, bytes]) -> list[Text]:
    """Those that were given, what the model writes, and the beginning of the validation split."""
    if isinstance(run.tokenizer, NoTokenizer):
        return []
    texts = [
        Text(name, run.tokenizer.prompt(data[:SHOWN_BYTES]), cut=len(data) > SHOWN_BYTES)
        for name, data in given.items()
    ]
    start = prompt_tokens(run, "")[0].tolist()
    with suppress(SamplingError):  # of weights that are no longer finite
        written = [token for _, token in sample(run, "", SampleConfig(), WRITTEN, seed=run.config.seed)]
        texts.append(Text("a sample of this model", [*start, *written], made=len(written)))
    if corpus is not None:
        quoted = TokenStream(corpus, "val").read(0, QUOTED).tolist()
        begin = [] if quoted[: len(start)] == start else start
        texts.append(Text("from the validation split", begin + quoted))
    return texts


def text_for_atlas(run: Run, corpus: Corpus | None, given: Mapping[str, bytes]) -> Routed | None:
    """The validation split, as far as it is needed; where it is not at hand, the texts that were given. None without
    experts or text."""
    if not run.model.config.num_moe_layers:
        return None
    most, window = enough_tokens(run.model), min(run.model.config.max_position_embeddings, WINDOW)
    if corpus is not None:
        ids = TokenStream(corpus, "val").read(0, most)
    else:
        tokens = [token for data in given.values() for token in run.tokenizer.prompt(data[:READ_BYTES])]
        ids = np.array(tokens[:most], dtype=np.int64)
    return route(run.model, ids, window) if len(ids) > 1 else None


# -- the parts of the page ---------------------------------------------------------------------------------------------


def subtitle(run: Run, history: History, setup: Mapping[str, Any]) -> str:
    size = count(run.config.model, run.config.train.sequence_length)
    parts = [
        f"preset {run.config.preset}",
        f"{readable(size.total)} parameters, {readable(size.active)} active for a token",
    ]
    if len(history):
        last = history.last
        parts.append(f"{last['step']:,} steps, {last['tokens']:,} tokens of {Path(run.config.data.source).name}")
    return "; ".join([*parts, str(setup.get("hardware", ""))])


def key_figures(history: History) -> dict[str, str]:
    if not len(history):
        return {}
    last, shown = history.last, {}
    evaluated = history.evaluated.records
    if evaluated:
        found = evaluated[-1]
        shown["validation, nats per character"] = f"{found['val_nats_per_character']:.4f}"
        shown["bits per byte"] = f"{found['val_bits_per_byte']:.4f}"
        if None not in (violation := found.get("val_max_vio"), dead := found.get("val_dead_experts")):
            shown |= {"MaxVio on validation": f"{violation:.2f}", "dead experts": f"{dead}"}
    return shown | {"training time": clock(last["seconds"]), "steps": f"{last['step']:,}"}


def curves(config: RunConfig, history: History) -> dict[str, charts.Chart]:
    if not len(history):
        return {}
    drawn = {"loss": charts.loss_chart(config, history, reference_of(config.preset))}
    if history.has("balance_loss"):
        about = "The balance loss of each step, unweighted"
        drawn["balance-loss"] = charts.step_chart(history, "balance_loss", "balance loss", about)
    drawn["rates"] = charts.rate_chart(config, history)
    drawn["norms"] = charts.step_chart(history, "grad_norm", "gradient norm", "The norm of all gradients of each step")
    return drawn


def curves_part(config: RunConfig, history: History, text: str, drawn: Mapping[str, charts.Chart]) -> str:
    verdict = verdict_of(judge(config, history, reference_of(config.preset), text))
    if "loss" not in drawn:
        return verdict
    small = {"balance-loss": "Balance loss", "rates": "Learning rates", "norms": "Gradient norm"}
    row = "".join(figure(name, label=label) for name, label in small.items() if name in drawn)
    return f'{verdict}{figure("loss")}<div class="row">{row}</div>'


def balance(history: History, layers: Sequence[str], biases: Sequence[np.ndarray]) -> dict[str, charts.Chart]:
    drawn: dict[str, charts.Chart] = {}
    if len(history.detailed):
        maps = load_maps(history, layers)
        drawn |= {f"load-{place}": charts.heat_map(load, load is maps[-1]) for place, load in enumerate(maps)}
        for name, title in (("max_vio", "MaxVio"), ("entropy", "entropy"), ("dead_experts", "dead experts")):
            drawn[name] = charts.layer_chart(history, name, title, layers)
    if any(bias.any() for bias in biases):
        drawn["bias"] = charts.bias_chart(layers, biases)
    return drawn


def balance_part(sentences: Sequence[str], drawn: Mapping[str, charts.Chart]) -> str:
    maps = [name for name in drawn if name.startswith("load-")]
    html = paragraph(" ".join(sentences))
    if maps:
        some = f" of {SHOWN} layers" if len(maps) == SHOWN else ""
        html += f"<h3>The load of each expert over time{some}</h3>{heat_legend()}{''.join(map(figure, maps))}"
    labels = {
        "max_vio": "MaxVio",
        "entropy": "Entropy of the load",
        "dead_experts": "Dead experts",
        "bias": "Bias at the end",
    }
    row = "".join(figure(name, label=label) for name, label in labels.items() if name in drawn)
    return f'{html}<div class="row">{row}</div>'


def atlas_part(run: Run, pages: Sequence[Mapping[str, Any]], routed: Routed | None, held_out: bool) -> str:
    if not run.model.config.num_moe_layers:
        return paragraph("This model has no experts.")
    if routed is None:
        return paragraph("The run's text is not at hand: give one with --text FILE to see who goes where.")
    where = "the validation split" if held_out else "the text that was given"
    about = (
        f"From {len(routed.ids):,} tokens of {where}; with each token its lift, with each expert its share of the work."
    )
    return atlas_of(in_words(pages), bool(told_by(pages)), about, pages[0]["chart"] is not None)


def cost_part(config: RunConfig, history: History, setup: Mapping[str, Any], dollars: float | None) -> str:
    if not len(history):
        return paragraph("This model was not trained here.")
    runtime = setup["runtime"]
    rate = usual_rate(runtime["device"], runtime["threads"])
    if dollars is not None:
        rate = Rate(dollars, f"${dollars:g} an hour, as given")
    return cost_of(cost_table(config, history, rate, peak_of(setup)))
