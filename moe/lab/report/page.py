"""The page itself: what does not move is written here, what does is in page.js, and everything is in one file.

Whatever comes from a run, its name, its text, its tokens, is escaped here or set as text there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import vl_convert

from moe.lab.report.cost import Row
from moe.lab.report.verdict import Verdict

WORDS = {
    "nats per character": "The price of the text: how surprised the model was by each character, in natural units; "
    "0 would be certainty. Multiplied by 1.44 it is bits.",
    "MaxVio": "How far the busiest expert lies above an even share of the tokens: 0 is even, 1 is twice its share.",
    "balance loss": "What training adds, times alpha, to push routing towards even loads (DeepSeek-V3, eq. 17-20); 1 "
    "is even.",
    "bias": "A number of each expert that is added to its score when experts are chosen, and never to its weight; it "
    "rises while the expert has too little to do (DeepSeek-V3, eq. 16).",
    "entropy": "Of the load, over its largest value: 1 is even, 0 would be a single expert doing everything.",
    "dead expert": "One that got no token at all.",
    "score, gate": "How well a token fits an expert, between 0 and 1; and the weight that its output is given, made "
    "from the scores of those chosen.",
    "lift": "How many times more often a token is sent to an expert than tokens are on the whole.",
    "told by": "The mutual information of the chosen expert with what is named, over the most it could be: 100 % means "
    "that it decides alone. What chance finds in a text of this length has been taken off.",
}
LEGEND = (("0", "nothing"), ("2", "½ to ¾"), ("4", "an even share"), ("6", "1⅓ to 1¾"), ("8", "over 2½ times"))


@lru_cache(maxsize=1)
def vega() -> str:
    """Vega-Lite and what draws it, from its package, as a module that puts `vegaEmbed` where page.js finds it."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def text_of(name: str) -> str:
    return (files("moe.lab.report") / name).read_text("utf-8")


def as_json(value: Any) -> str:
    """JSON that cannot end the element it stands in; what is not finite becomes null."""
    return json.dumps(finite(value), separators=(",", ":")).replace("<", "\\u003c")


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite(part) for name, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, list | tuple) else value


def assemble(data: Mapping[str, Any], **parts: str) -> str:
    """The file. data: for page.js; parts: what the template names, as HTML."""
    fixed = {"style": text_of("page.css"), "script": text_of("page.js"), "vega": vega(), "run": as_json(data)}
    return Template(text_of("page.html")).substitute(fixed | parts)


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def facts(figures: Mapping[str, str]) -> str:
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items())


def figure(name: str, label: str = "") -> str:
    """A place for the chart of this name."""
    head = f"<h3>{escape(label)}</h3>" if label else ""
    return f'<figure>{head}<div class="chart" id="chart-{name}"></div></figure>'


def verdict_of(verdict: Verdict) -> str:
    kind = {True: "fine", False: "off", None: ""}[verdict.fine]
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in verdict.remarks)
    return f'<div class="verdict {kind}"><p><strong>{escape(verdict.headline)}</strong></p><ul>{remarks}</ul></div>'


def heat_legend(words: Sequence[tuple[str, str]] = LEGEND, title: str = "an expert's load:") -> str:
    swatches = "".join(
        f'<span><i class="swatch" style="background:var(--heat{number})"></i> {escape(word)}</span>'
        for number, word in words
    )
    return f'<p class="legend">{escape(title)} {swatches}</p>'


def atlas_of(sentence: str, told: bool, about: str, alike: bool) -> str:
    """told: whether there is a chart of what the choice follows; alike: one of how alike experts are."""
    legend = (("1", "opposed"), ("4", "unrelated"), ("6", "alike"), ("8", "the same"))
    hidden = "" if alike else " hidden"
    return f"""{paragraph(sentence)}{figure("specialisation") if told else ""}
<label for="atlas-layer">layer</label> <select id="atlas-layer"></select>
{paragraph(about, "soft")}
<div id="experts" class="experts"></div>
<div id="similarity"{hidden}><h3>Who could stand in for whom</h3>
{paragraph("The mean cosine between the outputs of two experts for the same tokens.", "soft")}
{heat_legend(legend, "")}{figure("similarity")}</div>"""


def reading_of() -> str:
    return """<p class="soft">Each token has the colour of the expert with the largest gate; what the model wrote itself
is underlined. Point at a token, or use the arrow keys.</p>
<label for="text">text</label> <select id="text"></select>
<label for="layer">layer</label> <select id="layer"></select>
<div class="keys" id="keys" role="group" aria-label="Show the tokens of one expert"></div>
<div class="reading" id="reading" role="listbox" tabindex="0" aria-label="The text, token by token"></div>
<p class="soft" id="cut"></p>
<div class="detail" id="detail" aria-live="off"></div>"""


def cost_of(rows: Sequence[Row]) -> str:
    lines = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th><td>{escape(row.ours)}</td><td>{escape(row.v3)}</td></tr>'
        for row in rows
    )
    head = '<tr><th></th><th scope="col">this run</th><th scope="col">DeepSeek-V3, published</th></tr>'
    return f'<div class="wide"><table>{head}{lines}</table></div>'


def words_of() -> str:
    return (
        "<dl>"
        + "".join(f"<dt><strong>{escape(word)}</strong></dt><dd>{escape(text)}</dd>" for word, text in WORDS.items())
        + "</dl>"
    )
