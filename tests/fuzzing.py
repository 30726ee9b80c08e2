"""Every reader of files in one table: the folder it reads from, the file there that is damaged, and how.

A reader ends in success or in one clear error, a `MoeError` of one line that names the file. Everything else is an
escape: another exception, a warning, a message of several lines, half a result. Time and memory are what fuzz.py and
test_fuzz.py watch. `python tests/fuzz.py` runs all of the table.
"""

import base64
import json
import shutil
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from damage import Damage, any_bytes, any_json, any_lines, any_shard, any_tensors, written
from safetensors.torch import load_file, save_file

import moe
from moe import hub
from moe.checkpoint import RunFolder, State, read_state
from moe.config import DataConfig, ModelConfig, MoeError, RunConfig, TrainConfig
from moe.corpus import open_corpus, prepare
from moe.corpus.bpe import train_bpe
from moe.corpus.imported import HubTokenizer
from moe.data import Batches, TokenStream
from moe.hub.card import facts_of
from moe.hub.configs import read_config, write_config
from moe.hub.families import FAMILIES
from moe.hub.folder import read_object
from moe.hub.imports import import_run
from moe.hub.tokenizers import document_of, read_tokenizer
from moe.lab.report import make
from moe.lab.report.balance import meaning
from moe.lab.report.history import History
from moe.lab.report.page import as_json
from moe.lab.studies import Arm, Budget, Study
from moe.lab.study import in_words
from moe.lab.study_plots import draw_study
from moe.lab.study_runs import Results, protocol_of, read_results
from moe.lab.study_summary import summarize
from moe.machine.device import Runtime, resolve_device
from moe.machine.files import write_whole
from moe.machine.reproduce import random_state, set_random_state
from moe.machine.stored import sha256_of, verify
from moe.machine.weights import tensors_of
from moe.metrics import CollapseAlarm, MetricsLog, read_metrics
from moe.model import Transformer
from moe.optim import Average, Optimizers
from moe.presets import presets
from moe.sampling import SamplingError
from moe.tokenizer import END_OF_TEXT, BytePairs, NoTokenizer, Tokenizer, bytes_tokenizer

TEXT = "It was the best of times, it was the worst of times; 1859, été, 日本 \n\n" * 8
MODEL = ModelConfig(
    vocab_size=272,
    hidden_size=16,
    num_hidden_layers=2,
    max_position_embeddings=32,
    num_attention_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    intermediate_size=16,
    n_routed_experts=4,
    moe_intermediate_size=8,
    num_nextn_predict_layers=1,
)
TRAIN = TrainConfig(tokens_per_step=32, sequence_length=16, short_until=0.0)
RUN = RunConfig(preset="debug", steps=30, model=MODEL, data=DataConfig(vocab_size=264), train=TRAIN)
CPU = Runtime("cpu", "float32", False, "loop", 1, 1)
STUDY = Study("Which?", (Arm("a"), Arm("b")), preset="debug", budget=Budget(steps=3), race=True)
CHECKPOINT = "checkpoints/00000001"


class Reader(NamedTuple):
    build: Callable[[Path], None]  # a valid folder
    file: str  # in it, to be damaged
    read: Callable[[Path], object]
    damage: Damage
    share: int  # of 100,000 inputs, by what one costs
    seal: Callable[[Path], None] = lambda folder: None  # makes other files agree with the damaged one
    names: bool = True  # the errors name the file, or its folder

    def __call__(self, data: bytes, folder: Path) -> object:
        """Put the bytes where the reader finds them, and read them."""
        (folder / self.file).write_bytes(data)
        self.seal(folder)
        return self.read(folder)


class Outcome(NamedTuple):
    kind: str  # read, refused or escape
    message: str = ""


