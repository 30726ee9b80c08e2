"""Studies: fair turns, one file that survives a kill, and numbers worked by hand."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT

import train as training
from moe.lab import __main__ as lab
from moe.lab import study as front
from moe.lab import study_runs
from moe.lab.studies import Arm, Budget, Study, StudyError, configure, dense_twin, studies
from moe.lab.study_plots import draw_study
from moe.lab.study_runs import RESULTS, final_jobs, read_results, run_study, sweep_jobs, thin
from moe.lab.study_summary import compare, estimate, race, seconds_at, summarize
from moe.lab.study_training import Diverged, Outcome, train
from moe.machine.cost import count

DATA = {"text": "t", "tokenizer": "k"}
TRIES = ({"optim.adam_lr": 0.001}, {"optim.adam_lr": 0.002}, {"optim.adam_lr": 0.004})
CPU = {"device": "cpu"}
THREE = Study("Which?", tuple(Arm(name) for name in "abc"), preset="debug", common=CPU, budget=Budget(steps=3))
SWEPT = replace(THREE, arms=(Arm("a", {}, TRIES), Arm("b", {}, TRIES)), budget=Budget(minutes=1.0), race=True)


class Fake:
    """A trainer whose prices are a table's; it dies when it has made as many trainings as it may."""

    def __init__(self, lives: int = 1000, data: dict = DATA) -> None:
        self.made, self.lives, self.data = [], lives, data

    def __call__(self, jobs, out, budget) -> list[Outcome]:
        if len(self.made) == self.lives:
            raise KeyboardInterrupt
        self.made.append(" ".join(job.name for job in jobs))
        return [self.outcome(job) for job in jobs]

    def outcome(self, job) -> Outcome:
        price = 2 + 0.1 * "abc".index(job.arm) + 0.01 * job.seed + abs(job.config().optim.adam_lr - 0.002)
        curve = {"tokens": [10, 20], "seconds": [30.0, 60.0], "flops": [1e3, 2e3]}
        curve["val_bits_per_byte"] = [price + 1, price]
        finals = {"parameters": 9, "active": 5, "flops_per_token": 100, "steps": 2, "tokens": 20, "seconds": 60.0}
        finals |= {"val_bits_per_byte": price, "val_nats_per_character": price * math.log(2)}
        return Outcome(self.data, "a machine", finals | {"val_max_vio": 0.5, "val_dead_experts": 0}, curve)


# -- the table of studies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", studies())
def test_every_trainings_flags_mean_to_the_training_script_what_the_study_means(name, tmp_path):
    study = studies()[name]
    stepped = replace(study, budget=Budget(steps=7))
    for job in (*sweep_jobs(study), *final_jobs(study, {}, 1), *final_jobs(stepped, {}, 1)):
        _, config, _ = training.parse([*job.flags(), "--out", str(tmp_path / "run")])
        assert config == job.config()


def test_the_dense_twin_has_no_experts_and_as_many_active_parameters():
    dense, moe = studies()["moe-vs-dense"].arms
    sizes = []
    for arm in (dense, moe):
        config = configure("wiki", arm.changes)
        sizes.append((config.model.num_moe_layers, count(config.sized_model).active))
    assert sizes[0][0] == 0 < sizes[1][0]
    assert sizes[0][1] == pytest.approx(sizes[1][1], rel=0.01)
    assert dense.tries == moe.tries


def test_a_model_too_narrow_for_a_dense_twin_is_refused():
    with pytest.raises(StudyError, match="active parameters"):
        dense_twin(replace(configure("debug", {}).sized_model, hidden_size=4, moe_intermediate_size=3, vocab_size=1))


@pytest.mark.parametrize("name", ["shared", "granularity"])
def test_arms_that_share_out_a_width_have_the_same_experts_in_all_and_for_a_token(name):
    widths = set()
    for arm in studies()[name].arms:
        model = configure("tiny", arm.changes).model
        every = (model.n_routed_experts + model.n_shared_experts) * model.moe_intermediate_size
        chosen = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
        widths.add((every, chosen))
    assert len(widths) == 1


# -- order and resuming ------------------------------------------------------------------------------------------------


def test_arms_take_turns_seed_by_seed_and_another_begins_each_time(tmp_path):
    fake = Fake()
    run_study("x", THREE, tmp_path / "x", 3, fake)
    assert fake.made == ["a-1", "b-1", "c-1", "b-2", "c-2", "a-2", "c-3", "a-3", "b-3"]


