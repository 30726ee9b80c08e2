import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, build, run_training
from hypothesis import given, settings
from hypothesis import strategies as st

import moe
from moe.checkpoint import Run
from moe.config import ModelConfig, MoeError
from moe.lab.__main__ import main
from moe.lab.report import atlas, balance, charts, make, reference
from moe.lab.report import verdict as verdicts
from moe.lab.report.cost import Rate, cost_table
from moe.lab.report.history import History
from moe.lab.report.make import curves, make_report, text_at_hand
from moe.lab.report.page import as_json, text_of, vega
from moe.lab.report.reading import Text, read
from moe.lab.report.reference import Reference
from moe.lab.report.verdict import Verdict, judge
from moe.lab.report.words import piece_of, pieces_of
from moe.lab.trace import trace
from moe.presets import presets
from moe.tokenizer import bytes_tokenizer

BYTES = bytes_tokenizer()


# -- what each expert is for -------------------------------------------------------------------------------------------


def test_a_choice_that_the_token_decides_is_told_by_it_and_by_nothing_else():
    ids = np.random.default_rng(0).integers(0, 8, 4000)
    for chosen in (
        ids[:, None] % 4,
        np.stack([ids % 4, 4 + ids % 4], 1),
        np.stack([ids, (ids + 1) % 8, (ids + 3) % 8], 1),
    ):
        assert atlas.explained(chosen, ids) == pytest.approx(1, abs=0.01)
        assert atlas.explained(chosen, np.random.default_rng(1).integers(0, 8, 4000)) < 0.01


def test_a_choice_that_half_of_the_tokens_decide_is_told_by_half():
    random = np.random.default_rng(0)
    ids, drawn = random.integers(0, 8, 40_000), random.integers(0, 8, 40_000)
    chosen = np.where(random.random(40_000) < 0.5, ids, drawn)[:, None]
    share = 9 / 16  # of the tokens of a kind come to its own expert, a sixteenth to each of the seven others
    left = -(share * np.log(share) + 7 / 16 * np.log(1 / 16))
    assert atlas.explained(chosen, ids) == pytest.approx(1 - left / np.log(8), abs=0.01)


def test_a_text_that_is_too_short_tells_nothing_instead_of_something():
    ids = np.arange(300)
    assert np.isnan(atlas.explained(ids[:, None] % 8, ids))
    assert "too short to tell" in atlas.in_words([{"specialisation": {}}])


def test_where_every_expert_is_chosen_nothing_is_told():
    ids = np.random.default_rng(0).integers(0, 8, 4000)
    assert atlas.explained(np.tile(np.arange(4), (4000, 1)), ids) == 0


@given(kinds=st.integers(50, 400), tokens=st.integers(500, 3000), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True)  # chance has outliers
def test_chance_is_taken_off_whatever_the_number_of_kinds(kinds, tokens, seed):
    random = np.random.default_rng(seed)
    chosen, known = random.integers(0, 8, (tokens, 2)), random.integers(0, kinds, tokens)
    share = atlas.explained(chosen, known)
    assert np.isnan(share) or share < 0.15
    naive = atlas.information(chosen, np.unique(known, return_inverse=True)[1])
    assert naive > 0.4 * 7 * (kinds - 1) / (4 * tokens)  # by the number of cells: this is what is taken off


def test_lift_is_how_much_more_often_a_token_comes_to_an_expert():
    ids = np.array([97] * 60 + [98] * 60 + [99] * 3)
    chosen = np.array([[0]] * 60 + [[0]] * 20 + [[1]] * 40 + [[1]] * 3)
    first, second = atlas.describe(BYTES, ids, chosen, np.full(chosen.shape, 0.5), 2)
    share = 80 / 123
    assert first["share"] == pytest.approx(share, abs=1e-4)
    assert [token["text"] for token in first["tokens"]] == ["a"]
    assert first["tokens"][0]["lift"] == pytest.approx((60 + 10 * share) / 70 / share, abs=0.01)
    assert [token["text"] for token in second["tokens"]] == ["b"]  # three times c are too few to speak of
    assert first["gate"] == 0.5
    assert first["examples"][0]["token"] == "a"


