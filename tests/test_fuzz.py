"""Whatever a file holds, reading it ends in success or in one clear error: a sample of tests/fuzz.py, and a name for
each thing that once got through."""

import base64
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from fuzzing import CHECKPOINT, READERS, Outcome, Reader, outcome, record
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import moe
from moe.config import MoeError
from moe.corpus import HEADER, CorpusError, open_corpus
from moe.machine.stored import CheckpointError, verify
from moe.tokenizer import BytePairs

ROOT = Path(__file__).parent.parent
SLOW = {"report": 100, "study picture": 10, "plan": 30, "begun shard": 30, "text": 30, "lines": 30, "hub config": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A valid folder for each reader, made when it is asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("fuzz") / "folder"
            READERS[name].build(made[name])
        return made[name]

    return folder


def fed(reader: Reader, data: bytes, folder: Path) -> Outcome:
    """What comes of it; the valid file lies there again afterwards."""
    path = folder / reader.file
    valid = path.read_bytes()
    try:
        return outcome(reader, data, folder)
    finally:
        path.write_bytes(valid)
        reader.seal(folder)


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(name, folders):
    reader, folder = READERS[name], folders(name)
    valid = (folder / reader.file).read_bytes()
    assert fed(reader, valid, folder).kind == "read"

    @settings(max_examples=SLOW.get(name, 60), deadline=10_000, derandomize=True, database=None)
    @given(st.integers(0, 2**64 - 1) | st.binary(max_size=200))
    def check(choice: int | bytes) -> None:
        data = choice if isinstance(choice, bytes) else reader.damage(valid, Random(choice))
        found = fed(reader, data, folder)
        assert found.kind != "escape", found.message

    check()


# -- nothing that a file names lies outside its folder -----------------------------------------------------------------

OUTSIDE = [
    "../x",
    "../../x.json",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "a/b.json",
    "..\\x",
    "C:\\x.json",
    "\0",
    "x\n",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_only_files_of_its_own_folder(folders, tmp_path, name):
    checkpoint = shutil.copytree(folders("manifest") / CHECKPOINT, tmp_path / "00000001")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"size": 0, "sha256": "0"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest\.json names .* which is no file of a checkpoint"):
        verify(checkpoint)


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_prepared_folder_names_only_shards_of_its_own(folders, tmp_path, name):
    corpus = shutil.copytree(folders("corpus"), tmp_path / "corpus")
    listing = json.loads((corpus / "corpus.json").read_text())
    listing["shards"]["val"] = [name]
    (corpus / "corpus.json").write_text(json.dumps(listing))
    with pytest.raises(CorpusError, match=r"corpus\.json names .* which is no shard"):
        open_corpus(corpus)


@pytest.mark.parametrize("name", [*OUTSIDE, "../model.safetensors", "/model.safetensors", "a\\b.safetensors"])
def test_an_index_names_only_files_of_its_own_folder(folders, tmp_path, name):
    folder = shutil.copytree(folders("hub index"), tmp_path / "hub")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {next(iter(index["weight_map"])): name}
    path.write_text(json.dumps(index))
    with pytest.raises(MoeError, match=r"index\.json names the shard .*only \.safetensors files of the same folder"):
        moe.hub.load(folder)


# -- nothing that a file holds is run ----------------------------------------------------------------------------------

RUNS_CODE = re.compile(
    r"\b(torch|np|numpy|yaml) \. (unsafe_)?load\b|(?<!\. )\b(eval|exec|compile|__import__) \(|"
    r"\b(c?pickle|dill|marshal|shelve|joblib|yaml|allow_pickle|trust_remote_code|weights_only)\b"
)


def test_nothing_in_the_sources_can_run_what_a_file_holds():
    files = [*(ROOT / "moe").rglob("*.py"), ROOT / "train.py", ROOT / "sample.py", *(ROOT / "data").rglob("*.py")]
    assert len(files) > 40
    for file in files:
        with open(file, "rb") as opened:
            tokens = list(tokenize.tokenize(opened.readline))
        code = " ".join(token.string for token in tokens if token.type in (tokenize.NAME, tokenize.OP))
        assert not RUNS_CODE.search(code), file
    assert RUNS_CODE.search("x = torch . load ( path )")
    assert RUNS_CODE.search("import pickle")


class Malicious:
    """Unpickled, it leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("prompt", "text")])
def test_a_pickle_in_place_of_any_file_is_refused_unopened(folders, tmp_path, name):
    reader, folder, marker = READERS[name], folders(name), tmp_path / "marker"
    for protocol in (0, 2, 5):
        found = fed(reader, pickle.dumps(Malicious(marker), protocol), folder)
        assert found.kind == ("read" if name in ("plan", "begun shard") else "refused"), found.message  # begun anew
        assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()  # so it would have


def test_a_pickled_model_in_a_hub_folder_is_refused_unopened(folders, tmp_path):
    folder, marker = shutil.copytree(folders("hub tensors"), tmp_path / "hub"), tmp_path / "marker"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(MoeError, match=r"pytorch_model\.bin is a pickle, which can run code"):
        moe.hub.load(folder)
    assert not marker.exists()


# -- what once got through ---------------------------------------------------------------------------------------------


def refused(folders, name: str, data: bytes | object, *words: str) -> None:
    """The reader refuses this file, with these words."""
    data = data if isinstance(data, bytes) else json.dumps(data).encode()
    found = fed(READERS[name], data, folders(name))
    assert found.kind == "refused", found.message
    for word in words:
        assert word in found.message


def valid_json(folders, name: str) -> dict:
    return json.loads((folders(name) / READERS[name].file).read_bytes())


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    "name", ["config", "manifest", "state", "corpus", "shard", "tokenizer", "hub config", "results"]
)
def test_json_nested_beyond_all_measure_is_refused(folders, name):
    refused(folders, name, NESTED[:4096] if name == "shard" else NESTED)


def test_a_line_of_metrics_nested_beyond_all_measure_is_refused(folders):
    refused(folders, "metrics", NESTED + b"\n", "metrics.jsonl, line 1")


def test_a_header_that_claims_2_to_the_60_elements_is_refused_without_allocating(folders):
    for name in ("model", "optimizer", "hub tensors"):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}).encode()
        data = len(header).to_bytes(8, "little") + header + bytes(64)
        refused(folders, name, data, Path(READERS[name].file).name)
        refused(folders, name, (2**60).to_bytes(8, "little") + header)


@pytest.mark.parametrize("change", [{"hidden_size": 2**40}, {"num_hidden_layers": 9_999}, {"vocab_size": 2**62}])
def test_a_configuration_that_claims_more_than_the_tensors_hold_takes_neither_memory_nor_time(folders, change):
    facts = valid_json(folders, "config")
    facts["config"]["model"] |= change
    refused(folders, "config", facts, "does not fit")


def test_a_step_of_more_tokens_than_can_be_counted_is_refused_at_once(folders):
    for tokens in (2**60, 10**400):
        facts = valid_json(folders, "config")
        facts["config"]["train"] |= {"tokens_per_step": tokens, "sequence_length": 1, "micro_batch_size": 7}
        refused(folders, "config", facts, "train.tokens_per_step")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "load"},
        {"device": "auto"},
        {"expert_backend": "?"},
        {"micro_batch_size": 0},
        {"micro_batch_size": 7},
        {"threads": -1},
        {"threads": 2**31},
    ],
)
def test_decisions_that_no_machine_made_are_refused_by_name(folders, change):
    facts = valid_json(folders, "config")
    facts["runtime"] |= change
    refused(folders, "config", facts, f"config.json: runtime.{next(iter(change))}")


def test_a_missing_field_is_named(folders):
    facts = valid_json(folders, "config")
    del facts["runtime"]["threads"]
    refused(folders, "config", facts, "config.json: runtime: missing field 'threads'")


def test_what_a_file_makes_an_error_quote_stays_one_line_of_some_length(folders):
    facts = valid_json(folders, "config") | {"format": 1, "versions": {"git": "a\nb\x1b[2J\ud800" + "x" * 100_000}}
    refused(folders, "config", facts, "another version", "a?b?[2J?x")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1},
        {"seconds": float("nan")},
        {"epoch": -1},
        {"window": 10**6},
        {"window": 10**400},
        {"tokens": 2**64},
        {"balance": {"0": "x"}},
        {"rng": {"torch": "AAAA", "cuda": []}},
        {"rng": {}},
    ],
)
def test_a_place_in_training_that_cannot_be_is_refused(folders, change):
    refused(folders, "state", valid_json(folders, "state") | change, "state.json")


def changed_tensors(folders, name: str, change: Callable[[dict], None]) -> bytes:
    tensors = load((folders(name) / READERS[name].file).read_bytes())
    change(tensors)
    return save(tensors)


NORM = "norm.weight/exp_avg"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(NORM), f"{NORM} is missing"),
        (lambda tensors: tensors.update({"no name": torch.ones(1)}), "no name is not known"),
        (lambda tensors: tensors.update({NORM: torch.ones(3)}), f"{NORM} is (3,) instead of (16,)"),
        (lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.complex64)}), f"{NORM} is C64 instead of"),
        (lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int64)}), f"{NORM} is I64 instead of"),
        (lambda tensors: tensors.update({"norm.weight/step": torch.tensor(-1.0)}), "norm.weight/step"),
        (lambda tensors: tensors.pop("norm.weight/trained"), "norm.weight/trained is missing"),
    ],
)
def test_an_optimizers_state_of_another_model_is_refused_though_the_manifest_is_right(folders, change, says):
    refused(folders, "optimizer", changed_tensors(folders, "optimizer", change), "optimizer.safetensors", says)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers_are_refused(folders, kind):
    for name in ("model", "exported model"):
        data = changed_tensors(folders, name, lambda tensors: tensors.update({"norm.weight": torch.ones(16).to(kind)}))
        refused(folders, name, data, "model.safetensors", "norm.weight is ")


def test_a_pattern_that_may_match_nothing_does_not_end_the_process(folders):
    for pattern in ("(?=a)*", "", "(a|a)*b", "("):
        stored = valid_json(folders, "tokenizer") | {"pattern": pattern}
        stored["hash"] = BytePairs([base64.b64decode(token) for token in stored["ranks"]], pattern).hash
        refused(folders, "tokenizer", stored, "tokenizer.json: the tokenizer's file is damaged: its pattern")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"characters": 0}, "characters = 0"),
        ({"characters": 10**400}, "counts nothing"),
        ({"bytes": -1}, "counts nothing"),
        ({"position": {}}, "counts nothing"),
        ({"position": {"units": -1, "bytes": 0}}, "counts nothing"),
        ({"position": {"units": 1, "bytes": 9, "pass": "x"}}, "counts nothing"),
        ({"sha256": "0"}, "its sha256 is not the header's"),
    ],
)
def test_a_shards_header_counts_what_can_be_counted(folders, change, says):
    data = (folders("shard") / READERS["shard"].file).read_bytes()
    header = json.dumps(json.loads(data[:HEADER]) | change).encode().ljust(HEADER)
    refused(folders, "shard", header + data[HEADER:], "train-00000.bin", says)


def test_a_prepared_folder_without_text_to_train_on_is_refused(folders):
    refused(folders, "corpus", {"format": 2, "shards": {"train": [], "val": [], "test": []}}, "no text to train on")


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": True}, {"loss": "x"}, {"loss": {}}, {"tokens": 10**30}, {"load_by_layer": [["x"]]}],
)
def test_metrics_are_numbers(folders, change):
    line = json.dumps({"step": 1, "loss": 1.0} | change).encode() + b"\n"
    refused(folders, "metrics", line, "metrics.jsonl, line 1: not a metrics line")


@pytest.mark.parametrize(
    "change",
    [
        {"nats_per_character": [1.0]},
        {"seconds": 1e20},
        {"step": 10**18},
        {"tokens": None},
        {"dead_experts_by_layer": [0, [1]]},
        {"val_tokens": []},
        {"load_by_layer": []},
        {"load_by_layer": [[1, 2], [3]]},
        {"load_by_layer": 5},
        {"val_nats_per_character": float("inf")},
    ],
)
def test_a_report_of_other_metrics_than_trainings_is_refused(folders, change):
    refused(folders, "report", json.dumps(record(1) | change).encode() + b"\n", "metrics.jsonl does not hold what")


def test_a_copied_tensor_of_another_dtype_is_no_copy(folders):
    def change(tensors: dict) -> None:
        name = "model.layers.2.embed_tokens.weight"
        tensors[name] = tensors[name].bfloat16()

    refused(folders, "hub tensors", changed_tensors(folders, "hub tensors", change), "which it should be a copy of")


def test_a_layers_number_of_any_length_is_a_name_like_others(folders):
    name = f"model.layers.{'9' * 5000}.x"
    data = changed_tensors(folders, "hub tensors", lambda tensors: tensors.update({name: torch.ones(1)}))
    refused(folders, "hub tensors", data, "1 unexpected: model.layers.999")


def test_a_context_of_nothing_or_of_everything_is_refused(folders):
    for original, context in ((0, 0), (1, 10**400)):
        rope = {"rope_type": "yarn", "original_max_position_embeddings": original}
        config = valid_json(folders, "hub config") | {"rope_scaling": rope, "max_position_embeddings": context}
        refused(folders, "hub config", config, "config.json")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("finals", {"seconds": 0}),
        ("finals", {"tokens": "x"}),
        ("finals", {"val_dead_experts": None}),
        ("curve", {"seconds": []}),
        ("curve", {"seconds": [1.0]}),
        ("curve", {"val_bits_per_byte": [None, None]}),
    ],
)
def test_results_are_figures_that_can_be_summarised(folders, part, change):
    stored = valid_json(folders, "results")
    stored["finals"][0][part] |= change
    refused(folders, "results", stored, "results.json holds no results of a study")


def test_preparing_what_the_system_cannot_open_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "x" * 5000]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