def test_the_sweep_comes_first_at_a_seed_of_its_own_and_the_best_setting_is_used(tmp_path):
    fake = Fake()
    results = run_study("x", SWEPT, tmp_path / "x", 2, fake)
    assert fake.made[:6] == ["sweep-a-0", "sweep-b-0", "sweep-b-1", "sweep-a-1", "sweep-a-2", "sweep-b-2"]
    assert fake.made[6:] == ["a-1", "b-1", "b-2", "a-2"]
    assert {run["setting"] for run in results.finals} == {1}
    assert {run["seed"] for run in results.sweep}.isdisjoint(run["seed"] for run in results.finals)
    summary = summarize(results, SWEPT)
    setting = {"best": TRIES[1], "tried": 3, "budget": {"minutes": 1.0}, "at_the_edge": []}
    assert summary["arms"][0]["setting"] == setting


def test_a_sweep_may_have_a_budget_of_its_own(tmp_path):
    lengths = []

    def watched(jobs, out, budget):
        (job,) = jobs
        lengths.append((job.stage, str(budget), job.changes["steps"] if budget.steps else job.changes["minutes"]))
        return Fake()(jobs, out, budget)

    study = replace(SWEPT, sweep=Budget(steps=5))
    results = run_study("x", study, tmp_path / "x", 1, watched)
    assert set(lengths) == {("sweep", "5 steps", 5), ("final", "1 minute", 1.0)}
    assert "tried at another seed for 5 steps." in front.in_words(summarize(results, study))
    with pytest.raises(StudyError, match="another sweep"):
        run_study("x", replace(study, sweep=Budget(steps=6)), tmp_path / "x", 1, watched)


def test_a_setting_that_diverges_in_the_sweep_is_not_chosen_and_one_that_diverges_later_ends_the_study(tmp_path):
    def wild(jobs, out, budget):
        if jobs[0].changes.get("optim.adam_lr") == 0.002:
            return [Diverged("step 7: the loss is nan")]
        return Fake()(jobs, out, budget)

    results = run_study("x", SWEPT, tmp_path / "x", 1, wild)
    assert results.best() == {"a": 0, "b": 0}
    assert [run["diverged"] for run in results.sweep if run["setting"] == 1] == ["step 7: the loss is nan"] * 2
    once = replace(SWEPT, arms=(Arm("a", TRIES[1]),))
    with pytest.raises(Diverged):
        run_study("y", once, tmp_path / "y", 1, wild)


@pytest.mark.parametrize("lives", [0, 1, 6, 8, 9])
def test_a_killed_study_goes_on_with_what_is_missing_and_ends_with_the_same_file(tmp_path, lives):
    whole, killed, again = Fake(), Fake(lives), Fake()
    run_study("x", SWEPT, tmp_path / "whole", 2, whole)
    with pytest.raises(KeyboardInterrupt):
        run_study("x", SWEPT, tmp_path / "killed", 2, killed)
    run_study("x", SWEPT, tmp_path / "killed", 2, again)
    assert killed.made + again.made == whole.made
    assert (tmp_path / "killed" / RESULTS).read_bytes() == (tmp_path / "whole" / RESULTS).read_bytes()
    run_study("x", SWEPT, tmp_path / "killed", 2, Fake(lives=0))  # finished: nothing is trained


def test_arms_may_be_trained_together_seed_by_seed_and_setting_by_setting(tmp_path):
    whole, killed, again = Fake(), Fake(4), Fake()
    study = replace(SWEPT, together=True)
    results = run_study("x", study, tmp_path / "whole", 2, whole)
    assert whole.made[:3] == ["sweep-a-0 sweep-b-0", "sweep-b-1 sweep-a-1", "sweep-a-2 sweep-b-2"]
    assert whole.made[3:] == ["a-1 b-1", "b-2 a-2"]
    with pytest.raises(KeyboardInterrupt):
        run_study("x", study, tmp_path / "killed", 2, killed)
    assert run_study("x", study, tmp_path / "killed", 2, again) == results
    assert killed.made + again.made == whole.made
    assert "the arms of a seed at the same time" in front.in_words(summarize(results, study))
    with pytest.raises(StudyError, match="another together"):
        run_study("x", SWEPT, tmp_path / "whole", 2, Fake(lives=0))


def test_on_a_gpu_arms_are_never_trained_together(tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "resolve_device", lambda asked: ("cuda", "an NVIDIA GPU is there"))
    fake, study = Fake(), replace(THREE, together=True)
    results = run_study("x", study, tmp_path / "x", 1, fake)
    assert fake.made == ["a-1", "b-1", "c-1"]
    assert "at the same time" not in front.in_words(summarize(results, study))