def test_an_example_shows_the_token_where_it_stands():
    ids = np.frombuffer(b"xxxxxxxxxxxxxxhello aworld", np.uint8).astype(np.int64)
    place = bytes(ids.astype(np.uint8)).index(b"a")
    chosen = np.zeros((len(ids), 1), dtype=int)
    chosen[place] = 1
    _, second = atlas.describe(BYTES, np.tile(ids, 6), np.tile(chosen, (6, 1)), np.ones((6 * len(ids), 1)), 2)
    example = second["examples"][0]
    assert (example["before"][-6:], example["token"], example["after"][:5]) == ("hello ", "a", "world")


def test_experts_with_the_same_weights_are_alike_and_others_are_not():
    model = build()
    layer = model.layers[1].mlp
    with torch.no_grad():
        layer.gate_up_proj[3], layer.down_proj[3] = layer.gate_up_proj[5], layer.down_proj[5]
        layer.gate_up_proj[2], layer.down_proj[2] = layer.gate_up_proj[6], -layer.down_proj[6]
    alike = atlas.similarities(model, torch.randint(0, 64, (32,)))
    assert set(alike) == {1, 2}
    assert alike[1][3, 5] == pytest.approx(1, abs=1e-4)
    assert alike[1][2, 6] == pytest.approx(-1, abs=1e-4)
    assert abs(alike[1][0, 1]) < 0.9
    assert np.allclose(np.diag(alike[1]), 1, atol=1e-4)


def test_a_text_is_routed_in_windows_as_the_model_routes_it():
    model = build()
    ids = np.random.default_rng(0).integers(0, 64, 70)
    routed = atlas.route(model, ids, 32)
    assert routed.chosen.shape == (2, 69, 2)
    assert routed.positions.tolist() == [*range(32), *range(32), *range(5)]
    alone = trace(model, ids[32:64].tolist())
    assert np.array_equal(routed.chosen[:, 32:64], alone.chosen.numpy())


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_character_of_several_tokens_appears_with_its_last():
    pieces = pieces_of(BYTES, [*"a😀".encode(), 255, BYTES.end_of_text])
    assert pieces == ["a", "\\xf0", "\\x9f", "\\x98", "😀", "\\xff", "⟨end of text⟩"]
    assert piece_of(BYTES, 0xE2) == "\\xe2"


def test_what_a_run_holds_cannot_end_the_element_it_stands_in():
    text = as_json({"name": "</script><!--<script>", "number": float("nan"), "half": "\udcff"})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><!--<script>", "number": None, "half": "\udcff"}


# -- balance -----------------------------------------------------------------------------------------------------------


def record(step: int, loss: float = 2.0, load=((4, 4, 4, 4),), **more) -> dict:
    load = np.array(load, dtype=float)
    return {
        "step": step,
        "tokens": 512 * step,
        "seconds": 0.1 * step,
        "loss": loss,
        "nats_per_character": loss,
        "grad_norm": 1.0,
        "lr_share": 1.0,
        "balance_loss": 1.0,
        "max_vio": float((load.max(-1) / load.mean(-1)).max() - 1),
        "entropy": 1.0,
        "dead_experts": int((load == 0).sum()),
        "load_by_layer": load.tolist(),
        "max_vio_by_layer": (load.max(-1) / load.mean(-1) - 1).tolist(),
        "entropy_by_layer": [1.0] * len(load),
        "dead_experts_by_layer": (load == 0).sum(-1).tolist(),
        **more,
    }


