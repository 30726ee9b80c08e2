"""Ten small experiments: one thing changed in preset tiny, what came of it, and whether it comes out again.

Each is a minute's training beside the same one without the change. What is said of it was written down after looking,
and holds for this size and this length. Most of it is about balance, which a single run shows clearly. Losses may come
CHANCE apart when nothing is changed but the seed, so those that are nearer than that are called even.
"""

import json
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe.lab.bench import line
from moe.lab.experiment_runs import ExperimentError
from moe.lab.studies import Changes, flags
from moe.machine.nearest import instead_of
from moe.metrics import Record

STEPS = 300
CHANCE = 0.02  # nats per character
BASELINE = "baseline"
PUBLISHED = Path(__file__).parent / "results" / "experiments.json"  # what `--json` printed
Section = Literal["Curves", "Balance", "Experts", "Text", "Cost"]
Figures = Mapping[str, Any]  # see experiment_runs.figures_of


@dataclass(frozen=True)
class Claim:
    says: str
    holds: Callable[[Figures, Figures], bool]  # given the figures of the experiment, and of the baseline


@dataclass(frozen=True)
class Experiment:
    changes: Changes
    look: Section  # of the run's report.html
    lesson: str
    claims: tuple[Claim, ...]

    def flags(self) -> str:
        """What follows `python train.py --steps N`."""
        return " ".join(flags("tiny", self.changes)[2:])


def worse(run: Figures, base: Figures) -> float:
    """By how many nats per character."""
    return run["nats_per_character"] - base["nats_per_character"]


def ratio(name: str, run: Figures, base: Figures) -> float:
    return run[name] / base[name]


def experiments() -> dict[str, Experiment]:
    """The bounds of the claims lie well away from what was found, for chance and for another machine's rounding."""
    even = Claim(f"within {CHANCE} nats of the baseline", lambda run, base: abs(worse(run, base)) < CHANCE)
    balanced = Claim("MaxVio below 0.5", lambda run, base: run["max_vio"] < 0.5)
    none_dead = Claim("no expert is dead", lambda run, base: run["dead_experts"] == 0)
    alike = Claim(
        "a balance loss below 1.025, where the baseline's is above",
        lambda run, base: run["balance_loss"] < 1.025 < base["balance_loss"],
    )
    cheaper = Claim("at least a tenth fewer operations", lambda run, base: ratio("flops_per_token", run, base) < 0.9)
    no_bias: Changes = {"model.bias_update_speed": 0.0}
    one: Changes = {"model.num_experts_per_tok": 1}
    return {
        BASELINE: Experiment({}, "Curves", "", ()),
        "no-balancing": Experiment(
            {**no_bias, "model.aux_loss_alpha": 0.0},
            "Balance",
            "The busiest expert does three times its share of the work. Yet none dies, and the loss is the same: what "
            "imbalance costs at this size is time, where experts lie on several devices, and not quality.",
            (
                even,
                none_dead,
                Claim(
                    "MaxVio above 1.5, thrice the baseline's",
                    lambda run, base: run["max_vio"] > 1.5 > 3 * base["max_vio"],
                ),
            ),
        ),
        "strong-loss": Experiment(
            {**no_bias, "model.aux_loss_alpha": 1.0},
            "Experts",
            "The balance loss alone, at ten thousand times its weight, balances as well as the bias does. It makes all "
            "scores alike and falls to 1.00, perfect balance. What it is feared for, a worse language model, does not "
            "show.",
            (even, balanced, alike),
        ),
        "fast-bias": Experiment(
            {"model.bias_update_speed": 0.3},
            "Balance",
            "The bias moves in steps as large as the scores: whoever was idle gets everything in the next step, MaxVio "
            "stays near 3, the most there is, and each step leaves some other number of experts without a token. The "
            "balance loss, which looks at scores without the bias, sees nothing of it. The price is low.",
            (
                alike,
                Claim("MaxVio of the batches above 2", lambda run, base: run["batch_max_vio"] > 2),
                Claim("another number of dead experts with each step", lambda run, base: run["change_of_dead"] > 1),
                Claim("worse by less than 0.1 nats", lambda run, base: worse(run, base) < 0.1),
            ),
        ),
        "one-expert": Experiment(
            one,
            "Experts",
            "A single gate, divided by the sum of the gates, is 1 whatever the score: nothing of the language model's "
            "loss reaches the router. All that it learns is to make the balance loss 1.00. With a seventh fewer "
            "operations that costs less than one would think.",
            (alike, cheaper, Claim("worse by less than 0.05 nats", lambda run, base: worse(run, base) < 0.05)),
        ),
        "one-expert-raw": Experiment(
            {**one, "model.norm_topk_prob": False},
            "Experts",
            "The gate is the score itself, so the router learns again, and scores are not alike. With a seventh fewer "
            "operations tiny is as good as with two experts.",
            (even, cheaper, Claim("a balance loss above 1.025", lambda run, base: run["balance_loss"] > 1.025)),
        ),
        "frozen-router": Experiment(
            {"optim.router_lr": 1e-12},
            "Text",
            "A router that keeps its random weights, beside a bias that evens out the load, does as well as one that "
            "learns: at this size it hardly matters who gets which token.",
            (even, balanced),
        ),
        "all-experts": Experiment(
            {"model.num_experts_per_tok": 8},
            "Cost",
            "Every token goes to all eight experts, for nearly twice the operations, and nothing comes of it: choosing "
            "two was no sacrifice.",
            (
                even,
                Claim("MaxVio 0", lambda run, base: run["max_vio"] == 0),
                Claim("1.5 times the operations or more", lambda run, base: ratio("flops_per_token", run, base) > 1.5),
            ),
        ),
        "dense": Experiment(
            {"model.first_k_dense_replace": 4},
            "Curves",
            "No experts, half the parameters, the operations of before: a little worse at most. So few characters do "
            "not ask for more parameters; a hundred times as many do (`python -m moe.lab study moe-vs-dense --show`).",
            (
                Claim("worse by less than 0.05 nats", lambda run, base: worse(run, base) < 0.05),
                Claim("about half the parameters", lambda run, base: ratio("parameters", run, base) < 0.6),
                Claim("the same operations", lambda run, base: 0.95 < ratio("flops_per_token", run, base) < 1.05),
            ),
        ),
        "adamw": Experiment(
            {"optim.matrix_optimizer": "adamw", "optim.adam_lr": 0.003},
            "Curves",
            "No change of the router comes near this one: AdamW instead of Muon for the matrices, at one of the best "
            "rates of those that were tried for it (`study optimizer`), is far behind.",
            (Claim("worse by more than 0.07 nats", lambda run, base: worse(run, base) > 0.07),),
        ),
        "second-token": Experiment(
            {"model.num_nextn_predict_layers": 1},
            "Curves",
            "A module predicts the token after the next, for a third more operations, and the loss is no higher for "
            "it, if not lower. The module's own is no higher either: it is told the token in between, so it guesses a "
            "next one too.",
            (
                Claim(f"worse by less than {CHANCE} nats", lambda run, base: worse(run, base) < CHANCE),
                Claim(
                    "at least a quarter more operations", lambda run, base: ratio("flops_per_token", run, base) > 1.25
                ),
                Claim("its own loss no higher than the main one", lambda run, base: run["mtp_loss"] < run["loss"]),
            ),
        ),
    }