def test_more_seeds_can_be_added_later(tmp_path):
    run_study("x", THREE, tmp_path / "x", 1, Fake())
    fake = Fake()
    assert len(run_study("x", THREE, tmp_path / "x", 2, fake).finals) == 6
    assert fake.made == ["b-2", "c-2", "a-2"]


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("x", {"budget": Budget(steps=4)}, "budget.steps"),
        ("x", {"budget": Budget(minutes=1)}, "budget.minutes"),
        ("x", {"common": CPU | {"model.n_routed_experts": 8}}, "base.model.n_routed_experts"),
        ("x", {"common": CPU | {"data.source": "other.txt"}}, "base.data.source"),
        ("x", {"arms": THREE.arms[:2]}, "arms"),
        ("y", {}, "name"),
    ],
)
def test_another_protocol_is_refused_in_the_same_folder(tmp_path, name, changes, says):
    run_study("x", THREE, tmp_path, 1, Fake())
    with pytest.raises(StudyError, match=f"began with another {says}: .*--out"):
        run_study(name, replace(THREE, **changes), tmp_path, 1, Fake(lives=0))


def test_another_text_under_the_same_name_is_refused(tmp_path):
    run_study("x", THREE, tmp_path, 1, Fake())
    with pytest.raises(StudyError, match="another text"):
        run_study("x", THREE, tmp_path, 2, Fake(data=DATA | {"text": "u"}))
    assert len(run_study("x", THREE, tmp_path, 2, Fake()).finals) == 6


def test_of_arms_trained_together_with_another_text_none_is_kept(tmp_path):
    study = replace(THREE, together=True)
    run_study("x", study, tmp_path, 1, Fake())
    for arm in "abc":
        (tmp_path / f"{arm}-2").mkdir()
    with pytest.raises(StudyError, match="another text"):
        run_study("x", study, tmp_path, 2, Fake(data=DATA | {"text": "u"}))
    assert not list(tmp_path.glob("*-2"))


def test_another_version_of_torch_is_refused_and_another_revision_of_this_program_is_not(tmp_path, monkeypatch):
    run_study("x", THREE, tmp_path, 1, Fake())
    made = study_runs.versions()
    monkeypatch.setattr(study_runs, "versions", lambda: made | {"git": "another"})
    run_study("x", THREE, tmp_path, 1, Fake(lives=0))
    monkeypatch.setattr(study_runs, "versions", lambda: made | {"torch": "0.4"})
    with pytest.raises(StudyError, match="another torch"):
        run_study("x", THREE, tmp_path, 1, Fake(lives=0))


def test_a_path_is_not_stored_and_a_folder_of_something_else_is_left_alone(tmp_path):
    study = replace(THREE, common=CPU | {"data.source": str(tmp_path / "text.txt")})
    run_study("x", study, tmp_path / "x", 1, Fake())
    assert str(tmp_path) not in (tmp_path / "x" / RESULTS).read_text()
    (tmp_path / "y" / "a-1").mkdir(parents=True)
    with pytest.raises(StudyError, match="no part of this study"):
        run_study("x", study, tmp_path / "y", 1, Fake(lives=0))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"study": "x"}',
        '{"sweep": [], "finals": [], "colour": 1}',
        '{"sweep": [], "finals": [{}]}',
        '{"study": "x", "protocol": {}, "versions": {}, "sweep": [], "finals": []}',
        '{"study": "x", "protocol": {"arms": []}, "versions": {}, "sweep": [], '
        '"finals": [{"arm": "a", "setting": 0, "seed": 1}]}',
    ],
)
def test_a_damaged_results_file_is_refused(tmp_path, content):
    (tmp_path / RESULTS).write_text(content)
    with pytest.raises(StudyError, match="holds no results"):
        run_study("x", THREE, tmp_path, 1, Fake(lives=0))


def test_a_results_file_stays_small_and_a_thinned_curve_keeps_its_ends(tmp_path):
    def long(jobs, out, budget):
        outcomes = Fake()(jobs, out, budget)
        return [replace(one, curve={name: [123456.78] * 5000 for name in one.curve}) for one in outcomes]

    for arms, seeds in ((3, 5), (3, 10)):
        run_study("x", replace(THREE, arms=THREE.arms[:arms]), tmp_path / str(seeds), seeds, long)
        assert (tmp_path / str(seeds) / RESULTS).stat().st_size < 60_000
    thinned = thin(list(range(1000)), 60)
    assert (len(thinned), thinned[0], thinned[-1]) == (60, 0, 999)
    assert thin([1, 2, 3], 60) == [1, 2, 3]