def test_a_heat_map_holds_loads_in_even_shares():
    history = History([record(1, load=[[0, 8, 4, 4]]), record(50, load=[[16, 0, 0, 0]])])
    (load,) = balance.load_maps(history, ["3"])
    assert (load.layer, load.steps) == ("3", [1, 50])
    assert load.load.tolist() == [[0, 2, 1, 1], [4, 0, 0, 0]]
    data = charts.heat_map(load, True)["spec"]["data"]
    assert data["names"] == ["from", "step", "expert", "load"]
    assert [1, 50, 0, 4.0] in data["rows"]


def test_many_moments_layers_and_experts_still_fit_a_page():
    random = np.random.default_rng(0)
    history = History([record(step, load=random.integers(1, 9, (26, 64))) for step in range(1, 300)])
    maps = balance.load_maps(history, names := list(map(str, range(26))))
    assert len(maps) == balance.SHOWN
    assert maps[0].layer == "0"
    assert maps[-1].layer == "25"
    assert sum(load.load.size for load in maps) <= balance.CELLS
    drawn = [charts.layer_chart(history, "max_vio", "MaxVio", names)]
    assert len(json.dumps(drawn)) < 100_000


@pytest.mark.parametrize(
    ("loads", "said"),
    [
        ([[[4, 4, 4, 4]]] * 30, ["shared evenly", "below 0.5 all the time", "No expert was ever without work"]),
        ([[[16, 0, 0, 0]]] * 20 + [[[4, 4, 4, 4]]] * 20, ["shared evenly", "since step 21", "early steps"]),
        ([[[10, 6, 0, 0]]] * 30, ["very unevenly", "did not come to stay", "they starve"]),
    ],
)
def test_the_balance_is_told_in_words(loads, said):
    history = History([record(step, load=load) for step, load in enumerate(loads, 1)])
    told = " ".join(balance.meaning(history, ModelConfig(), ["1"], [np.array([0.25, -0.25, 0, 0])]))
    for words in said:
        assert words in told
    assert "0.500 apart (layer 1), 500 of their steps" in told


def test_a_run_without_balancing_is_called_that():
    config = ModelConfig(bias_update_speed=0, aux_loss_alpha=0)
    assert "Nothing balanced this run" in balance.meaning(History([record(1)]), config, ["1"], [])[0]


# -- is my curve right? ------------------------------------------------------------------------------------------------

DEBUG = replace(presets()["debug"], steps=30)


def curve(offset: float = 0.0, steps: int = 30, seed: int = 0) -> History:
    random = np.random.default_rng(seed)
    records = [record(step, 4 - 0.05 * step + offset + 0.01 * random.standard_normal()) for step in range(1, steps + 1)]
    for each in records[14::15]:
        price = each["loss"]
        each |= {"val_loss": price, "val_nats_per_character": price, "val_bits_per_byte": price / 0.7, "val_tokens": 9}
    return History(records)


@pytest.fixture
def three() -> Reference:
    seeds = [reference.rows_of(curve(seed=seed), 5) for seed in (1, 2, 3)]
    return Reference("debug", DEBUG, {"text": "same"}, seeds)


def test_a_run_like_the_reference_is_within_the_band(three):
    verdict = judge(DEBUG, curve(seed=4), three, "same")
    assert verdict == Verdict(True, "Within the band of three reference runs of debug.", [])


def test_a_run_that_is_worse_is_outside_and_one_that_is_better_is_better(three):
    worse, better = judge(DEBUG, curve(0.3), three, "same"), judge(DEBUG, curve(-0.15), three, "same")
    assert worse.fine is False
    assert worse.headline.startswith("Outside")
    assert any("training loss is too high at 6 of 6 places, first at step 5" in remark for remark in worse.remarks)
    too_good = judge(DEBUG, curve(-1.2), three, "same")
    assert too_good.fine is False
    assert any("too low to be true" in remark for remark in too_good.remarks)
    assert any("validation loss" in remark for remark in worse.remarks)
    assert better.fine is True
    assert better.headline.startswith("Better than")


