"""What is compared is equal, and the arithmetic of comparing is right; times are nobody's promise."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, build

from moe.lab import __main__ as lab
from moe.lab import bench, bench_decode, bench_layer, bench_step
from moe.lab.bench import BenchError, Row, alternate, geometric_mean, medians, ratio
from moe.lab.bench_decode import Text, experts_touched, step_bytes
from moe.lab.bench_layer import CELLS, FINE, Cell, LayerBench
from moe.lab.bench_step import StepBench
from moe.machine.peak import Peak
from moe.presets import presets

TINY = Cell(64, 16, 4, 2)


def test_the_ratio_is_the_median_of_the_rounds_ratios():
    times = {"a": [2.0, 6.0, 100.0], "b": [1.0, 2.0, 100.0]}
    assert medians(times) == {"a": 6.0, "b": 2.0}
    assert ratio(times, "a", "b") == 2.0
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_ways_alternate_and_the_first_rounds_do_not_count():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 5
    assert [len(taken) for taken in times.values()] == [3, 3]
    order.clear()
    alternate({"a": lambda: order.append("a")}, rounds=50, seconds=0.0)
    assert len(order) == 7  # no fewer than five that count


@pytest.mark.parametrize("cell", [*CELLS, *FINE])
def test_a_token_meets_as_many_weights_in_the_mixture_as_in_the_dense_layer(cell):
    with torch.device("meta"):
        mixture, dense = bench_layer.layers(cell, "auto", "meta")
    routed = cell.chosen * (mixture.gate_up_proj[0].numel() + mixture.down_proj[0].numel())
    shared = sum(weight.numel() for weight in mixture.shared_experts.parameters())
    assert routed + shared == sum(weight.numel() for weight in dense.parameters())
    assert cell.expert_width % 64 == 0
    assert abs(cell.active_width / (4 * cell.width) - 1) < 0.15


def test_gradients_of_layer_and_input_are_made_and_added_up():
    mixture, _ = bench_layer.layers(TINY, "loop", "cpu")
    both = bench_layer.passes(mixture, TINY, "float32", "cpu")
    both()
    once = mixture.router.weight.grad.clone()
    both()
    torch.testing.assert_close(mixture.router.weight.grad, 2 * once)


def run_json(capsys, monkeypatch, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["moe.lab", "bench", *arguments, "--json"])
    assert lab.main() == 0
    return json.loads(capsys.readouterr().out)


def check_json(result: dict) -> list[dict]:
    assert result.keys() == {"machine", "versions", "rows"}
    assert result["machine"]["name"]
    assert "torch" in result["versions"]
    for row in result["rows"]:
        assert row["ratio"] > 0
        assert all(seconds > 0 for seconds in row["medians"].values())
    return result["rows"]


def test_layer_prints_one_json_object(capsys, monkeypatch):
    monkeypatch.setattr(bench_layer, "CELLS", (TINY,))
    rows = check_json(run_json(capsys, monkeypatch, "layer", "--rounds", "2", "--backend", "all", "--device", "cpu"))
    assert [(row["backend"], row["dtype"]) for row in rows] == [
        (backend, dtype) for backend in ("loop", "grouped") for dtype in ("float32", "bfloat16")
    ]
    assert all(row["counted"] and row["dense_width"] == 3 * row["expert_width"] for row in rows)


def test_layer_prints_a_table_with_its_geometric_mean(capsys, monkeypatch):
    monkeypatch.setattr(bench_layer, "CELLS", (TINY,))
    LayerBench(device="cpu", dtype="float32", backend="loop", rounds=2).main()
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines[2:5]}) == 1  # head, rule, row
    assert lines[-1].startswith("geometric mean, loop: ")


def test_a_profile_shares_the_whole_time_out(capsys, monkeypatch):
    monkeypatch.setattr(bench_layer, "CELLS", (TINY,))
    (row,) = LayerBench(dtype="float32", backend="loop", rounds=1).measure(bench_layer.profiled, "cpu")
    assert row.medians.keys() == {"products", "pointwise", "routing"}
    assert row.ratio == pytest.approx(row.medians["routing"] / sum(row.medians.values()))
    kinds = {
        "aten::mm": "products",
        "aten::_grouped_mm": "products",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN": "products",
        "aten::silu_backward": "pointwise",
        "void at::native::vectorized_elementwise_kernel<4, silu>": "pointwise",
        "aten::argsort": "routing",
        "aten::topk": "routing",
        "void at::native::_scatter_gather_elementwise_kernel<128, 8>": "routing",
    }
    assert {name: bench_layer.kind_of(name) for name in kinds} == kinds


def test_a_step_trains_as_train_py_does_and_tells_its_speed(capsys, monkeypatch):
    debug = presets()["debug"]
    monkeypatch.setattr(bench_step, "presets", lambda: {"debug": debug, "other": replaced(debug)})
    arguments = ("--preset", "debug", "--against", "other", "--rounds", "1", "--device", "cpu", "--dtype", "float32")
    monkeypatch.setattr(bench_step, "peak_of", lambda device, dtype: Peak(1e12, "told"))
    (row,) = check_json(run_json(capsys, monkeypatch, "step", *arguments))
    speed = row["tokens_per_second"]["debug"]
    assert speed == pytest.approx(debug.train.tokens_per_step / row["medians"]["debug"])
    flops = bench_step.count(debug.sized_model, debug.train.sequence_length).training_flops
    assert row["flop_utilisation"]["debug"] == pytest.approx(speed * flops / 1e12)


def replaced(debug):
    return replace(debug, preset="other", model=replace(debug.model, n_routed_experts=2))


def test_steps_learn():
    trainer = bench_step.build(StepBench(device="cpu", dtype="float32").configured(presets()["debug"]))
    losses = [trainer.step().loss.item() for _ in range(6)]
    assert losses[-1] < losses[0]


def test_unknown_and_equal_presets_are_refused():
    with pytest.raises(BenchError, match="nope"):
        StepBench(preset="nope").main()
    with pytest.raises(BenchError, match="two presets"):
        StepBench(preset="debug", against="debug", device="cpu").main()
    with pytest.raises(BenchError, match=r"steps of tiny have 4,096 tokens and of debug 512.*leave --against out"):
        StepBench(against="debug", device="cpu").main()


@pytest.mark.parametrize("preset", ["tiny", "wiki"])
def test_a_preset_is_measured_against_its_dense_twin(preset):
    ours, twin = StepBench(preset, device="cpu").configs()
    assert (ours.model.num_moe_layers > 0, twin.model.num_moe_layers) == (True, 0)
    active = [bench_step.count(config.model).active for config in (ours, twin)]
    assert active[1] == pytest.approx(active[0], rel=0.01)
    assert ours.train == twin.train


@pytest.mark.parametrize("arguments", [("layer",), ("layer", "--profile"), ("step",), ("decode",)])
def test_no_rounds_are_refused_in_one_line(capsys, monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", ["moe.lab", "bench", *arguments, "--device", "cpu", "--rounds", "0"])
    assert lab.main() == 2
    assert capsys.readouterr().err == "error: --rounds 0 must be greater than 0\n"


def test_a_gpu_that_is_too_small_is_one_line(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_layer, "layers", full)
    monkeypatch.setattr(sys, "argv", ["moe.lab", "bench", "layer", "--device", "cpu"])
    assert lab.main() == 2
    assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_experts_touched_by_hand():
    assert experts_touched(8, 2, 1) == pytest.approx(2)
    assert experts_touched(4, 2, 2) == pytest.approx(3)  # 4 (1 - 1/4)
    assert experts_touched(8, 8, 3) == 8


def test_bytes_of_a_step_by_hand():
    model = build(first_k_dense_replace=1, n_routed_experts=4)
    expert = 3 * SMALL.hidden_size * SMALL.moe_intermediate_size * 4
    sizes = {name: weight.nbytes for name, weight in model.named_parameters()}
    elsewhere = ("mlp.gate_up_proj", "mlp.down_proj", "embed_tokens.weight")
    apart = sum(size for name, size in sizes.items() if name.endswith(elsewhere))
    rest = sum(sizes.values()) - apart
    assert step_bytes(model, 1) == pytest.approx(rest + 2 * 2 * expert)  # two layers, two experts
    assert step_bytes(model, 2) == pytest.approx(rest + 2 * 3 * expert)


def test_the_cache_takes_what_the_formula_says():
    width = SMALL.kv_lora_rank + SMALL.qk_rope_head_dim
    assert bench_decode.cache_bytes(SMALL) == 4 * SMALL.num_hidden_layers * width


def test_both_write_the_same_tokens_from_the_same_weights(tmp_path):
    run = bench_decode.write_run(tmp_path / "run", build().config)
    theirs = bench_decode.open_in_transformers(bench_decode.export(run, tmp_path / "export"))
    ours = bench_decode.load(run, device="cpu").model
    texts = (Text(1, 4, 6), Text(3, 4, 6), Text(1, 8, 1))
    rows = list(bench_decode.measure(ours, theirs, texts, 1, "cpu"))
    assert all(row.further["same_tokens"] for row in rows)
    assert [row.shape["sequences"] for row in rows] == [1, 3, 1]
    assert rows[1].further["tokens_per_second"]["moe"] == pytest.approx(18 / rows[1].medians["moe"])
    assert [row.further["bandwidth_bound"] is None for row in rows] == [False, False, True]
    assert all(len(bench_decode.cells(row)) == 8 for row in rows)


def test_texts_keep_within_a_runs_context(debug_run, tmp_path):
    assert Text(1, 64, 128).within(1024) == Text(1, 64, 128)
    assert Text(1, 512, 1).within(256) == Text(1, 255, 1)
    assert Text(16, 64, 128).within(64) == Text(16, 32, 32)
    theirs = bench_decode.open_in_transformers(bench_decode.export(debug_run, tmp_path / "export"))
    ours = bench_decode.load(debug_run, device="cpu").model
    (row,) = bench_decode.measure(ours, theirs, [Text(2, 64, 128).within(64)], 1, "cpu")
    assert row.further["same_tokens"]


def test_without_transformers_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(bench_decode.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["moe.lab", "bench", "decode"])
    assert lab.main() == 2
    assert "pip install transformers" in capsys.readouterr().err


def test_a_run_that_cannot_be_exported_is_one_line(tmp_path):
    with pytest.raises(BenchError, match="holds no run"):
        bench_decode.export(tmp_path, tmp_path / "export")


def test_a_table_is_markdown_and_json_alone_on_its_stream(capsys):
    rows = [Row({"size": 3}, {"a": 1.0}, 2.0)]
    bench.present(rows, lambda row: {"size": "3"}, "cpu", False, lambda rows: ["below"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| size |", "| --- |", "| 3 |", "", "below"]
    bench.present(rows, lambda row: {"size": "3"}, "cpu", True)
    assert json.loads(capsys.readouterr().out)["rows"] == [{"size": 3, "medians": {"a": 1.0}, "ratio": 2.0}]
