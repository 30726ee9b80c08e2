"""Whatever a file holds, reading it ends in success or in one clear error: a sample of tests/fuzz.py, and a name for
each thing that once got through."""

import json
import os
import pickle
import re
import shutil
import tokenize
from pathlib import Path
from random import Random

import pytest
from fuzzing import CHECKPOINT, READERS, Outcome, Reader, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

import moe
from moe.config import MoeError
from moe.corpus import CorpusError, open_corpus
from moe.machine.stored import CheckpointError, verify

ROOT = Path(__file__).parent.parent
SLOW = {"picture": 15, "study picture": 10, "plan": 30, "begun shard": 30, "text": 30, "lines": 30, "hub config": 40}


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

    @settings(max_examples=SLOW.get(name, 60), deadline=None, derandomize=True, database=None)
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