def test_what_is_wrong_at_the_end_counts_however_few_places_it_are():
    every = list(range(5, 505, 5))
    assert verdicts.matter(every[-2:], every, 2)
    assert not verdicts.matter([every[-1]], every, 2)
    assert not verdicts.matter(every[10:15], every, 2)
    assert verdicts.matter(every[10:25], every, 2)


def test_a_run_in_progress_is_compared_as_far_as_it_got(three):
    assert "so far (step 20 of 30)" in judge(DEBUG, curve(steps=22), three, "same").headline
    assert "Too early" in judge(DEBUG, curve(steps=3), three, "same").headline


def test_other_settings_or_another_text_are_not_compared_but_named(three):
    other = replace(DEBUG, model=replace(DEBUG.model, n_routed_experts=8))
    verdict = judge(other, curve(), three, "same")
    assert verdict.fine is None
    assert "model.n_routed_experts = 8 (4)" in verdict.headline
    assert "another text" in judge(DEBUG, curve(), three, "other").headline
    assert judge(replace(DEBUG, seed=7, dtype="float32"), curve(), three, "same").fine


def test_what_is_wrong_with_a_run_is_said_whatever_its_settings():
    history = curve()
    history.records[3] |= {"nats_per_character": None, "skipped": 1}
    history.records[-1] |= {"val_nats_per_character": 3.9, "val_dead_experts": 2}
    verdict = judge(DEBUG, history, None, "")
    told = " ".join(verdict.remarks)
    for words in ("1 step was left out", "Validation was best at step 15", "2 experts got no token"):
        assert words in told
    assert verdict.fine is None


def test_a_reference_comes_back_from_its_file(three):
    text = reference.as_csv("debug", {seed: curve(seed=seed) for seed in (1, 2, 3)})
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 18
    assert float(rows[0]["train_nats_per_character"]) == pytest.approx(
        three.seeds[0][5]["train_nats_per_character"], rel=1e-4
    )
    assert rows[0]["val_nats_per_character"] == ""
    assert rows[2]["val_nats_per_character"] != ""


@pytest.mark.parametrize("preset", ["tiny", "dense", "debug", "wiki"])
def test_a_laptop_s_preset_has_a_reference_of_three_seeds(preset):
    found = reference.reference_of(preset)
    assert len(found.seeds) == 3
    assert found.steps[-1] == found.config.steps
    assert len(found.values(found.steps[-1], "val_nats_per_character")) == 3
    assert reference.reference_of("v3") is None