# -- statistics --------------------------------------------------------------------------------------------------------


def test_means_and_standard_errors():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert (found.mean, found.standard_error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
    assert estimate([7.0]).standard_error is None


def test_differences_are_paired_and_a_verdict_takes_five_seeds_and_three_standard_errors():
    first = [1.0, 2.0, 3.0, 4.0, 5.0]
    better = [0.9, 1.8, 2.9, 3.8, 4.9]  # differences -0.1 -0.2 -0.1 -0.2 -0.1: mean -0.14, sd sqrt(0.012 / 4)
    found = compare(first, better)
    assert found.difference.mean == pytest.approx(-0.14)
    assert found.difference.standard_error == pytest.approx(math.sqrt(0.003 / 5))
    assert found.ratio == pytest.approx(14.3 / 15)
    assert found.verdict == "ahead"
    assert compare(better, first).verdict == "behind"
    assert compare(first[:4], better[:4]).verdict == "undecided"  # four seeds
    assert compare(first, [1.1, 1.8, 2.9, 4.1, 4.8]).verdict == "undecided"  # mean -0.06, standard error 0.07
    assert compare(first, first).verdict == "undecided"


def test_when_a_curve_first_came_down_to_a_price():
    curve = {"seconds": [10.0, 20.0, 40.0, 60.0], "val_bits_per_byte": [4.0, 3.0, 2.0, 2.5]}
    assert seconds_at(curve, 3.5) == 15
    assert seconds_at(curve, 2.25) == 35
    assert seconds_at(curve, 4.5) == 10
    assert seconds_at(curve, 1.9) is None


def test_the_race_takes_the_median_over_the_seeds_and_a_seed_that_never_arrives_is_the_last():
    def run(prices, steps):
        curve = {"seconds": [30.0, 60.0], "val_bits_per_byte": prices}
        return {"curve": curve, "finals": {"seconds": 60.0, "steps": steps, "tokens": 10 * steps, "flops_per_token": 7}}

    first = [run([3.0, 2.0], 100)] * 3
    found = race(first, [run([2.5, 1.5], 50), run([3.0, 2.5], 50), run([2.25, 1.25], 50)])
    assert found["reached_by_seed"] == pytest.approx([45 / 60, None, 37.5 / 60])
    assert found["reached"] == pytest.approx(45 / 60)
    assert (found["step_seconds"], found["tokens"], found["flops"]) == (2.0, 0.5, 0.5)
    assert race(first, [run([3.0, 2.5], 50)] * 3)["reached"] is None


def test_only_seeds_that_every_arm_has_count(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_study("x", THREE, tmp_path, 2, Fake(lives=4))
    assert summarize(read_results(tmp_path / RESULTS), THREE)["seeds"] == [1]
    with pytest.raises(KeyboardInterrupt):
        run_study("x", THREE, tmp_path / "y", 2, Fake(lives=2))
    with pytest.raises(StudyError, match="no seed yet"):
        summarize(read_results(tmp_path / "y" / RESULTS), THREE)


# -- what is shown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("study", [THREE, SWEPT, replace(THREE, arms=THREE.arms[:1])])
@pytest.mark.parametrize("seeds", [1, 5])
def test_a_table_and_a_small_picture(tmp_path, study, seeds):
    results = run_study("x", study, tmp_path, seeds, Fake())
    said = front.in_words(summarize(results, study))
    rows = [line for line in said.split("\n") if line.startswith("|")]
    assert len(rows) == 2 + len(study.arms)
    assert len({row.count("|") for row in rows}) == 1
    assert any("| behind |" in row for row in rows) == (seeds == 5 and len(study.arms) > 1)
    picture = draw_study(results, study, tmp_path)
    assert 1000 < picture.stat().st_size < 150_000


def test_what_is_published_is_shown_without_training_as_one_object_on_standard_output(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(front, "PUBLISHED", tmp_path)
    asked = studies()["scores"]

    def fake(jobs, out, budget):
        return Fake()([replace(job, arm="abc"[len(job.arm) - 7]) for job in jobs], out, budget)

    run_study("scores", asked, tmp_path / "made", 5, fake)
    (tmp_path / "made" / RESULTS).rename(tmp_path / "scores.json")
    monkeypatch.setattr("sys.argv", ["moe.lab", "study", "scores", "--show", "--json"])
    assert lab.main() == 0
    shown = json.loads(capsys.readouterr().out)
    assert [arm["arm"] for arm in shown["arms"]] == ["sigmoid", "softmax"]
    assert (tmp_path / "out/studies/scores/scores.png").exists()
    (tmp_path / "scores.json").rename(tmp_path / "tiny.json")
    with pytest.raises(StudyError, match="holds the study scores"):
        front.published_or_made("tiny", tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["colours"], "moe-vs-dense"),
        (["tiny", "--show"], "leave --show out"),
        (["tiny", "--steps", "3", "--minutes", "1"], "exclude"),
        (["tiny", "--steps", "0"], "steps = 0"),
        (["tiny", "--minutes", "-1"], "minutes = -1"),
        (["tiny", "--seeds", "0"], "--seeds 0"),
    ],
)
def test_bad_wishes_get_one_clear_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(front, "PUBLISHED", tmp_path)
    monkeypatch.setattr("sys.argv", ["moe.lab", "study", *arguments])
    assert lab.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error


# -- the training itself -----------------------------------------------------------------------------------------------

REAL = Study(
    "Does it run?",
    (Arm("moe"), Arm("dense", {"model.first_k_dense_replace": 2})),
    preset="debug",
    common=CPU | {"data.source": str(TEXT), "train.eval_interval": 2},
    budget=Budget(steps=4),
)


def test_real_trainings_are_made_read_and_leave_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    results = run_study("x", REAL, Path("study"), 1, train)
    moe, dense = (run["finals"] for run in results.finals)
    assert [run["curve"]["tokens"] for run in results.finals] == [[1024, 2048], [1024, 2048]]
    assert (moe["steps"], moe["tokens"]) == (4, 2048)
    assert moe["val_max_vio"] > 0
    assert dense["val_max_vio"] is None
    assert moe["parameters"] > dense["parameters"]
    assert not list(tmp_path.glob("study/*/checkpoints"))
    assert "moe" in front.in_words(summarize(results, REAL))


CLOCKED = replace(REAL, budget=Budget(minutes=0.005), arms=REAL.arms[:1])


def test_trainings_at_the_same_time_share_the_threads_and_by_the_clock_are_made_anew_if_one_was_interrupted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pair = replace(CLOCKED, arms=REAL.arms, together=True)
    jobs = final_jobs(pair, {}, 1)
    first = train(jobs, tmp_path, pair.budget)
    assert [run.finals["seconds"] >= 0.3 for run in first] == [True, True]
    assert {run.machine.split(", ")[1] for run in first} == {"1 thread"}
    assert train(jobs, tmp_path, pair.budget) == first
    shutil.rmtree(tmp_path / "dense-1")
    written = (tmp_path / "moe-1" / "metrics.jsonl").stat().st_mtime_ns
    train(jobs, tmp_path, pair.budget)
    assert (tmp_path / "moe-1" / "metrics.jsonl").stat().st_mtime_ns > written


def test_by_the_clock_an_interrupted_training_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    unfinished = ["--preset", "debug", "--data", str(TEXT), "--steps", "1", "--out", "moe-1", "--quiet"]
    assert training.main([*unfinished, "--seed", "9"]) == 0  # to continue it with another seed would be refused
    (outcome,) = train(final_jobs(CLOCKED, {}, 1), Path(), CLOCKED.budget)
    assert outcome.finals["seconds"] >= 0.3
    (again,) = train(final_jobs(CLOCKED, {}, 1), Path(), CLOCKED.budget)  # finished: it is only read
    assert again == outcome


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"optim.muon_lr": 1e30, "optim.adam_lr": 1e30}, Diverged, "moe-1: step"),
        pytest.param({"data.source": "nowhere"}, StudyError, "moe-1: nowhere: no such file", marks=pytest.mark.slow),
    ],
)
def test_a_training_that_fails_says_why_and_one_that_diverges_is_told_from_others(
    tmp_path, monkeypatch, changes, kind, says
):
    monkeypatch.chdir(tmp_path)
    job = final_jobs(REAL, {}, 1)[0]
    job = replace(job, changes=job.changes | changes)
    if kind is Diverged:
        (outcome,) = train([job], tmp_path, REAL.budget)
        assert isinstance(outcome, Diverged)
        assert says in str(outcome)
    else:
        with pytest.raises(StudyError, match=says):
            train([job], tmp_path, REAL.budget)


def test_without_the_training_script_a_study_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("moe.__file__", str(tmp_path / "moe" / "__init__.py"))
    with pytest.raises(StudyError, match=r"train.py is not there: .*checkout"):
        train(final_jobs(CLOCKED, {}, 1), tmp_path, CLOCKED.budget)