def outcome(reader: Reader, data: bytes, folder: Path) -> Outcome:
    """What comes of these bytes. Raises only what is no Exception."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reader(data, folder)
    except MoeError as error:
        message = str(error)
        place = Path(reader.file)
        clear = message.isprintable() and 0 < len(message) < 5000
        if clear and (not reader.names or place.name in message or str(folder) in message):
            return Outcome("refused", message)
        return Outcome("escape", f"not one clear line that names the file: {message[:500]!r}")
    except Exception:
        return Outcome("escape", traceback.format_exc()[-3000:])
    return Outcome("read")


# -- a run -------------------------------------------------------------------------------------------------------------


def words() -> BytePairs:
    return train_bpe([TEXT], 264)


def build_run(folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """As after a step of training."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokenizer, model = tokenizer or words(), Transformer(MODEL)
    optimizers, average = Optimizers(model, RUN.optim), Average(model, 0.5)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizers.step(0.0)
    run, identity = RunFolder(folder), {"text": "t", "tokenizer": tokenizer.hash}
    run.write_setup(RUN, CPU, tokenizer, identity)
    state = State(1, 32, 0.5, 0, 2, random_state(), {"0": 3})
    run.save(tensors_of(model), [*optimizers.state(), *average.state()], state)
    log = MetricsLog(run.metrics)
    for step in (1, 2, 3):
        log.write(record(step))


def record(step: int) -> dict[str, Any]:
    balance = {"max_vio": 0.1, "entropy": 0.9, "dead_experts": 0, "load_by_layer": [[3, 1, 2, 2], [2, 2, 2, 2]]}
    balance |= {"max_vio_by_layer": [0.5, 0.0], "entropy_by_layer": [0.9, 1.0], "dead_experts_by_layer": [0, 0]}
    balance |= {"balance_loss": 1.0, "grad_norm": 0.5, "lr_share": 1.0, "val_max_vio": 0.1, "val_dead_experts": 0}
    prices = {f"val_{name}": 2.5 for name in ("loss", "nats_per_character", "bits_per_byte")} | {"val_tokens": 39}
    return (
        {"step": step, "tokens": 32 * step, "seconds": 0.5, "loss": 3.0, "nats_per_character": 2.0} | balance | prices
    )