def test_the_command_compares_and_its_exit_status_says_what_came_of_it(debug_run, monkeypatch, capsys, tmp_path):
    def status(*arguments) -> int:
        monkeypatch.setattr("sys.argv", ["lab", "report", "--check", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    found = reference.reference_of("debug")
    shifted = [{s: {n: v - 1 for n, v in row.items()} for s, row in rows.items()} for rows in found.seeds]
    monkeypatch.setattr(verdicts, "reference_of", lambda preset: found)
    assert status(debug_run) == 0
    assert "Within" in capsys.readouterr().out
    monkeypatch.setattr(verdicts, "reference_of", lambda preset: replace(found, seeds=shifted))
    assert status(debug_run, "--json") == 1
    assert json.loads(capsys.readouterr().out)["fine"] is False


# -- the whole ---------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_run_is_reckoned_from_what_it_did():
    config = replace(presets()["tiny"], model=presets()["tiny"].sized_model)
    history = History(
        [{"step": 1, "tokens": 1_500_000, "seconds": 900.0}, {"step": 600, "tokens": 2_000_000, "seconds": 1800.0}]
    )
    rows = {row.name: row for row in cost_table(config, history, Rate(3.0, "three dollars an hour"), 1e12)}
    assert rows["price"].ours == "$1.50 at three dollars an hour"
    assert rows["price of 1B tokens"].ours == "$750"
    assert rows["price of 1B tokens"].v3 == "$360"
    assert rows["utilisation"].ours.startswith("1 %")
    assert "utilisation" not in {row.name for row in cost_table(config, history, Rate(3.0, ""), None)}


def pages_data(path) -> dict:
    html = path.read_text("utf-8")
    return json.loads(html.split('id="run">')[1].split("</script>")[0])


def test_a_model_without_experts_has_a_report_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        run_training("--out", "run", "--data", TEXT, "--quiet", "--model.first-k-dense-replace", 2, "--steps", 3) == 0
    )
    run = moe.load("run")
    path = make_report(tmp_path / "run", run, text_at_hand(run, tmp_path / "run"))
    data = pages_data(path)
    assert data["atlas"] == []
    assert set(data["charts"]) == {"loss", "rates", "norms"}
    assert data["texts"][0]["layers"] == []
    assert "This model has no experts to balance." in path.read_text("utf-8")


def test_a_report_without_its_text_takes_the_one_that_is_given(debug_run, tmp_path, monkeypatch):
    shutil.copytree(debug_run, tmp_path / "moved")
    run = moe.load(tmp_path / "moved")
    path = make_report(tmp_path / "moved", run, None)
    assert pages_data(path)["atlas"] == []
    assert "give one with --text FILE" in path.read_text("utf-8")
    path = make_report(tmp_path / "moved", run, None, {"given.txt": TEXT.read_bytes()[:3000]})
    data = pages_data(path)
    assert len(data["atlas"][0]["experts"]) == 4
    assert [text["name"] for text in data["texts"]] == ["given.txt", "a sample of this model"]


def test_a_model_that_was_not_trained_here_has_no_curves(debug_run, tmp_path):
    shutil.copytree(debug_run, tmp_path / "moved")
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    path = make_report(tmp_path / "moved", moe.load(tmp_path / "moved"), None)
    assert set(pages_data(path)["charts"]) == {"bias"}
    assert "has not been trained here" in path.read_text("utf-8")


def test_a_long_text_is_cut_and_says_by_how_much(debug_run, tmp_path):
    shutil.copytree(debug_run, tmp_path / "moved")
    run = moe.load(tmp_path / "moved")
    data = TEXT.read_bytes()[:20_000]
    path = make_report(tmp_path / "moved", run, None, {"long": data})
    text, _ = pages_data(path)["texts"]
    assert len(text["pieces"]) == 2000
    assert text["cut"] is True
    assert path.stat().st_size < 2_000_000


def test_the_page_of_a_large_model_is_a_small_file_too():
    model = build(num_hidden_layers=27, n_routed_experts=64, num_experts_per_tok=6, max_position_embeddings=64)
    random = np.random.default_rng(0)
    history = History([record(step, load=random.integers(0, 9, (26, 64))) for step in range(1, 400)])
    ids = random.integers(0, 64, 5000)
    run = Run(model, BYTES, replace(DEBUG, model=model.config), Path())
    data = {
        "charts": curves(run.config, history) | make.balance(history, balance.layer_names(model), []),
        "atlas": atlas.atlas(model, BYTES, atlas.route(model, ids, 32)),
        "texts": [read(run, Text(name, ids.tolist())) for name in ("sample", "validation", "given")],
    }
    assert len(data["atlas"]) == 6
    assert sum(page["chart"] is not None for page in data["atlas"]) == 3
    fixed = sum(len(text_of(f"page.{kind}")) for kind in ("html", "css", "js")) + len(vega())
    assert len(as_json(data)) + fixed < 1_900_000


def test_metrics_that_cannot_be_drawn_are_refused_in_one_line(tmp_path):
    for broken in ({"grad_norm": [1]}, {"tokens": 0}, {"tokens": 1e300}, {"load_by_layer": [[1], [1, 2]]}):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1) | broken) + "\n")
        with pytest.raises(MoeError, match="does not hold what training writes"):
            History.read(tmp_path / "metrics.jsonl")
