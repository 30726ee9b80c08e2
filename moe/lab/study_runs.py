"""Running a study: one training after another, each kept as a few numbers as soon as it ends.

First, where arms have several settings to try, the sweep: every setting of every arm once, at a seed that is not used
again; the best by validation loss is the arm's. Then the trainings that count, seed by seed, the arms in turns or at
the same time: a slow hour of the machine meets all of them alike.

What is left to do follows from what is stored, so a study that is killed goes on when the same command is given again.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moe.config import require
from moe.lab.studies import Arm, Budget, Study, StudyError, configure
from moe.lab.study_training import Diverged, Job, Outcome, Stage, Trainer
from moe.machine.device import resolve_device
from moe.machine.files import write_whole
from moe.machine.parsing import to_dict
from moe.machine.reproduce import versions
from moe.metrics import Record

SWEEP_SEED = 0  # those that count are 1, 2, ...
POINTS, ALL_POINTS = 60, 600  # of a curve, of all curves of a study, at most: a results file is for keeping
RESULTS = "results.json"
FINALS = [
    "parameters",
    "active",
    "flops_per_token",
    "steps",
    "tokens",
    "seconds",
    "val_bits_per_byte",
    "val_nats_per_character",
]
CURVE = ["tokens", "seconds", "flops", "val_bits_per_byte"]
LARGEST = 1e30  # of all numbers in a results file


@dataclass(frozen=True)
class Results:
    """A study's file. A run: arm, setting, seed, machine, finals and curve; or `diverged` instead of the last two."""

    study: str
    protocol: Mapping[str, Any]  # what makes two runs comparable
    versions: Mapping[str, str]
    data: Mapping[str, str] | None = None
    sweep: tuple[Record, ...] = ()
    finals: tuple[Record, ...] = ()

    def best(self) -> dict[str, int]:
        """The setting of each arm that the sweep found best."""
        losses: dict[str, dict[float, int]] = {}
        for run in self.sweep:
            if "finals" in run:
                losses.setdefault(run["arm"], {})[run["finals"]["val_bits_per_byte"]] = run["setting"]
        return {arm: found[min(found)] for arm, found in losses.items()}

    def write(self, path: Path) -> None:
        """A line for each run."""
        parts = []
        for name, value in asdict(self).items():
            runs = name in ("sweep", "finals")
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if runs else json.dumps(value)
            parts.append(f"{json.dumps(name)}: {text}")
        write_whole(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def read_results(path: Path) -> Results:
    try:
        stored = json.loads(path.read_text("utf-8"))
        results = Results(**stored | {stage: tuple(stored[stage]) for stage in ("sweep", "finals")})
        check(results)
        return results
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StudyError(f"{path} holds no results of a study ({type(error).__name__}: {error})") from None


def check(results: Results) -> None:
    """Raises whatever error the first thing makes that a summary could not be made of."""
    protocol = results.protocol
    tries = {arm["arm"]: arm["tries"] for arm in protocol["arms"]}
    texts = [results.study, results.versions["torch"], protocol["base"]["data"]["source"], *tries]
    texts += [run["machine"] for run in results.finals]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a name is no text")
    for budget in (protocol["budget"], protocol.get("sweep", protocol["budget"])):
        str(Budget(**budget))
    for settings in tries.values():
        check_numbers([each[name] for each in settings for name in settings[0]], least=-LARGEST)
    for run in (*results.sweep, *results.finals):
        _ = tries[run["arm"]][run["setting"]].items()
        check_numbers([run["setting"], run["seed"]])
    check_numbers([run["finals"]["val_bits_per_byte"] for run in results.sweep if "finals" in run])
    for run in results.finals:
        finals, curve = run["finals"], run["curve"]
        check_numbers([finals[name] for name in FINALS], least=1e-9)
        check_numbers([value for name, value in finals.items() if name not in FINALS and value is not None])
        check_numbers([value for name in CURVE for value in curve[name]])
        if not 0 < len(curve["seconds"]) == min(len(curve[name]) for name in CURVE) == max(map(len, curve.values())):
            raise ValueError("a curve's columns must be of one length")
        if "test_bits_per_byte" in finals:
            check_numbers([finals[f"test_{name}"] for name in ("bits_per_byte", "nats_per_character")], least=1e-9)
        if finals["val_max_vio"] is not None:
            check_numbers([finals["val_dead_experts"]])


def check_numbers(values: Iterable[Any], least: float = 0.0) -> None:
    for value in values:
        if type(value) not in (int, float) or not least <= value <= LARGEST:
            raise ValueError(f"{value!r} is no number, or out of bounds")


def protocol_of(study: Study) -> dict[str, Any]:
    """All that a run's meaning depends on, but for the seeds: more of them may be added later."""
    base = to_dict(configure(study.preset, {**study.common, **study.budget.changes()}))
    base["data"]["source"] = Path(base["data"]["source"]).name  # where the text lies is no part of what it is
    arms = [{"arm": arm.name, "changes": dict(arm.changes), "tries": list(map(dict, arm.tries))} for arm in study.arms]
    budgets = {"budget": study.budget} | ({"sweep": study.sweep} if study.sweep else {})
    together = {"together": True} if study.together else {}
    lengths = {
        kind: {name: value for name, value in asdict(budget).items() if value} for kind, budget in budgets.items()
    }
    return json.loads(json.dumps({**lengths, **together, "arms": arms, "base": base}))  # as it will be read


def budget_of(study: Study, stage: Stage) -> Budget:
    return study.sweep or study.budget if stage == "sweep" else study.budget


def job(study: Study, stage: Stage, arm: Arm, setting: int, seed: int) -> Job:
    changes = {**study.common, **arm.changes, **arm.tries[setting], **budget_of(study, stage).changes(), "seed": seed}
    return Job(stage, arm.name, setting, seed, study.preset, changes)


def in_turns(arms: tuple[Arm, ...], number: int) -> tuple[Arm, ...]:
    """Another one begins each time."""
    first = number % len(arms)
    return arms[first:] + arms[:first]


def sweep_jobs(study: Study) -> list[Job]:
    most = max(len(arm.tries) for arm in study.arms)
    turns = ((setting, arm) for setting in range(most) for arm in in_turns(study.arms, setting))
    return [job(study, "sweep", arm, at, SWEEP_SEED) for at, arm in turns if at < len(arm.tries) > 1]


def final_jobs(study: Study, best: Mapping[str, int], seeds: int) -> list[Job]:
    turns = ((seed, arm) for seed in range(1, seeds + 1) for arm in in_turns(study.arms, seed - 1))
    return [job(study, "final", arm, best.get(arm.name, 0), seed) for seed, arm in turns]


def keys(runs: Iterable[Record]) -> set[tuple[str, int, int]]:
    return {(run["arm"], run["setting"], run["seed"]) for run in runs}


def left_to_do(study: Study, results: Results, seeds: int) -> list[list[Job]]:
    """In order, those together that are trained at the same time; as long as there is a sweep to make, that alone."""
    sweep = [each for each in sweep_jobs(study) if each.key not in keys(results.sweep)]
    if sweep:
        return grouped(study, sweep)
    best = results.best()
    lost = [arm.name for arm in study.arms if len(arm.tries) > 1 and arm.name not in best]
    if lost:
        raise StudyError(f"{results.study}: no setting of {lost[0]} came to an end: try lower learning rates")
    return grouped(study, [each for each in final_jobs(study, best, seeds) if each.key not in keys(results.finals)])


def grouped(study: Study, jobs: list[Job]) -> list[list[Job]]:
    """The arms of a seed, or of a number among their settings, where they are trained at the same time."""
    if not study.together:
        return [[job] for job in jobs]
    return [list(group) for _, group in groupby(jobs, lambda job: job.setting if job.stage == "sweep" else job.seed)]


def run_study(
    name: str, study: Study, out: Path, seeds: int, trainer: Trainer, say: Callable[[str], None] = lambda line: None
) -> Results:
    """Make what is missing of the study in its folder, and return all of it. Raises StudyError where the folder holds
    a study made otherwise."""
    require(seeds > 0, f"--seeds {seeds} must be greater than 0")
    if resolve_device(configure(study.preset, study.common).device)[0] != "cpu":
        study = replace(study, together=False)
    out.mkdir(parents=True, exist_ok=True)
    path, trainings = out / RESULTS, seeds * len(study.arms)
    points = max(min(POINTS, ALL_POINTS // trainings), 10)
    try:
        with FileLock(out / ".lock", timeout=0):
            results = open_results(name, study, path)
            total = len(sweep_jobs(study)) + trainings
            while groups := left_to_do(study, results, seeds):
                jobs, budget = groups[0], budget_of(study, groups[0][0].stage)
                number = len(results.sweep) + len(results.finals) + 1
                say(f"{number} of {total}  {' and '.join(job.name for job in jobs)}, {budget}")
                outcomes = trainer(jobs, out, budget)
                check_data(results, jobs, outcomes, out)
                for job, outcome in zip(jobs, outcomes, strict=True):
                    results = with_one_more(results, job, outcome, points)
                results.write(path)
            return results
    except Timeout:
        raise StudyError(f"{out} is in use by another process: wait for it, or choose another --out") from None


def check_data(results: Results, jobs: list[Job], outcomes: list[Outcome | Diverged], out: Path) -> None:
    if results.data is None or all(isinstance(one, Diverged) or one.data == results.data for one in outcomes):
        return
    for job in jobs:
        shutil.rmtree(out / job.name, ignore_errors=True)  # or it would be found finished
    raise StudyError(f"{out} began with another text or tokenizer: give that one, or choose another --out")


def with_one_more(results: Results, job: Job, outcome: Outcome | Diverged, points: int) -> Results:
    """The results with this training's; a sweep may meet one that diverges."""
    run: Record = {"arm": job.arm, "setting": job.setting, "seed": job.seed}
    if isinstance(outcome, Diverged):
        if job.stage == "final":
            raise outcome
        return replace(results, sweep=(*results.sweep, run | {"diverged": str(outcome)}))
    results = replace(results, data=dict(outcome.data))
    run |= {"machine": outcome.machine, "finals": dict(outcome.finals)}
    if job.stage == "sweep":
        return replace(results, sweep=(*results.sweep, run))
    run["curve"] = {column: thin(values, points) for column, values in outcome.curve.items()}
    return replace(results, finals=(*results.finals, run))


def open_results(name: str, study: Study, path: Path) -> Results:
    protocol = protocol_of(study)
    if not path.exists():
        strange = [other.name for other in path.parent.iterdir() if other.is_dir()]
        if strange:
            raise StudyError(f"{path.parent} holds {strange[0]}, which is no part of this study: choose another --out")
        results = Results(name, protocol, versions())
        results.write(path)
        return results
    results = read_results(path)
    if (results.study, results.protocol) != (name, protocol):
        changed = differing(results.protocol, protocol) or "name"
        raise StudyError(f"{path} began with another {changed}: go on as it began, or choose another --out")
    if changed := differing(packages(results.versions), packages(versions())):
        raise StudyError(f"{path} began with another {changed}: go on with that one, or choose another --out")
    return results


def packages(found: Mapping[str, str]) -> dict[str, str]:
    """Without this program's own revision, since most of its changes change no training."""
    return {name: version for name, version in found.items() if name != "git"}


def differing(old: Any, new: Any) -> str:
    """The dotted name of the first part in which two protocols differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return ""
    found = (name for name in {**new, **old} if old.get(name) != new.get(name))
    return next((f"{name}.{differing(old.get(name), new.get(name))}".rstrip(".") for name in found), "")


def thin(values: list[float], points: int) -> list[float]:
    """Evenly, the first and the last among them."""
    if len(values) <= points:
        return values
    return [values[round(at * (len(values) - 1) / (points - 1))] for at in range(points)]
