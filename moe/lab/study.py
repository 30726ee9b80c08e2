"""A study as it is asked for, and as it is answered: a table in Markdown, and what has to be said below it.

Read studies.py for what there is to ask, study_training.py and study_runs.py for how the runs are made, and
study_summary.py for what is made of them.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.lab.bench import line
from moe.lab.studies import Budget, Study, StudyError, studies
from moe.lab.study_runs import RESULTS, Results, read_results
from moe.lab.study_summary import CLEAR, FEWEST
from moe.machine.cost import readable
from moe.machine.nearest import instead_of

PUBLISHED = Path(__file__).parent / "results"  # a study's results.json, kept here as NAME.json
Summary = dict[str, Any]
Cell = Callable[[Summary], str]


def listing() -> str:
    known = studies()
    width = max(map(len, known))
    return "\n".join(f"{name:{width}}  {study.question}" for name, study in known.items())


def asked_for(name: str, minutes: float | None, steps: int | None, data: str | None) -> Study:
    """A study of the table, its budget or its text changed."""
    known = studies()
    if name not in known:
        raise StudyError(f"there is no study {name!r}: {instead_of(name, known)}")
    if minutes is not None and steps is not None:
        raise StudyError("--minutes and --steps exclude each other: give the length that shall count")
    study = known[name]
    if minutes is not None or steps is not None:
        study = replace(study, budget=Budget(minutes, steps))
    return replace(study, common={**study.common, "data.source": data}) if data else study


def published_or_made(name: str, folder: Path) -> Results:
    """The study's own folder first, then what comes with this program."""
    for path in (folder / RESULTS, PUBLISHED / f"{name}.json"):
        if path.exists():
            results = read_results(path)
            if results.study != name:
                raise StudyError(f"{path} holds the study {results.study}: ask for that, or choose another --out")
            return results
    raise StudyError(f"there are no results in {folder}, and none are published: leave --show out to make them")


def in_words(summary: Summary) -> str:
    return "\n".join((summary["question"], "", table(summary), "", *notes(summary)))


def with_error(estimate: Summary | None, form: str = ".4f") -> str:
    """Mean ± standard error; nothing for nothing."""
    if estimate is None:
        return ""
    error = estimate["standard_error"]
    return f"{estimate['mean']:{form}}" + (f" ± {error:{form.lstrip('+')}}" if error is not None else "")


def table(summary: Summary) -> str:
    arms = summary["arms"]
    columns: dict[str, Cell] = {
        summary["study"]: lambda arm: arm["arm"],
        "active": lambda arm: readable(arm["active"]),
        "steps": lambda arm: f"{arm['steps']:,.0f}",
        "a step": lambda arm: f"{1000 * arm['step_seconds']:,.0f} ms",
        "bits per byte": lambda arm: with_error(arm["bits_per_byte"]),
    }
    if len(arms) > 1:
        columns |= {
            f"against {arms[0]['arm']}": lambda arm: with_error(arm.get("difference"), "+.4f"),
            "ratio": lambda arm: f"{arm['ratio']:.4f}" if "ratio" in arm else "",
            "verdict": lambda arm: arm.get("verdict", ""),
        }
    if any("max_vio" in arm for arm in arms):
        columns["MaxVio"] = lambda arm: with_error(arm.get("max_vio"), ".2f")
        columns["dead"] = lambda arm: f"{arm['dead_experts']:.1f}" if "dead_experts" in arm else ""
    rows = [line(columns), line(["---"] * len(columns))]
    return "\n".join(rows + [line(cell(arm) for cell in columns.values()) for arm in arms])


def notes(summary: Summary) -> list[str]:
    """Below the table."""
    split = {"val": "validation", "test": "test"}[summary["split"]]
    budget, seeds = Budget(**summary["budget"]), len(summary["seeds"])
    trained = f"{budget} of training on {summary['data']}, {seeds} seed{'s' * (seeds > 1)}"
    if summary["together"]:
        trained += ", the arms of a seed at the same time, each on its share of the cores"
    said = [f"{trained}; bits per byte of the whole {split} split, mean ± standard error; lower is better."]
    if len(summary["arms"]) > 1:
        said.append(
            f"Differences are paired by seed; ahead or behind takes {FEWEST} seeds or more and a mean difference above "
            f"{CLEAR} of its standard errors."
        )
    else:
        said.append(f"{with_error(summary['arms'][0]['nats_per_character'])} nats per character.")
    for arm in summary["arms"]:
        said += race_note(arm, summary["arms"][0]["arm"]) + setting_note(arm)
    said.append(f"On {'; '.join(summary['machines'])}; torch {summary['versions']['torch']}.")
    return said


def race_note(arm: Summary, first: str) -> list[str]:
    if (race := arm.get("race")) is None:
        return []
    price = f"the validation price that {first} ends with"
    came = f"does not come to {price} in this time"
    if race["reached"] is not None:
        came = f"comes to {price} after {race['reached']:.0%} of the time"
    return [
        f"{arm['arm']} {came} (median of the seeds). Its steps "
        f"take {race['step_seconds']:.2f} times as long; it sees {race['tokens']:.2f} times the tokens with "
        f"{race['flops']:.2f} times the operations."
    ]


def setting_note(arm: Summary) -> list[str]:
    if (setting := arm["setting"]) is None:
        return []
    values = ", ".join(f"{name.split('.')[-1]} {value:g}" for name, value in setting["best"].items())
    edge = f"; {', '.join(setting['at_the_edge'])} at the edge of what was tried" if setting["at_the_edge"] else ""
    tried = f"the best of {setting['tried']} settings tried at another seed for {Budget(**setting['budget'])}"
    return [f"{arm['arm']}: {values}, {tried}{edge}."]
