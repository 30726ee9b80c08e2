"""Import and export as their users meet them: whole folders, runs, and the two commands."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, TEXT, build, run_training
from safetensors.torch import load_file, save_file

import moe
import moe.lab.__main__ as lab
import sample
import train
from moe import hub
from moe.hub.__main__ import main
from moe.hub.families import FAMILIES
from moe.hub.parity import draw
from moe.lab.score import score
from moe.machine.weights import tensors_of

PROMPT = "ROMEO:\nWhat"


def command(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["moe.hub", *map(str, arguments)])
    return main()


def saved(folder: Path, name: str = "DeepseekV3", dtype=torch.float32, context: int = 64, **options) -> Path:
    """A small model of transformers, as it saves it."""
    model = draw(next(family for family in FAMILIES if family.name == name), seed=7)
    model.config.max_position_embeddings = context
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def assert_same(one, other) -> None:
    for (name, before), (_, after) in zip(tensors_of(one).items(), tensors_of(other).items(), strict=True):
        assert torch.equal(before, after), name


def rewrite(folder: Path, change) -> None:
    """Change a folder's tensors, given by name, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run with a context that holds 100 new tokens. Not to be written to."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    assert run_training("--out", folder, "--data", TEXT, "--quiet", "--model.max-position-embeddings", "192") == 0
    return folder


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    """That run as a Hugging Face folder. Not to be written to."""
    hub.export_run(trained, trained.parent / "exported")
    return trained.parent / "exported"


