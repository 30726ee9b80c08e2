"""How a run compares with the reference runs of its preset, in words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe.checkpoint import folder_of, newest_run
from moe.config import RunConfig
from moe.lab.report.history import History
from moe.lab.report.reference import Reference, differences, reference_of, rows_of

LABELS = {"train_nats_per_character": "training loss", "val_nats_per_character": "validation loss", "max_vio": "MaxVio"}
TOLERATED = 0.1  # of the places, which lie outside the band by chance; not the last ones
LAST = 2  # places that have to lie within it
TOO_GOOD = 0.9  # of the reference's loss: no setting that is the same makes so much of a difference


@dataclass(frozen=True)
class Verdict:
    """How a run compares. `fine` is None where there is nothing to compare it with."""

    fine: bool | None
    headline: str
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Remark:
    text: str
    worse: bool = True


def check_run(path: Path | None) -> Verdict:
    """Of a run's folder, or a checkpoint's; None: the newest run."""
    folder, _ = folder_of(path or newest_run())
    config, _, data = folder.read_setup()
    return judge(config, History.read(folder.metrics), reference_of(config.preset), data.get("text", ""))


def judge(config: RunConfig, history: History, reference: Reference | None, text: str) -> Verdict:
    """Whether the run's curves are those of its preset, and what is off. text: the hash of what it was trained on."""
    if not len(history):
        return Verdict(None, "There is no curve: this run has not been trained here.")
    troubles = [remark.text for remark in trouble(history)]
    if reference is None:
        return Verdict(None, f"There are no reference curves of preset {config.preset}.", troubles)
    changed = differences(config, reference.config)
    if changed := changed + ["another text"] * (text != reference.about["text"]):
        what = f"{', '.join(changed[:4])}{' and others' if len(changed) > 4 else ''}"
        headline = f"Not comparable with the reference runs of {reference.preset}, which differ: {what}."
        return Verdict(None, headline, troubles)
    rows = rows_of(history, reference.stride)
    compared = [step for step in reference.steps if step in rows]
    if not compared:
        return Verdict(None, f"Too early to say: the reference runs are compared every {reference.stride} steps.")
    remarks = [*departures(rows, reference, compared), *trouble(history)]
    place = "" if compared[-1] == reference.steps[-1] else f" so far (step {compared[-1]} of {reference.steps[-1]})"
    band = f"the band of {number_word(len(reference.seeds))} reference runs of {reference.preset}{place}"
    worse = any(remark.worse for remark in remarks)
    place = "Outside" if worse else "Better than" if remarks else "Within"
    return Verdict(not worse, f"{place} {band}.", [remark.text for remark in remarks])


def departures(
    rows: Mapping[int, Mapping[str, float]], reference: Reference, compared: Sequence[int]
) -> Iterator[Remark]:
    """A remark for each curve that leaves its band, for a while or at the end."""
    for name, label in LABELS.items():
        ours = {step: rows[step][name] for step in compared if not np.isnan(rows[step][name])}
        band = {step: row for step, row in reference.band(name).items() if step in ours}
        above = [step for step, row in band.items() if ours[step] > row["high"]]
        below = [step for step, row in band.items() if ours[step] < row["low"]]
        if matter(above, list(band), 1 if name == "val_nats_per_character" else LAST):
            what = f"The {label} is too high {places(above, ours, reference, name)}"
            yield Remark(f"{what} {advice(name, above[0], compared)}")
        elif name == "max_vio" or not matter(below, list(band), LAST):
            continue
        elif ours[below[-1]] < TOO_GOOD * band[below[-1]]["mean"]:
            what = f"The {label} is too low to be true {places(below, ours, reference, name)}"
            yield Remark(f"{what} Does the model see what it is to predict, or is the text another one?")
        else:
            yield Remark(f"The {label} is below the band {places(below, ours, reference, name)}", worse=False)


def matter(outside: Sequence[int], all_of: Sequence[int], last: int) -> bool:
    """Whether so many places are too many, or those at the end are among them."""
    return bool(outside) and (len(outside) > TOLERATED * len(all_of) or set(all_of[-last:]) <= set(outside))


def places(outside: Sequence[int], ours: Mapping[int, float], reference: Reference, name: str) -> str:
    step = outside[-1]
    return (
        f"at {len(outside)} of {len(ours)} places, first at step {outside[0]}; at step {step} it is {ours[step]:.3f}, "
        f"in the reference runs {reference.band(name)[step]['mean']:.3f}."
    )


def advice(name: str, first: int, compared: Sequence[int]) -> str:
    if name == "max_vio":
        return "Routing is less even than it should be: look at the load of each expert."
    if first <= compared[0]:
        return "It was so from the start: look at the text, the tokenizer and the versions of what is installed."
    return "Look at what happened there: the gradient norm, the load of the experts, steps that were left out."


def trouble(history: History) -> Iterator[Remark]:
    """What is wrong with a run whatever its settings."""
    if lost := int((history["skipped"] > 0).sum()):
        yield Remark(f"{counted(lost, 'step was', 'steps were')} left out because something was not finite.")
    evaluated = history.evaluated
    if len(evaluated) > 1:
        same = evaluated["val_tokens"] == evaluated.last["val_tokens"]
        prices, steps = evaluated["val_nats_per_character"][same], evaluated["step"][same]
        if len(prices) > 1 and prices[-1] > 1.01 * prices.min():
            yield Remark(
                f"Validation was best at step {int(steps[prices.argmin()])} and has become worse since, "
                f"{prices.min():.3f} to {prices[-1]:.3f} nats per character: the text is being learnt by heart."
            )
    if dead := history.last.get("val_dead_experts"):
        yield Remark(f"{counted(dead, 'expert', 'experts')} got no token in the last evaluation.")


def counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def number_word(number: int) -> str:
    return dict(enumerate(("no", "one", "two", "three", "four", "five"))).get(number, str(number))
