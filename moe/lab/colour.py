"""A text in the terminal, each token on the colour of the expert that has most to say about it.

In one MoE layer that is the expert with the largest gate. Colours are backgrounds, with black or white letters by
contrast, so that they read the same on a dark and on a light terminal. Where there are no colours, or none are wanted
(NO_COLOR), the expert's number stands behind each token.

Notation: T tokens of the text, E routed experts.
"""

import colorsys
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TextIO

import numpy as np
from rich.console import Console

from moe.config import MoeError
from moe.lab.trace import Trace, trace
from moe.model import Transformer
from moe.tokenizer import Tokenizer

Rgb = tuple[int, int, int]
RESET = "\x1b[0m"
REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
STANDARD = "800000 008000 808000 000080 800080 008080 c0c0c0 ff0000 00ff00 ffff00 0000ff ff00ff 00ffff"
MOST_LISTED = 16  # experts of a layer; of more, only the busiest


@dataclass(frozen=True)
class Paper:
    """What a text is written on: how many colours there are, and how wide it is."""

    colours: int = 0  # 0, 13, 216 or 2**24
    width: int = 80

    @staticmethod
    def of(stream: TextIO) -> "Paper":
        """A stream's, as rich finds out: NO_COLOR and FORCE_COLOR, what the terminal says of itself, and pipes."""
        console = Console(file=stream)
        known = {"standard": 13, "256": 216, "truecolor": 2**24, None: 0}
        none = console.no_color or console.legacy_windows
        colours = 0 if none else known.get(console.color_system, 0)
        return Paper(colours, shutil.get_terminal_size((80, 24)).columns)

    def paint(self, text: str, expert: int) -> str:
        """A piece of text without line breaks in the colours of an expert, or followed by its number."""
        if not self.colours:
            return f"{text}/{expert}"
        inks = palette(self.colours)
        code, rgb = inks[expert % len(inks)]
        letters = {13: ("30", "97"), 216: ("38;5;16", "38;5;231")}.get(self.colours, ("38;2;0;0;0", "38;2;255;255;255"))
        return f"\x1b[{code};{letters[luminance(rgb) < 0.179]}m{text}{RESET}"  # 0.179: black and white are as clear


@cache
def palette(colours: int) -> list[tuple[str, Rgb]]:
    """(the code of a background, what it looks like), each as far as can be from all before it."""
    if colours == 13:
        found = {f"{number + 40 if number < 8 else number + 92}": of_hex(rgb) for number, rgb in standard()}
    elif colours == 216:
        steps = (0, 95, 135, 175, 215, 255)
        cube = [(red, green, blue) for red in steps for green in steps for blue in steps]
        found = {f"48;5;{16 + number}": rgb for number, rgb in enumerate(cube)}
    else:
        lights = (0.2, 0.35, 0.5, 0.65, 0.8)
        shades = [(hue / 40, light, full) for hue in range(40) for light in lights for full in (0.4, 0.9)]
        found = {"48;2;{};{};{}".format(*rgb): rgb for rgb in map(of_hls, shades)}
    return [(list(found)[at], list(found.values())[at]) for at in spread(list(found.values()))]


def standard() -> list[tuple[int, str]]:
    """The numbers of the 16 old colours but black, grey and white, and how most terminals show them."""
    return list(zip([1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14], STANDARD.split(), strict=True))


def of_hex(text: str) -> Rgb:
    red, green, blue = bytes.fromhex(text)
    return red, green, blue


def of_hls(shade: tuple[float, float, float]) -> Rgb:
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(*shade))
    return red, green, blue