def asked_for(names: Iterable[str], steps: int) -> dict[str, Changes]:
    """The baseline, and what is named, or everything; its fields that differ from preset tiny."""
    known = experiments()
    if unknown := [name for name in names if name not in known]:
        raise ExperimentError(f"there is no experiment {unknown[0]!r}: {instead_of(unknown[0], known)}")
    return {name: {"steps": steps, **known[name].changes} for name in {BASELINE: None, **dict.fromkeys(names or known)}}


def published(asked: Iterable[str]) -> list[Record]:
    stored = {row["experiment"]: row for row in json.loads(PUBLISHED.read_text("utf-8"))["experiments"]}
    return [stored[name] for name in asked]


def broken_claims(name: str, figures: Figures, base: Figures) -> list[str]:
    return [claim.says for claim in experiments()[name].claims if not claim.holds(figures, base)]


def summarize(made: list[Record]) -> Record:
    """What `--json` prints. The first is the baseline."""
    rows, base = [], made[0]
    for run in made:
        experiment, name = experiments()[run["experiment"]], run["experiment"]
        told = {"flags": experiment.flags(), "look": experiment.look, "lesson": experiment.lesson}
        claims = {"claims": [claim.says for claim in experiment.claims]}
        rows.append(run | told | claims | {"broken": broken_claims(name, run["figures"], base["figures"])})
    return {"steps": base["changes"]["steps"], "experiments": rows}


def as_described(summary: Record) -> bool:
    return not any(row["broken"] for row in summary["experiments"])


def in_words(summary: Record) -> str:
    return "\n".join((table(summary), "", lessons(summary), "", *verdicts(summary)))


def table(summary: Record) -> str:
    """In Markdown."""
    given = f"`python train.py --steps {summary['steps']}` with"
    columns: dict[str, Callable[[Record], str]] = {
        "experiment": lambda row: row["experiment"],
        given: lambda row: f"`{row['flags']}`" if row["flags"] else "nothing else",
        "nats per character": lambda row: f"{row['figures']['nats_per_character']:.3f}",
        "MaxVio": lambda row: "" if row["figures"]["max_vio"] is None else f"{row['figures']['max_vio']:.2f}",
        "dead": lambda row: "" if row["figures"]["max_vio"] is None else str(row["figures"]["dead_experts"]),
        "look at": lambda row: row["look"],
    }
    rows = [line(columns), line(["---"] * len(columns))]
    return "\n".join(rows + [line(cell(row) for cell in columns.values()) for row in summary["experiments"]])


def lessons(summary: Record) -> str:
    told = (f"- **{row['experiment']}**: {row['lesson']}" for row in summary["experiments"] if row["lesson"])
    return "\n".join(map(wrapped, told))


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def verdicts(summary: Record) -> list[str]:
    """One line an experiment, and what the figures were made on."""
    rows = [row for row in summary["experiments"] if row["claims"]]
    width = max((len(row["experiment"]) for row in rows), default=0)
    said = []
    for row in rows:
        verdict = f"not as described: {'; '.join(row['broken'])}" if row["broken"] else "as described"
        said.append(f"{row['experiment']:{width}}  {verdict}")
    if summary["steps"] != STEPS:
        said.append(f"The claims are those of {STEPS} steps.")
    machines = {f"{row['machine']}, {row['dtype']}, torch {row['versions']['torch']}" for row in summary["experiments"]}
    return [*said, f"On {'; '.join(sorted(machines))}."]