def seal_checkpoint(folder: Path) -> None:
    """A manifest that is right about the files, whatever they hold."""
    checkpoint = folder / CHECKPOINT
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    files = {
        name: {"size": (checkpoint / name).stat().st_size, "sha256": sha256_of(checkpoint / name)} for name in names
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def open_and_write(folder: Path) -> None:
    run = moe.load(folder, device="cpu")
    with suppress(SamplingError):  # weights may be any numbers
        moe.generate_text(run, "It was", max_new_tokens=2, temperature=0.0)


def read_setup(folder: Path) -> None:
    """As training reads it that goes on, and as everything else does."""
    config, runtime, _ = RunFolder(folder).read_setup()
    resolve_device(runtime.device)
    with runtime.autocast() if runtime.device == "cpu" else nullcontext():
        assert config.train.sequences_per_step // runtime.micro_batch_size >= 0
    torch.empty(0, dtype=runtime.torch_dtype)
    torch.set_num_threads(min(runtime.threads, 1))
    open_and_write(folder)


def read_checkpoint(folder: Path) -> None:
    run = RunFolder(folder)
    verify(run.checkpoints()[-1])
    run.check_continuable()


def read_position(folder: Path) -> None:
    """As training does that goes on."""
    state = read_state(folder / CHECKPOINT)
    set_random_state(state.rng)
    assert state.progress(RUN) >= 0
    CollapseAlarm(2, state.balance, [1, 2]).check(torch.ones(2, 4))
    batches = Batches(TokenStream(open_corpus(folder / "corpus"), "train"), 1, 16, 1, state.cursor)
    batches.next()


def build_run_and_corpus(folder: Path) -> None:
    build_run(folder)
    build_corpus(folder / "corpus")


def restore_and_step(folder: Path) -> None:
    model = Transformer(MODEL)
    optimizers, average = Optimizers(model, RUN.optim), Average(model, 0.5)
    RunFolder(folder).restore(model, optimizers, average)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizers.step(0.5)
    average.update(2)


def read_log(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    read_metrics(path)
    facts_of(moe.checkpoint.open_run(folder))
    before = path.read_bytes()
    MetricsLog(path, keep_steps=2)
    path.write_bytes(before)


# -- tokenizers and prompts --------------------------------------------------------------------------------------------


def imported_words() -> HubTokenizer:
    config = {"bos_token": END_OF_TEXT, "eos_token": {"content": END_OF_TEXT}, "chat_template": "{{ x }}"}
    return HubTokenizer(document_of(words()), config)


def build_words(folder: Path) -> None:
    folder.mkdir()
    write_whole(folder / "tokenizer.json", json.dumps(words().to_json()).encode())


def build_imported(folder: Path) -> None:
    folder.mkdir()
    write_whole(folder / "tokenizer.json", json.dumps(imported_words().to_json()).encode())


def use_tokenizer(tokenizer: Tokenizer) -> None:
    for text in ("It was 1859,\n", "", "日本 \U0001f642", END_OF_TEXT, "a" * 300):
        ids = tokenizer.prompt(text.encode())
        stream = tokenizer.stream()
        assert isinstance("".join(map(stream.push, ids)) + stream.finish(), str)
        tokenizer.decode(ids)
    tokenizer.encode_documents(["a b", "c"])
    tokenizer.encode_bytes(b"\xff \x80a")
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size


def use_stored(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if not isinstance(tokenizer, NoTokenizer):
        use_tokenizer(tokenizer)


def any_words(data: bytes, random: Random) -> bytes:
    """A damaged tokenizer.json of ours, most of the time with a hash that is right."""
    data = any_json(data, random)
    if random.random() < 0.8:
        try:
            stored = json.loads(data)
            if stored.get("kind") == "huggingface":
                stored["hash"] = HubTokenizer(stored["tokenizer"], stored["config"], frozenset(stored["stops"])).hash
            else:
                stored["hash"] = BytePairs(
                    [base64.b64decode(token) for token in stored["ranks"]], stored["pattern"]
                ).hash
            data = written(stored, random)
        except (MoeError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
    return data


@lru_cache
def opened(folder: Path) -> moe.Run:
    return moe.load(folder, device="cpu")


def build_prompt(folder: Path) -> None:
    for name, tokenizer in (("bpe", words()), ("bytes", bytes_tokenizer()), ("imported", imported_words())):
        build_run(folder / name, tokenizer)
    (folder / "prompt").write_bytes("It was été \U0001f642\n".encode())


def continue_prompt(folder: Path) -> None:
    data = (folder / "prompt").read_bytes()
    for name in ("bpe", "bytes", "imported"):
        run = opened(folder / name)
        ids = run.tokenizer.encode_bytes(data)
        assert run.tokenizer.decode_bytes(ids.tolist()) == data
        assert "".join(map((stream := run.tokenizer.stream()).push, ids.tolist())) + stream.finish() == data.decode(
            errors="replace"
        )
    moe.generate_text(run, data[:200].decode("utf-8", "surrogateescape"), max_new_tokens=2, temperature=0.0)


# -- text and token shards ---------------------------------------------------------------------------------------------


def build_text(folder: Path, name: str = "text.txt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{TEXT[:100]} {number}", "id": number}) for number in range(8)]
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else TEXT, "utf-8")


def settings(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(str(path), vocab_size=264, val_fraction=0.2, **changes)


def build_corpus(folder: Path) -> None:
    build_text(folder.parent)
    prepare(settings(folder.parent / "text.txt"), folder, words())


def read_corpus(folder: Path) -> None:
    corpus = prepare(DataConfig(str(folder)))
    for split in corpus.shards:
        stream = TokenStream(corpus, split)
        corpus.tokenizer.decode(stream.read(0, len(stream)).tolist())
        assert corpus.characters(split) >= 0 <= corpus.bytes(split)
    assert corpus.characters("train") / corpus.tokens("train") > 0  # what training divides by


def prepare_text(folder: Path, name: str) -> None:
    """Two ways with what is no text; nothing is left of what is refused."""
    out = folder / "prepared"
    for changes in ({"errors": "replace", "tokenizer": "bytes"}, {}):
        try:
            read_corpus(prepare(settings(folder / name, **changes), out).folder)
        finally:
            left = [path.name for path in folder.iterdir() if path.name not in (name, "prepared")]
            shutil.rmtree(out, ignore_errors=True)
            assert not left, f"{left} were left behind"


def build_begun(folder: Path) -> None:
    """What a preparation that was killed leaves, its last step undone."""
    build_text(folder)
    path = prepare(settings(folder / "text.txt"), folder / "prepared").folder
    (path / "corpus.json").unlink()
    path.rename(folder / "begun")


def go_on(folder: Path) -> None:
    partial = shutil.copytree(folder / "begun", folder / "prepared.partial")
    try:
        read_corpus(prepare(settings(folder / "text.txt"), folder / "prepared").folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder / "prepared", ignore_errors=True)


# -- Hugging Face folders ----------------------------------------------------------------------------------------------


def build_hub(folder: Path, shard_bytes: int = 10**9) -> None:
    """DeepSeek's form: multi-token prediction, a matrix in FP8."""
    torch.manual_seed(0)
    hub.save(Transformer(MODEL), words(), folder, mtp=True, shard_bytes=shard_bytes)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    (folder / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.gate_proj.weight"
    file, tensors = next((file, found) for file in folder.glob("*.safetensors") if name in (found := load_file(file)))
    scales = torch.ones(1, 2)
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(tensors, file)
    if shard_bytes < 10**9:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"][f"{name}_scale_inv"] = file.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def build_classed(folder: Path) -> None:
    """Of a class that makes its tokenizer anew."""
    build_hub(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<x>"]}
    config["added_tokens_decoder"] = {"263": {"content": END_OF_TEXT, "special": True}}
    path.write_text(json.dumps(config))


def read_hub(folder: Path) -> None:
    model = hub.load(folder, device="cpu")
    with suppress(SamplingError):
        moe.generate(model, torch.zeros(1, 3, dtype=torch.int64), 1, temperature=0.0)


def import_hub(folder: Path) -> None:
    """All of it is there, or nothing."""
    read_config(read_object(folder / "config.json"), "deepseek")
    out = folder / "run"
    try:
        import_run(folder, out)
        open_and_write(out)
    except MoeError:
        assert not list(out.rglob("*.json")) or RunFolder(out).checkpoints()
        raise
    finally:
        shutil.rmtree(out, ignore_errors=True)


def use_hub_tokenizer(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    assert tokenizer is not None
    use_tokenizer(tokenizer)


def export(folder: Path) -> None:
    out = folder / "exported"
    try:
        hub.exports.export_run(folder, out)
    except MoeError:
        assert not out.exists()
        raise
    finally:
        shutil.rmtree(out, ignore_errors=True)


def any_family(data: bytes, random: Random) -> bytes:
    """A config.json, now and then another family's."""
    if random.random() < 0.3:
        grouped = replace(MODEL, attention="grouped", num_nextn_predict_layers=0)
        data = json.dumps(write_config(random.choice(FAMILIES), grouped)).encode()
    return any_json(data, random)


LAYERS = ["1", "2"]  # of the records here


def read_curves(folder: Path) -> None:
    """What a report makes of metrics."""
    history, config = History.read(folder / "metrics.jsonl"), presets()["debug"]
    config = replace(config, model=config.sized_model)
    assert make.curves_part(config, history, "", drawn := make.curves(config, history))
    assert make.balance_part(meaning(history, config.model, LAYERS, []), make.balance(history, LAYERS, []))
    assert make.cost_part(config, history, {"runtime": {"device": "cpu", "threads": 1}}, None)
    assert make.key_figures(history) or not len(history)
    assert json.loads(as_json(drawn)) is not None


# -- studies -----------------------------------------------------------------------------------------------------------


def build_results(folder: Path) -> None:
    folder.mkdir()
    finals = {"parameters": 9, "active": 5, "flops_per_token": 100, "steps": 2, "tokens": 20, "seconds": 60.0}
    finals |= {"val_bits_per_byte": 2.0, "val_nats_per_character": 1.4, "val_max_vio": 0.5, "val_dead_experts": 0}
    curve = {"tokens": [10, 20], "seconds": [30.0, 60.0], "flops": [1e3, 2e3], "val_bits_per_byte": [3.0, 2.0]}
    run = {"setting": 0, "machine": "m", "finals": finals, "curve": curve}
    runs = tuple({"arm": arm, "seed": seed, **run} for arm in "ab" for seed in (1, 2))
    sweep = ({"arm": "a", "setting": 0, "seed": 0, "machine": "m", "finals": finals},)
    protocol = protocol_of(STUDY)
    protocol["arms"][0]["tries"] = [{"optim.adam_lr": 0.1}, {"optim.adam_lr": 0.2}]
    Results("x", protocol, {"torch": "2"}, {"text": "t"}, sweep, runs).write(folder / "results.json")


def read_study(folder: Path, draw: bool = False) -> None:
    results = read_results(folder / "results.json")
    if results.study == "x":  # asked for by its name
        summary = summarize(results, STUDY)
        assert in_words(summary)
        assert json.dumps(summary)
        if draw:
            draw_study(results, STUDY, folder / "pictures")


# -- all of them -------------------------------------------------------------------------------------------------------

READERS = {
    "config": Reader(build_run, "config.json", read_setup, any_json, 2000),
    "manifest": Reader(build_run, f"{CHECKPOINT}/manifest.json", read_checkpoint, any_json, 16000),
    "state": Reader(build_run_and_corpus, f"{CHECKPOINT}/state.json", read_position, any_json, 11000),
    "model": Reader(build_run, f"{CHECKPOINT}/model.safetensors", open_and_write, any_tensors, 1500, seal_checkpoint),
    "exported model": Reader(build_run, f"{CHECKPOINT}/model.safetensors", export, any_tensors, 600, seal_checkpoint),
    "optimizer": Reader(
        build_run, f"{CHECKPOINT}/optimizer.safetensors", restore_and_step, any_tensors, 2000, seal_checkpoint
    ),
    "metrics": Reader(build_run, "metrics.jsonl", read_log, any_lines, 8000),
    "report": Reader(build_run, "metrics.jsonl", read_curves, any_lines, 1500),
    "tokenizer": Reader(build_words, "tokenizer.json", use_stored, any_words, 8000),
    "imported tokenizer": Reader(build_imported, "tokenizer.json", use_stored, any_words, 6000),
    "prompt": Reader(build_prompt, "prompt", continue_prompt, any_bytes, 1500),
    "corpus": Reader(build_corpus, "corpus.json", read_corpus, any_json, 10000),
    "shard": Reader(build_corpus, "train-00000.bin", read_corpus, any_shard, 13000),
    "plan": Reader(build_begun, "begun/plan.json", go_on, any_json, 600, names=False),
    "begun shard": Reader(build_begun, "begun/train-00000.bin", go_on, any_shard, 600, names=False),
    "text": Reader(build_text, "text.txt", partial(prepare_text, name="text.txt"), any_bytes, 600, names=False),
    "lines": Reader(
        partial(build_text, name="text.jsonl"),
        "text.jsonl",
        partial(prepare_text, name="text.jsonl"),
        any_lines,
        600,
        names=False,
    ),
    "hub config": Reader(build_hub, "config.json", import_hub, any_family, 1000),
    "hub index": Reader(partial(build_hub, shard_bytes=8000), "model.safetensors.index.json", read_hub, any_json, 1200),
    "hub tensors": Reader(build_hub, "model.safetensors", read_hub, any_tensors, 1500),
    "hub tokenizer": Reader(build_classed, "tokenizer.json", use_hub_tokenizer, any_json, 3000),
    "hub tokenizer config": Reader(build_classed, "tokenizer_config.json", use_hub_tokenizer, any_json, 2500),
    "results": Reader(build_results, "results.json", read_study, any_json, 10000, names=False),
    "study picture": Reader(build_results, "results.json", partial(read_study, draw=True), any_json, 100, names=False),
}