def printed(script, monkeypatch, capsys, *arguments) -> dict:
    """The JSON object that one of the scripts prints."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["script", *map(str, arguments), "--json"])
    assert script.main() == 0
    return json.loads(capsys.readouterr().out)


def open_in_transformers(folder: Path, tokenizer: bool = True):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, remarks = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(remarks.values())
    return model.eval(), AutoTokenizer.from_pretrained(folder) if tokenizer else None


def test_sample_py_writes_the_same_100_tokens_as_transformers(trained, exported, monkeypatch, capsys):
    model, tokenizer = open_in_transformers(exported)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    theirs = model.generate(**inputs, max_new_tokens=100, do_sample=False)[0, inputs.input_ids.shape[1] :]
    greedy = ("--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 100)
    (ours,) = printed(sample, monkeypatch, capsys, trained, *greedy)["samples"]
    assert len(ours["tokens"]) == 100
    assert (ours["text"], ours["tokens"]) == (tokenizer.decode(theirs), theirs.tolist())
    prompt = inputs.input_ids.shape[1]
    fitting = model.config.max_position_embeddings - prompt  # beyond, transformers goes on where positions end
    with torch.no_grad():
        logprobs = (
            model(torch.cat([inputs.input_ids[0], theirs[:fitting]])[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
        )
    wanted = logprobs.gather(-1, theirs[: len(logprobs), None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours["logprobs"][: len(wanted)]), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_lab_prices_a_text_as_transformers_does(trained, exported, tmp_path, monkeypatch, capsys):
    model, tokenizer = open_in_transformers(exported)
    (tmp_path / "text").write_text(TEXT.read_text()[-60:])  # within one window
    ids = tokenizer((tmp_path / "text").read_text(), return_tensors="pt").input_ids
    ours = printed(lab, monkeypatch, capsys, "score", trained, tmp_path / "text", "--windows", "separate")
    assert ours["tokens"] == ids.shape[1] - 1
    assert ours["nats_per_token"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


def test_an_export_imported_is_the_same_model_which_samples_scores_and_trains_on(
    trained, exported, tmp_path, monkeypatch, capsys
):
    assert command(monkeypatch, "import", exported, tmp_path / "run") == 0
    assert "imported DeepseekV3, 49.5k parameters, 33.1k active" in capsys.readouterr().out
    ours, again = moe.load(trained, "cpu"), moe.load(tmp_path / "run", "cpu")
    assert_same(ours.model, again.model)
    assert moe.generate_text(ours, PROMPT, 40, seed=1) == moe.generate_text(again, PROMPT, 40, seed=1)
    data = "Für alle 100 Bürger…\n".encode() * 3
    assert score(ours, data) == score(again, data)
    onwards = tmp_path / "onwards"
    assert run_training("--init-from", tmp_path / "run", "--out", onwards, "--data", TEXT, "--quiet") == 0
    first = json.loads((onwards / "metrics.jsonl").read_text().split("\n")[0])
    assert first["loss"] < 5  # an untrained one costs log 320, 5.8
    assert command(monkeypatch, "export", onwards, tmp_path / "out") == 0
    open_in_transformers(tmp_path / "out")
    assert "| started from | run |" in (tmp_path / "out" / "README.md").read_text()


def test_an_imported_run_is_never_resumed_nor_written_over(exported, tmp_path, monkeypatch, capsys):
    hub.import_run(exported, tmp_path / "run")
    assert run_training("--out", tmp_path / "run", "--resume", "auto") == 2
    assert "start from it with --init-from" in capsys.readouterr().err
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert command(monkeypatch, "import", exported, tmp_path / "run") == 2
    assert "holds a run: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["DeepseekV3", "Mixtral", "Olmoe"])
def test_import_and_export_give_every_byte_back(name, dtype, tmp_path, monkeypatch):
    theirs = saved(tmp_path / "theirs", name, dtype)
    assert command(monkeypatch, "import", theirs, tmp_path / "run") == 0
    assert command(monkeypatch, "export", tmp_path / "run", tmp_path / "again") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "again"))
    assert before.keys() == after.keys()
    for tensor, stored in before.items():
        assert torch.equal(after[tensor].view(torch.uint8), stored.view(torch.uint8)), tensor
        assert after[tensor].dtype == stored.dtype
    assert open_in_transformers(tmp_path / "again", tokenizer=False)[0].dtype == dtype


def test_the_dtype_of_an_import_and_an_export_can_be_chosen_but_for_the_routers_bias(tmp_path):
    theirs = saved(tmp_path / "theirs", dtype=torch.bfloat16)
    for dtype, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        hub.import_run(theirs, tmp_path / dtype, dtype=dtype)
        stored = load_file(next(tmp_path.glob(f"{dtype}/checkpoints/*/model.safetensors")))
        for name, tensor in stored.items():
            assert tensor.dtype == (torch.float32 if name.endswith("expert_bias") else getattr(torch, dtype))
        again = tmp_path / f"{dtype} as {other}"
        hub.export_run(tmp_path / dtype, again, dtype=other)
        for name, tensor in load_file(again / "model.safetensors").items():
            assert tensor.dtype == (torch.float32 if name.endswith("_bias") else getattr(torch, other))
        assert json.loads((again / "config.json").read_text())["torch_dtype"] == other
    with pytest.raises(hub.HubError, match="dtype = float16 is not known"):
        hub.save(hub.load(theirs, device="cpu"), None, tmp_path / "out", dtype="float16")


def test_shards_come_in_and_go_out(tmp_path):
    theirs = saved(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list(theirs.glob("*.safetensors"))) > 2
    ours = hub.load(theirs, device="cpu")
    hub.save(ours, None, tmp_path / "again", shard_bytes=30_000)
    assert len(list(tmp_path.glob("again/*.safetensors"))) > 2
    open_in_transformers(tmp_path / "again", tokenizer=False)
    assert_same(ours, hub.load(tmp_path / "again", device="cpu"))


def misshape(tensors: dict) -> None:
    tensors["model.norm.weight"] = torch.ones(7)
    del tensors["model.layers.0.input_layernorm.weight"]
    tensors["model.layers.0.self_attn.strange.weight"] = torch.ones(1)


def test_what_is_missing_unexpected_or_misshapen_is_listed_before_anything_is_written(tmp_path, monkeypatch, capsys):
    theirs = saved(tmp_path / "theirs")
    rewrite(theirs, misshape)
    assert command(monkeypatch, "import", theirs, tmp_path / "run") == 2
    said = capsys.readouterr().err
    for part in (
        "1 missing: model.layers.0.input_layernorm.weight",
        "1 unexpected: model.layers.0.self_attn.strange.weight",
        "1 of another shape: model.norm.weight (7,) instead of",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()


def test_layers_beyond_those_of_the_configuration_are_unexpected(tmp_path):
    theirs = saved(tmp_path / "theirs", "Llama")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(hub.HubError, match=r"unexpected: model\.layers\.1\."):
        hub.load(theirs)


@pytest.mark.parametrize("changes", [{"vocab_size": 10**12}, {"n_routed_experts": 10**6}, {"num_hidden_layers": 9999}])
def test_sizes_beyond_all_tensors_are_refused_before_anything_is_built(changes, tmp_path):
    theirs = saved(tmp_path / "theirs")
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(hub.HubError, match=f"{next(iter(changes))} = .* more than all its tensors hold"):
        hub.load(theirs)


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_import_begins_again_over_what_a_killed_one_left_and_says_when_memory_will_not_do(tmp_path, monkeypatch):
    theirs = saved(tmp_path / "theirs", context=4096)
    with monkeypatch.context() as patch:
        patch.setattr("moe.machine.device.machine_bytes", lambda device: 1000)
        with pytest.raises(moe.MoeError, match="this machine has"):
            hub.import_run(theirs, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("moe.checkpoint.RunFolder.save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hub.import_run(theirs, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").exists()
    hub.import_run(theirs, tmp_path / "run")
    assert moe.load(tmp_path / "run").config.train.sequence_length == 2048  # of a context of 4096


def test_an_empty_folder_one_stands_in_is_filled_and_not_replaced(exported, trained, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    hub.export_run(trained, Path())
    assert sorted(file.name for file in Path().iterdir()) == sorted(file.name for file in exported.iterdir())
    assert "# mine" in Path("README.md").read_text()


def test_a_model_with_a_short_context_is_trained_on_in_windows_that_fit(debug_run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.train", lambda *arguments: seen.append(arguments[1]))
    seen: list = []
    run_from = ["--init-from", str(debug_run), "--out", str(tmp_path / "more"), "--plain"]
    assert train.main(run_from) == 0  # the preset's windows have 256 tokens, the model's context 64
    assert (seen[0].train.sequence_length, seen[0].train.tokens_per_step) == (64, 4096)


def test_a_folder_of_the_wrong_kind_is_said_to_be_one(exported, tmp_path, capsys):
    assert run_training("--init-from", exported, "--out", tmp_path / "more") == 2
    assert "is a Hugging Face folder, not a run" in capsys.readouterr().err
    with pytest.raises(hub.HubError, match="reading = remote is not known"):
        hub.load(exported, reading="remote")


def test_tables_that_older_files_keep_are_passed_over(tmp_path):
    theirs = saved(tmp_path / "theirs", "Llama")
    rewrite(theirs, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    hub.load(theirs)


def test_a_head_that_is_said_to_be_the_embedding_must_be_it(tmp_path):
    model = build(tie_word_embeddings=True)
    hub.save(model, None, tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    copy = model.embed_tokens.weight.detach().clone()
    rewrite(tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": copy}))
    again = hub.load(tmp_path / "tied", device="cpu")
    assert again.lm_head.weight is again.embed_tokens.weight
    rewrite(tmp_path / "tied", lambda tensors: tensors.update({"lm_head.weight": copy + 1}))
    with pytest.raises(hub.HubError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        hub.load(tmp_path / "tied")


def test_multi_token_prediction_comes_in_or_is_left_out(tmp_path, monkeypatch, capsys):
    model = build(num_nextn_predict_layers=2)
    hub.save(model, None, tmp_path / "deep", mtp=True)
    layers = SMALL.num_hidden_layers
    assert f"model.layers.{layers + 1}.shared_head.head.weight" in load_file(tmp_path / "deep" / "model.safetensors")
    again = hub.load(tmp_path / "deep", device="cpu")
    assert_same(model, again)
    assert command(monkeypatch, "import", tmp_path / "deep", tmp_path / "run", "--skip-mtp") == 0
    assert "2 modules skipped" in capsys.readouterr().out
    assert moe.load(tmp_path / "run").config.model.num_nextn_predict_layers == 0
    hub.import_run(tmp_path / "deep", tmp_path / "whole")
    assert command(monkeypatch, "export", tmp_path / "whole", tmp_path / "plain") == 0
    assert "2 modules left out" in capsys.readouterr().out
    assert command(monkeypatch, "export", tmp_path / "whole", tmp_path / "same", "--mtp") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("deep", "same"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(f"layers.{layers}." in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


def test_a_module_of_multi_token_prediction_with_a_head_of_its_own_is_refused(tmp_path):
    hub.save(build(num_nextn_predict_layers=1), None, tmp_path / "deep", mtp=True)
    head = f"model.layers.{SMALL.num_hidden_layers}.shared_head.head.weight"
    rewrite(tmp_path / "deep", lambda tensors: tensors[head].add_(1))
    with pytest.raises(hub.HubError, match=r"shared_head\.head\.weight differs from lm_head\.weight"):
        hub.load(tmp_path / "deep")
    assert hub.load(tmp_path / "deep", skip_mtp=True).config.num_nextn_predict_layers == 0


def test_a_model_without_a_tokenizer_is_imported_exported_and_trained_on_but_reads_no_text(
    tmp_path, monkeypatch, capsys
):
    theirs = saved(tmp_path / "theirs")
    assert command(monkeypatch, "import", theirs, tmp_path / "run") == 0
    assert "no tokenizer.json there" in capsys.readouterr().out
    run = moe.load(tmp_path / "run", "cpu")
    with pytest.raises(moe.MoeError, match="imported without a tokenizer"):
        moe.generate_text(run, "Once")
    with pytest.raises(moe.MoeError, match="imported without a tokenizer"):
        score(run, b"Once")
    assert run_training("--init-from", tmp_path / "run", "--out", tmp_path / "more", "--data", TEXT) == 2
    assert "imported without a tokenizer" in capsys.readouterr().err
    hub.save(run.model, run.tokenizer, tmp_path / "again")
    assert not (tmp_path / "again" / "tokenizer.json").exists()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["eos_token_id"] is None  # the family's own would end texts at token 1


def test_a_tokenizer_may_come_from_another_folder_if_it_fits(exported, tmp_path):
    theirs = saved(tmp_path / "theirs")  # 96 tokens, the debug run's tokenizer has 320
    with pytest.raises(hub.HubError, match="its tokenizer has 320 tokens, the model 96"):
        hub.import_run(theirs, tmp_path / "run", tokenizer=exported)
    with pytest.raises(hub.HubError, match=r"nowhere has no tokenizer\.json"):
        hub.import_run(theirs, tmp_path / "run", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((exported / name).read_bytes())
    hub.import_run(tmp_path / "bare", tmp_path / "run", tokenizer=exported)
    assert moe.load(tmp_path / "run").tokenizer.vocab_size == 320


def test_an_architecture_without_a_family_and_a_moved_bias_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(hub.HubError, match=r"n_shared_experts = 0 \(there at least 1\)"):
        hub.save(build(n_shared_experts=0), None, tmp_path / "out")
    softmax = {"scoring_func": "softmax", "norm_topk_prob": False}
    with pytest.raises(hub.HubError, match=r"DeepseekV2 routers have no bias, but .*--model\.bias-update-speed 0"):
        hub.save(build(**softmax), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.save(build(**softmax, bias_update_speed=0.0), None, tmp_path / "out")


def test_the_card_says_what_the_run_was_and_no_text_becomes_markup(trained, exported, tmp_path):
    card = (exported / "README.md").read_text()
    last = json.loads((trained / "metrics.jsonl").read_text().split("\n")[-2])
    for fact in (
        "library_name: transformers",
        "49.5k, 33.1k active for a token",
        "30, 15,360 tokens",
        f"{last['val_nats_per_character']:.4f} nats per character",
        "| text | input.txt |",
    ):
        assert fact in card
    folder = tmp_path / "<b>a|b`"
    hub.save(build(), None, folder)
    assert "<b>" not in (folder / "README.md").read_text()


def test_an_imported_run_says_where_it_is_from(exported, tmp_path):
    hub.import_run(exported, tmp_path / "run")
    hub.export_run(tmp_path / "run", tmp_path / "again")
    assert "| imported from | exported, DeepseekV3 |" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fp8_weights_are_kept_as_bfloat16_and_loaded_as_asked(dtype, tmp_path):
    from moe.hub.parity import BLOCK, quantise

    theirs = saved(tmp_path / "theirs", "Llama")
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(theirs, lambda tensors: tensors.update(quantise(name, tensors[name])))
    config = json.loads((theirs / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (theirs / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    model = hub.load(theirs, device="cpu", dtype=dtype)
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    hub.import_run(theirs, tmp_path / "run")
    stored = load_file(next(tmp_path.glob("run/checkpoints/*/model.safetensors")))
    both = stored["layers.0.mlp.gate_up_proj.weight"]
    assert both.dtype == torch.float32  # beside a float32 half; the FP8 half is rounded to nothing less
    assert model.config == replace(model.config, first_k_dense_replace=model.config.num_hidden_layers)


def test_loading_computes_in_bfloat16_if_told(tmp_path):
    theirs = saved(tmp_path / "theirs")
    tokens = torch.randint(96, (1, 16))
    exact, rounded = (hub.load(theirs, device="cpu", dtype=dtype)(tokens) for dtype in ("float32", "bfloat16"))
    assert F.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99
    with pytest.raises(moe.MoeError, match="dtype = float16 is not known"):
        hub.load(theirs, dtype="float16")
