"""Looking and measuring.

python -m moe.lab score out/tiny text.txt   what a text costs under a model
python -m moe.lab bench layer               a mixture of experts against a dense layer
python -m moe.lab bench step                a training step of one preset against another's
python -m moe.lab bench decode              writing, against transformers
python -m moe.lab study                     the studies there are; with a NAME, one of them
python -m moe.lab experiments               one thing changed in tiny, ten times, a minute each
python -m moe.lab report out/tiny           a page with a run's curves, its experts, and a text coloured by them
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import tyro

import moe
from moe.lab import experiments, study
from moe.lab.bench_decode import DecodeBench
from moe.lab.bench_layer import LayerBench
from moe.lab.bench_step import StepBench
from moe.lab.experiment_runs import run_experiments
from moe.lab.report.make import make_report, text_at_hand
from moe.lab.report.reference import write_reference
from moe.lab.report.verdict import check_run
from moe.lab.score import Windows, score
from moe.lab.study_plots import draw_study
from moe.lab.study_runs import run_study
from moe.lab.study_summary import summarize
from moe.lab.study_training import train
from moe.machine.command import run_commands
from moe.machine.device import Dtype

BENCHES = {"layer": LayerBench, "step": StepBench, "decode": DecodeBench}


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise moe.MoeError(f"{path}: {error.strerror}") from None


def score_command(
    run: tyro.conf.Positional[Path],
    file: tyro.conf.Positional[Path],
    windows: Windows = "overlapping",
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Price every byte of a file from the bytes before it.

    Args:
        run: A run's folder.
        file: Any file; what is not UTF-8 is priced byte by byte.
        windows: How a long text is cut. overlapping: every token but the first window's sees at least half a window, of
            at most 4,096 tokens. separate: windows side by side, as training's validation has them.
        dtype: Of the weights and of all products; bfloat16 takes half the memory.
        json: Print one JSON object.
    """
    result = score(moe.load(run, dtype=dtype), read_bytes(file), windows).to_json()
    if json:
        print(as_json(result))
    else:
        for name in ("nats_per_character", "bits_per_byte", "nats_per_token"):
            print(f"{result[name]:>12.4f} {name.replace('_', ' ')}")
        for name in ("characters", "bytes", "tokens"):
            print(f"{result[name]:>12,} {name}")


def study_command(
    name: tyro.conf.Positional[str] = "",
    seeds: int | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    data: str | None = None,
    out: Path | None = None,
    show: bool = False,
    json: bool = False,
) -> None:
    """Train the arms of an experiment with several seeds, and compare them. Goes on after a kill.

    Args:
        name: Which study; without one they are listed.
        seeds: How many; more of them may be asked for later.
        minutes: Of the training clock, for each training that counts; a sweep before them keeps its length.
        steps: For each of them, instead of minutes.
        data: Another text than the study's.
        out: Its folder; out/studies/NAME by default.
        show: Train nothing; of a study without a folder, what is published with this program.
        json: Print one JSON object.
    """
    if not name:
        return print(study.listing())
    folder = out or Path("out/studies") / name
    asked = study.asked_for(name, minutes, steps, data)
    if show:
        results = study.published_or_made(name, folder)
    else:
        results = run_study(name, asked, folder, asked.seeds if seeds is None else seeds, train, progress)
    summary = summarize(results, asked)
    print(as_json(summary) if json else study.in_words(summary))
    progress(f"picture {draw_study(results, asked, folder)}")


def report_command(
    run: tyro.conf.Positional[Path | None] = None,
    text: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    check: bool = False,
    rate: float | None = None,
    json: bool = False,
) -> None:
    """Write a run's report.html: its curves, its balance, its experts, a text coloured by them, and what it cost.

    Args:
        run: A run's folder, or a checkpoint's; by default the newest run.
        text: A further file to colour by expert; may be given several times.
        check: Write nothing; compare the curves with the reference runs of the preset and say what is off. The exit
            status is 1 where something is.
        rate: Dollars that an hour of the machine costs, for the price of the run.
        json: With --check, print one JSON object.
    """
    if check and (text or rate is not None):
        raise moe.MoeError("--check writes no page: leave out --text and --rate")
    if json and not check:
        raise moe.MoeError("--json goes with --check: a report is a page")
    if check:
        verdict = check_run(run)
        print(as_json(asdict(verdict)) if json else "\n".join((verdict.headline, *verdict.remarks)))
        sys.exit(0 if verdict.fine is not False else 1)
    if rate is not None and not 0 <= rate < 1e9:
        raise moe.MoeError(f"--rate {rate} must be dollars an hour")
    opened = moe.load(run)
    folder = opened.checkpoint.parent.parent
    alike = len({path.name for path in text}) < len(text)
    given = {str(path) if alike else path.name: read_bytes(path) for path in text}
    print(make_report(folder, opened, text_at_hand(opened, folder), given, rate))


def reference_command(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Make the runs of a preset, one for each seed, its reference in this program.

    Args:
        runs: Their folders.
    """
    print(write_reference(runs))


def experiments_command(
    names: tyro.conf.Positional[tuple[str, ...]] = (),
    steps: int = experiments.STEPS,
    out: Path = Path("out/experiments"),
    show: bool = False,
    json: bool = False,
) -> None:
    """Change one thing in preset tiny, and see whether what is said of it comes out: exit status 1 where it does not.
    Trains what is not there yet, and goes on after a kill.

    Args:
        names: Which experiments; all of them by default.
        steps: Of each training. What is said holds for the default.
        out: Where the runs lie, a folder for each, with a report.html to look at.
        show: Train nothing, and tell what is published with this program.
        json: Print one JSON object.
    """
    asked = experiments.asked_for(names, steps)
    made = experiments.published(asked) if show else run_experiments(asked, out, say=progress)
    summary = experiments.summarize(made)
    print(as_json(summary) if json else experiments.in_words(summary))
    if not experiments.as_described(summary):
        raise SystemExit(1)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def as_json(result: object) -> str:
    return json.dumps(result)


def main() -> int:
    commands = {
        "score": score_command,
        "bench": BENCHES,
        "study": study_command,
        "experiments": experiments_command,
        "report": report_command,
        "reference": reference_command,
    }
    return run_commands("python -m moe.lab", commands, __doc__)


if __name__ == "__main__":
    sys.exit(main())
