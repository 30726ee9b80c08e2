"""The experiments that the README invites to: flags that mean what is said, claims that could have failed."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import TEXT
from test_guide import ROOT, section

import train as training
from moe.lab import __main__ as lab
from moe.lab import experiments as front
from moe.lab.experiment_runs import ExperimentError, run_experiments
from moe.lab.experiments import BASELINE, STEPS, experiments, published, summarize
from moe.lab.studies import configure
from moe.machine.start import differences


@pytest.mark.parametrize("name", experiments())
def test_an_experiments_flags_change_what_it_says_and_nothing_else(name, tmp_path):
    experiment = experiments()[name]
    command = [*shlex.split(experiment.flags()), "--steps", str(STEPS), "--out", str(tmp_path / "run")]
    config = training.parse(command)[1]
    assert config == configure("tiny", {"steps": STEPS, **experiment.changes})
    assert set(differences(configure("tiny", {"steps": STEPS}), config)) == set(experiment.changes)


def test_the_report_has_the_part_that_an_experiment_asks_to_look_at():
    page = (ROOT / "moe/lab/report/page.html").read_text()
    assert all(f">{experiment.look}</a>" in page for experiment in experiments().values())


def test_there_are_ten_beside_the_baseline():
    first, *others = experiments()
    assert first == BASELINE
    assert len(others) == 10
    assert all(experiments()[name].claims for name in others)


def test_what_is_published_was_made_with_these_flags_and_came_out_as_described():
    rows = published(experiments())
    assert [row["changes"] for row in rows] == list(front.asked_for([], STEPS).values())
    assert front.as_described(summarize(rows))


@pytest.mark.parametrize("name", list(experiments())[1:])
def test_every_claim_holds_for_what_was_found_and_would_fail_on_another_figure(name):
    base, own = (row["figures"] for row in published([BASELINE, name]))
    other = [own | {figure: changed} for figure, value in own.items() for changed in (0, 3 * (value or 0) + 1)]
    for claim in experiments()[name].claims:
        assert claim.holds(own, base)
        assert not all(claim.holds(figures, base) for figures in other), claim.says


def test_an_experiment_that_comes_out_otherwise_is_told_and_is_the_exit_status(tmp_path, monkeypatch, capsys):
    rows = published(experiments())
    rows[1]["figures"]["nats_per_character"] += 1
    monkeypatch.setattr(front, "PUBLISHED", tmp_path / "made.json")
    front.PUBLISHED.write_text(json.dumps(summarize(rows)))
    monkeypatch.setattr("sys.argv", ["moe.lab", "experiments", "--show"])
    with pytest.raises(SystemExit, match="1"):
        lab.main()
    said = capsys.readouterr().out
    assert said.count("not as described: ") == 1
    assert said.count("  as described\n") == 9


def test_the_readme_shows_the_table_and_the_lessons_of_what_is_published():
    summary = summarize(published(experiments()))
    for part in (front.table(summary), front.lessons(summary)):
        assert part in section("Change one thing")


def test_what_is_published_is_shown_as_one_object_on_standard_output(monkeypatch, capsys):
    name = list(experiments())[1]
    monkeypatch.setattr("sys.argv", ["moe.lab", "experiments", name, "--show", "--json"])
    assert lab.main() == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["experiment"] for row in shown["experiments"]] == [BASELINE, name]


def test_an_unknown_experiment_is_named_with_those_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moe.lab", "experiments", "colours"])
    assert lab.main() == 2
    assert "'colours'" in (error := capsys.readouterr().err)
    assert BASELINE in error


SHORT = {
    "steps": 4,
    "device": "cpu",
    "dtype": "float32",
    "data.source": "text.txt",
    "data.tokenizer": "bytes",
    "train.eval_interval": 2,
}
ASKED = {BASELINE: SHORT, "dense": {**SHORT, "model.first_k_dense_replace": 2}}


def in_this_process(arguments: list[str]) -> None:
    assert training.main(arguments) == 0


def test_the_experiments_are_made_read_kept_to_look_at_and_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT.read_text()[:10_000])
    calls = []

    def killed_once(arguments):
        calls.append(arguments[arguments.index("--out") + 1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        in_this_process(arguments)

    with pytest.raises(KeyboardInterrupt):
        run_experiments(ASKED, Path("runs"), preset="debug", trainer=killed_once)
    made = run_experiments(ASKED, Path("runs"), preset="debug", trainer=killed_once)
    assert calls == ["runs/baseline", "runs/dense", "runs/dense"]
    assert [run["experiment"] for run in made] == [BASELINE, "dense"]
    first, dense = (run["figures"] for run in made)
    assert first["max_vio"] > 0
    assert first["change_of_dead"] >= 0
    assert dense["max_vio"] is dense["change_of_dead"] is None
    assert (Path("runs") / "dense" / "checkpoints").exists()
    assert json.loads(json.dumps(made)) == made
    with pytest.raises(ExperimentError, match="baseline holds a run that was made otherwise"):
        run_experiments({BASELINE: {**SHORT, "steps": 5}}, Path("runs"), preset="debug", trainer=in_this_process)


def test_a_training_is_a_process_of_the_script_and_one_that_fails_says_why(tmp_path, monkeypatch):
    commands = []

    def failing(asked):
        commands.extend(asked)
        return [(2, "note: a line before\nerror: text.txt: no such file")]

    monkeypatch.setattr("moe.lab.experiment_runs.run_processes", failing)
    with pytest.raises(ExperimentError, match=r"baseline.*: text\.txt: no such file"):
        run_experiments(ASKED, tmp_path, preset="debug")
    ((_, script, *arguments),) = commands
    assert Path(script) == ROOT / "train.py"
    assert training.parse(arguments)[1] == configure("debug", SHORT)


def test_without_the_training_script_the_experiments_say_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.__file__", str(tmp_path / "moe" / "__init__.py"))
    with pytest.raises(ExperimentError, match=r"train\.py is not there"):
        run_experiments(ASKED, tmp_path, preset="debug")