def spread(colours: Sequence[Rgb]) -> list[int]:
    """An order in which each is as unlike as can be to the most similar one before it (at most 256 of them)."""
    places = np.array([seen(rgb) for rgb in colours])
    order = [len(colours) // 3]
    nearest = np.full(len(colours), np.inf)
    while len(order) < min(len(colours), 256):
        nearest = np.minimum(nearest, ((places - places[order[-1]]) ** 2).sum(1))
        order.append(int(nearest.argmax()))
    return order


def linear(rgb: Rgb) -> np.ndarray:
    part = np.array(rgb) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def luminance(rgb: Rgb) -> float:
    return float(linear(rgb) @ (0.2126, 0.7152, 0.0722))


def seen(rgb: Rgb) -> np.ndarray:
    """Where a colour lies in OKLab (Ottosson, 2020), in which distances are what the eye sees."""
    to_cones = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
    to_lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(to_lab) @ np.cbrt(np.array(to_cones) @ linear(rgb))


def visible(text: str) -> str:
    """Letters as they are; what would move the cursor, change colours or the order of letters, spelled out."""
    return "".join(letter if shown(letter) else letter.encode("unicode_escape").decode() for letter in text)


def shown(letter: str) -> bool:
    return unicodedata.category(letter) not in ("Cc", "Cs", "Zl", "Zp") and letter not in REORDERING


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, int]]:
    """(text, the index of its token): a character of several tokens belongs to the one that completes it."""
    stream, found = tokenizer.stream(), []
    for at, token in enumerate(ids):
        if text := stream.push(token):
            found.append((text, at))
    if rest := stream.finish():
        found.append((rest, len(ids) - 1))
    return found


def expert_layers(model: Transformer) -> list[int]:
    """The numbers of the layers that have experts. Raises MoeError where there are none."""
    layers = model.moe_layer_numbers(mtp=False)
    if not layers:
        raise MoeError("this model has no experts: all of its layers are dense")
    return layers


def chosen_layer(model: Transformer, layer: int | None) -> int:
    """The last layer that has experts, or the one that is asked for. Raises MoeError where that has none."""
    layers = expert_layers(model)
    if layer is not None and layer not in layers:
        raise MoeError(f"layer {layer} has no experts: {', '.join(map(str, layers))} have")
    return layers[-1] if layer is None else layer


def coloured(model: Transformer, tokenizer: Tokenizer, ids: Sequence[int], layer: int | None, paper: Paper) -> str:
    """A whole text, its ids from the one that begins it, by the experts of a layer (the last one by default), and which
    colour is whose. Raises MoeError for a layer without experts."""
    layer = chosen_layer(model, layer)
    found = trace(model, ids, alternatives=1)
    experts = found.chosen[found.layers.index(layer), :, 0].tolist()
    text = "".join(painted(piece, experts[at], paper) for piece, at in pieces(tokenizer, ids))
    written = [expert for expert, token in zip(experts, ids, strict=True) if tokenizer.token_bytes(token)]
    return f"{text}\n\n{legend(written, layer, paper)}"


def painted(text: str, expert: int, paper: Paper) -> str:
    """Line by line: a colour that goes on at a line's end would fill the terminal's width."""
    *whole, last = text.split("\n")
    end = " " if paper.colours else "\\n"
    lines = [paper.paint(visible(line) + end, expert) + "\n" for line in whole]
    return "".join(lines) + (paper.paint(visible(last), expert) if last else "")


def legend(experts: Sequence[int], layer: int, paper: Paper) -> str:
    """Who has the largest gate for how many of the tokens, the busiest first."""
    counts = sorted(((experts.count(expert), expert) for expert in set(experts)), reverse=True)
    entries = [(paper.paint(f" {expert} ", expert), f"{count / len(experts):.0%}") for count, expert in counts]
    if not paper.colours:
        entries = [(f"{expert}:", share) for (_, expert), (_, share) in zip(counts, entries, strict=True)]
    lines, room = [f"largest gate in layer {layer}, share of the tokens"], 0
    for sample, share in entries:
        size = len(re.sub("\x1b[^m]*m", "", sample)) + len(share) + 3
        if room < size:
            lines.append("")
            room = paper.width - 1
        lines[-1] += f"{sample} {share}  "
        room -= size
    return "\n".join(line.rstrip() for line in lines)


def shares(found: Trace, experts: int, width: int) -> str:
    """How the T tokens were shared among the E experts of every MoE layer."""
    lines = []
    for layer, chosen in zip(found.layers, found.chosen, strict=True):
        counts = np.bincount(chosen.flatten().numpy(), minlength=experts)
        busiest = np.argsort(-counts, kind="stable")[:MOST_LISTED] if experts > MOST_LISTED else range(experts)
        listed = "  ".join(f"{expert}:\xa0{counts[expert] / counts.sum():.0%}" for expert in busiest)
        if experts > MOST_LISTED:
            listed += f"  and {(counts > 0).sum() - len(busiest)} more; {(counts == 0).sum()} got nothing"
        name = f"layer {layer:<3} "
        lines.append(textwrap.fill(listed, width - 1, initial_indent=name, subsequent_indent=" " * len(name)))
    return "\n".join(lines).replace("\xa0", " ")
