"""Hugging Face folders: strangers' files are read without trust, ours are written whole or not at all."""

import gc
import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe.hub import writing
from moe.hub.folder import Folder, HubError
from moe.hub.writing import write_folder

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [2, 3]}}
INDEX = "model.safetensors.index.json"
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def put(path: Path, tensors: dict[str, Tensor], config: object = None, name: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    save_file(tensors, path / name)
    return path


def put_shards(path: Path, weight_map: object = None) -> Path:
    """Tensors a and b in two shards, with the index given."""
    for name in "ab":
        put(path, {name: torch.ones(2)}, name=f"{name}.safetensors")
    weight_map = {"a": "a.safetensors", "b": "b.safetensors"} if weight_map is None else weight_map
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return path


def put_header(path: Path, header: object, data: bytes = b"\0" * 4, length: int | None = None) -> Path:
    """One shard, with a header as given and never as a library would write it."""
    put(path, {})
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    (path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text + data)
    return path


def read_from(path: Path, name: str | None = None) -> Tensor:
    folder = Folder(path)
    return folder.read(name or next(iter(folder.tensors)))


def refused(path: Path, *words: str, name: str | None = None) -> None:
    """Opening the folder, or reading a tensor of it, is refused in one line with these words; nothing is written."""
    before = {file: file.lstat() for file in path.parent.rglob("*")}
    with pytest.raises(HubError) as caught:
        read_from(path, name)
    message = str(caught.value)
    assert message.isprintable()
    for word in words:
        assert word in message
    assert {file: file.lstat().st_mtime for file in path.parent.rglob("*")} == {
        file: stat.st_mtime for file, stat in before.items()
    }


# ---------------------------------------------------------------------------------------------------------- reading


def test_tensors_are_read_as_they_are_stored(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    tensors = {f"{kind}{shape}": torch.randn(shape).to(kind) for kind in kinds for shape in ((), (5,), (3, 7))}
    folder = Folder(put(tmp_path / "model", tensors, {"hidden_size": 7, "rope": float("nan")}))
    assert folder.config["hidden_size"] == 7
    assert folder.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert folder.dtype_of(name) == folder.tensors[name].dtype == tensor.dtype
        assert folder.tensors[name].shape == tensor.shape
        torch.testing.assert_close(folder.read(name), tensor, rtol=0, atol=0)
    before = (folder.path / "model.safetensors").read_bytes()
    for name in tensors:
        folder.read(name).zero_()  # a copy of one's own
    assert (folder.path / "model.safetensors").read_bytes() == before


def test_shards_are_read_through_the_index_and_a_single_file_goes_before_it(tmp_path):
    folder = Folder(put_shards(tmp_path / "model"))
    assert {name: stored.file.name for name, stored in folder.tensors.items()} == {
        "a": "a.safetensors",
        "b": "b.safetensors",
    }
    put(tmp_path / "model", {"c": torch.zeros(1)})
    assert Folder(tmp_path / "model").tensors.keys() == {"c"}


def test_a_download_caches_links_are_followed(tmp_path):
    put_shards(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        os.symlink(Path("..") / "blobs" / file.name, tmp_path / "snapshot" / file.name)
    assert Folder(tmp_path / "snapshot").read("b").tolist() == [1, 1]


def test_memory_holds_the_tensors_in_use_alone(tmp_path):
    folder = Folder(put(tmp_path / "model", {name: torch.zeros(100) for name in "abcdefgh"}))
    assert folder.read("d").untyped_storage().nbytes() == 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no config.json"),
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"[1]", "JSON list instead of an object"),
        (b'{"a": ' * 100_000, "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_configuration_is_a_json_object_or_refused(tmp_path, text, words):
    path = put(tmp_path / "model", {"a": torch.zeros(1)})
    (path / "config.json").unlink()
    if text is not None:
        (path / "config.json").write_bytes(text)
    refused(path, "config.json", words)


def test_a_configuration_without_end_is_not_read_into_memory(tmp_path):
    path = put(tmp_path / "model", {"a": torch.zeros(1)})
    os.truncate(path / "config.json", 2**40)  # takes no room on the disk
    refused(path, "config.json", "bytes")


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere is no folder")
    path = put(tmp_path / "model", {"a": torch.zeros(1)}, name="model-00001-of-00002.safetensors")
    refused(path, str(path), "neither model.safetensors nor model.safetensors.index.json")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (open, (str(self.victim), "w"))


PICKLES = ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth", "consolidated.00.pth")
DISGUISES = ("config.json", "model.safetensors", INDEX, "a.safetensors")


@pytest.mark.parametrize("name", [*PICKLES, *DISGUISES])
def test_a_pickle_is_never_opened_whatever_it_is_called(tmp_path, name):
    path = tmp_path / "model"
    if name in DISGUISES:
        put_shards(path)
    else:
        put(path, {})
        (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(path, name, "a pickle, which can run code" if name in PICKLES else "again")
    assert not (tmp_path / "sprung").exists()
    with open(path / name, "rb") as file:
        pickle.load(file).close()
    assert (tmp_path / "sprung").exists()  # so it was a trap


def test_a_pickle_beside_tensors_does_no_harm(tmp_path):
    path = put(tmp_path / "model", {"a": torch.ones(1)})
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert Folder(path).read("a").tolist() == [1]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "shard",
    ["/etc/x.safetensors", "../x.safetensors", "sub/x.safetensors", "C:x.safetensors", "..\\x.safetensors", "..", ""],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    refused(put_shards(tmp_path / "model", {"a": "a.safetensors", "b": shard}), INDEX, repr(shard), "same folder")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ([], "no weight_map"),
        ({"a": 1}, "no weight_map"),
        ({"a": "a.safetensors", "b": "c.safetensors"}, "c.safetensors, which is missing"),
        ({"a": "a.safetensors", "b": "pytorch_model.bin"}, "only .safetensors files"),
        ({"a": "a.safetensors", "b": "x" * 5000 + ".safetensors"}, "which is missing"),
        ({"a": "a.safetensors", "b": "\0\ud800\n.safetensors"}, "which is missing"),
        ({"a": "a.safetensors", "b": "b.safetensors", "c": "a.safetensors"}, "c in a.safetensors, but no shard"),
        ({"a": "b.safetensors", "b": "a.safetensors"}, "a in b.safetensors, but a.safetensors holds it"),
        ({"a\n": "a.safetensors", "b": "b.safetensors"}, "a in no shard, but a.safetensors holds it"),
    ],
)
def test_an_index_agrees_with_its_shards_or_is_refused(tmp_path, weight_map, words):
    refused(put_shards(tmp_path / "model", weight_map), INDEX, words)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    path = put_shards(tmp_path / "model")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, path / "b.safetensors")
    refused(path, "a is in a.safetensors and in b.safetensors")


BROKEN = {
    "no header": {"header": b"", "data": b"", "length": 2},
    "a header that is cut": {"header": {"a": F32}, "length": 5},
    "a header longer than the file": {"header": {"a": F32}, "length": 2**20},
    "a header beyond reason": {"header": {"a": F32}, "length": 2**62},
    "not JSON": {"header": b"{nothing"},
    "nested": {"header": b"[" * 100_000},
    "nested in an entry": {"header": b'{"a":' * 100_000},
    "no object": {"header": [1]},
    "an unknown dtype": {"header": {"a": F32 | {"dtype": "Q\n9"}}},
    "a dtype that torch lacks": {"header": {"a": F32 | {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}},
    "a negative size": {"header": {"a": F32 | {"shape": [-1]}}},
    "a negative offset": {"header": {"a": F32 | {"data_offsets": [-4, 0]}}},
    "offsets turned round": {"header": {"a": F32 | {"data_offsets": [4, 0]}}},
    "offsets past the end": {"header": {"a": F32 | {"data_offsets": [0, 2**50], "shape": [2**48]}}},
    "2^60 elements in 4 bytes": {"header": {"a": F32 | {"shape": [2**60]}}},
    "more elements than integers": {"header": {"a": F32 | {"shape": [2**40, 2**40]}}},
    "rows without end, no columns": {"header": {"a": F32 | {"shape": [2**63, 0], "data_offsets": [0, 0]}}, "data": b""},
    "a shape of another size": {"header": {"a": F32 | {"shape": [2]}}},
    "overlapping tensors": {"header": {"a": F32, "b\n": F32}},
    "a hole": {"header": {"a": F32, "b": F32 | {"data_offsets": [8, 12]}}, "data": b"\0" * 12},
    "a file cut short": {"header": {"a": F32}, "data": b"\0" * 3},
    "a file too long": {"header": {"a": F32}, "data": b"\0" * 5},
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_header_fits_its_file_or_is_refused(tmp_path, what):
    refused(put_header(tmp_path / "model", **BROKEN[what]), "model.safetensors")


def test_a_file_cut_short_after_opening_is_refused(tmp_path):
    folder = Folder(put(tmp_path / "model", {"a": torch.zeros(8)}))
    os.truncate(folder.path / "model.safetensors", 90)
    with pytest.raises(HubError, match="cut short"):
        folder.read("a")
    (folder.path / "model.safetensors").unlink()
    with pytest.raises(HubError, match="cannot be read"):
        folder.read("a")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_other_dtypes_are_refused_by_name_when_they_are_read_as_weights(tmp_path, dtype):
    path = put(tmp_path / "model", {"a": torch.ones(4).to(dtype), "b": torch.ones(4)})
    refused(path, "model.safetensors", "a is stored as", str(dtype), name="a")
    folder = Folder(path)
    assert folder.read("b").tolist() == [1] * 4  # what nobody asks for is in nobody's way
    with pytest.raises(HubError, match="stored as"):
        folder.dtype_of("a")
    refused(path, "no tensor c", name="c")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_anywhere_ends_in_tensors_or_a_refusal(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    weights = {"a.weight": torch.ones(3, 5).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(2, 2)}
    file = put(path, weights | {"b": torch.ones(4)}, FP8) / "model.safetensors"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    with suppress(HubError):
        folder = Folder(path)
        for name in folder.tensors:
            assert folder.read(name).shape == folder.tensors[name].shape


# -------------------------------------------------------------------------------------------------------------- FP8


def quantised(rows: int = 5, columns: int = 7, block: tuple[int, int] = (2, 3)) -> dict[str, Tensor]:
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.01
    return {"x.weight": torch.randn(rows, columns).to(torch.float8_e4m3fn), "x.weight_scale_inv": scales}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (4, 6), (1, 1), (2, 20)])
def test_fp8_weights_are_values_times_the_scale_of_their_block(tmp_path, rows, columns, scale_dtype):
    tensors = quantised(rows, columns)
    tensors["x.weight_scale_inv"] = scales = tensors["x.weight_scale_inv"].to(scale_dtype)
    folder = Folder(put(tmp_path / "model", tensors, FP8))
    assert folder.tensors.keys() == folder.quantised == {"x.weight"}
    assert folder.dtype_of("x.weight") == torch.bfloat16
    expected = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row // 2, column // 3].float()
            expected[row, column] = tensors["x.weight"][row, column].float() * scale
    torch.testing.assert_close(folder.read("x.weight"), expected, rtol=0, atol=0)


def test_a_block_is_128_by_128_unless_told(tmp_path):
    tensors = quantised(130, 300, (128, 128))
    folder = Folder(put(tmp_path / "model", tensors, {"quantization_config": {"quant_method": "fp8"}}))
    scale = tensors["x.weight_scale_inv"][1, 2]
    torch.testing.assert_close(folder.read("x.weight")[128:, 256:], tensors["x.weight"][128:, 256:].float() * scale)


def test_a_block_larger_than_any_matrix_takes_no_memory(tmp_path):
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10**400, 2**62]}}
    tensors = quantised(block=(5, 7))
    product = tensors["x.weight"].float() * tensors["x.weight_scale_inv"]
    assert torch.equal(Folder(put(tmp_path / "model", tensors, config)).read("x.weight"), product)


def test_fp8_rows_without_end_take_no_memory(tmp_path):
    entries = {
        "x.weight": {"dtype": "F8_E4M3", "shape": [2**40, 0], "data_offsets": [0, 0]},
        "x.weight_scale_inv": {"dtype": "F32", "shape": [2**39, 0], "data_offsets": [0, 0]},
    }
    path = put_header(tmp_path / "model", entries, b"")
    (path / "config.json").write_text(json.dumps(FP8))
    refused(path, "x.weight is empty")


def test_weights_already_dequantised_are_read_whatever_the_configuration_keeps(tmp_path):
    assert Folder(put(tmp_path / "model", {"x.weight": torch.ones(2)}, FP8)).read("x.weight").tolist() == [1, 1]


FAULTS = {
    "no scale": ({"x.weight_scale_inv": None}, FP8, "x.weight is FP8 but has no x.weight_scale_inv"),
    "a wrongly shaped scale": ({"x.weight_scale_inv": torch.ones(3, 2)}, FP8, "shape (3, 2) instead of float32 of"),
    "a flat scale": ({"x.weight_scale_inv": torch.ones(9)}, FP8, "shape (9,) instead of float32 of (3, 3)"),
    "an integer scale": ({"x.weight_scale_inv": torch.ones(3, 3).int()}, FP8, "torch.int32 of shape (3, 3)"),
    "an infinite scale": ({"x.weight_scale_inv": torch.full((3, 3), torch.inf)}, FP8, "not finite"),
    "no number as a scale": ({"x.weight_scale_inv": torch.full((3, 3), torch.nan)}, FP8, "not finite"),
    "a scale of nothing": ({"y.weight_scale_inv": torch.ones(1, 1)}, FP8, "y.weight_scale_inv scales no FP8 weight"),
    "a scale of a float": ({"x.weight": torch.ones(5, 7)}, FP8, "x.weight_scale_inv scales no FP8 weight"),
    "no matrix": ({"x.weight": torch.ones(5).to(torch.float8_e4m3fn)}, FP8, "only matrices have blocks"),
    "no quantization_config": ({}, {}, "no quantization_config"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_fp8_without_fitting_scales_is_refused(tmp_path, what):
    changes, config, words = FAULTS[what]
    tensors = {name: tensor for name, tensor in (quantised() | changes).items() if tensor is not None}
    refused(put(tmp_path / "model", tensors, config), str(tmp_path / "model"), words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"quant_method": name}, name) for name in ("gptq", "awq", "bitsandbytes", "mxfp4", "compressed-tensors")),
        ({}, "None"),
        ("fp8!", "fp8!"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        *(
            ({"quant_method": "fp8", "weight_block_size": block}, f"weight_block_size {block}")
            for block in (None, [2], [0, 3], [2, -3], [2.0, 3], [True, 3])
        ),
    ],
)
def test_every_other_quantisation_is_refused_by_name(tmp_path, settings, words):
    path = put(tmp_path / "model", quantised(), {"quantization_config": settings})
    refused(path, "config.json", words, "not quantised")


# ---------------------------------------------------------------------------------------------------------- writing


TENSORS = {
    "first": torch.arange(6.0).view(2, 3),
    "second": torch.arange(5).bfloat16(),
    "third": torch.arange(100).half(),
    "fourth": torch.tensor(1.5),
}


def plan(tensors: dict[str, Tensor]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(path: Path, tensors: dict[str, Tensor] = TENSORS, read=None, files=None, shard_bytes=10**9) -> None:
    write_folder(path, {"model_type": "small"}, plan(tensors), read or tensors.get, files or {}, shard_bytes)


def test_a_small_model_is_one_file(tmp_path):
    path = tmp_path / "new" / "model"
    write(path, files={"README.md": b"read me", "tokenizer": lambda folder: (folder / "t").write_text("!")})
    assert {file.name for file in path.iterdir()} == {"config.json", "model.safetensors", "README.md", "t"}
    assert (path / "README.md").read_bytes() == b"read me"
    folder = Folder(path)
    assert folder.config == {"model_type": "small"}
    assert list(path.parent.iterdir()) == [path]
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(folder.read(name), tensor, rtol=0, atol=0)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_model_is_shards_and_an_index_with_the_same_tensors(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "many", shard_bytes=40)
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 24 + 10 + 200 + 4}
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]  # first and second, third, fourth
    assert list(index["weight_map"].items()) == list(zip(TENSORS, [shards[0], *shards], strict=True))
    assert {file.name for file in (tmp_path / "many").iterdir()} == {*shards, INDEX, "config.json"}
    one, many = Folder(tmp_path / "one"), Folder(tmp_path / "many")
    for name, tensor in TENSORS.items():
        assert torch.equal(one.read(name), many.read(name))
        with safe_open(tmp_path / "many" / index["weight_map"][name], "pt") as file:  # as transformers does
            torch.testing.assert_close(file.get_tensor(name), tensor, rtol=0, atol=0)


def test_tensors_that_share_memory_need_grad_or_have_gaps_are_written(tmp_path):
    whole = torch.nn.Parameter(torch.randn(4, 6))
    tensors = {"whole": whole, "tied": whole, "turned": whole.T, "part": whole[:, ::2], "row": whole[1]}
    write(tmp_path / "model", tensors)
    for name, tensor in tensors.items():
        assert torch.equal(Folder(tmp_path / "model").read(name), tensor)


def test_tensors_are_stored_in_the_dtype_of_the_plan(tmp_path):
    value = torch.randn(5)
    write_folder(tmp_path / "model", {}, [("a", torch.bfloat16, (5,))], lambda name: value, {}, 10**9)
    assert torch.equal(Folder(tmp_path / "model").read("a"), value.bfloat16())


def test_writing_holds_no_more_than_one_shard(tmp_path):
    size = 1013  # of no other test's tensors, some of which may lie about as garbage still

    def read(name: str) -> Tensor:
        tensors = (thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == (size,))
        held.append(sum(tensor.device.type != "meta" for tensor in tensors))
        return torch.zeros(size)

    held: list[int] = []
    tensors = {str(number): torch.empty(size, device="meta") for number in range(12)}
    write(tmp_path / "model", tensors, read, shard_bytes=3 * 4 * size)
    assert held == [0, 1, 2] * 4


class Failure(Exception):
    pass


def failing(*arguments):
    raise Failure


def full_disk(*arguments, **options):
    raise OSError(28, "No space left on device")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def read(name: str) -> Tensor:
        if name == "fourth":
            failing()
        return TENSORS[name]

    for empty_folder in (False, True):
        if empty_folder:
            (tmp_path / "a" / "b").mkdir(parents=True)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(Failure):
            write(tmp_path / "a" / "b", read=read, shard_bytes=1)
        with pytest.raises(Failure):
            write(tmp_path / "a" / "b", files={"tokenizer": failing})
        with pytest.raises(HubError, match=r"first came out as \(3,\) instead of \(2, 3\)"):
            write(tmp_path / "a" / "b", read=lambda name: torch.zeros(3))
        for step in ("save_file", "sync", "sync_folder"):
            with monkeypatch.context() as patch:
                patch.setattr(writing, step, full_disk)
                with pytest.raises(HubError, match=r"could not be written: .*No space left"):
                    write(tmp_path / "a" / "b")
        assert sorted(tmp_path.rglob("*")) == before
    write(tmp_path / "a" / "b")
    assert Folder(tmp_path / "a" / "b").tensors.keys() == TENSORS.keys()


def test_what_is_there_already_is_refused_before_any_work_and_unharmed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("more of it")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for name in ("folder", "file", "link"):
        with pytest.raises(HubError, match=f"{name} is there already and not an empty folder: choose another"):
            write(tmp_path / name, read=failing, files={"tokenizer": failing})
    with pytest.raises(HubError, match="could not be written"):
        write(tmp_path / "file" / "below", read=failing)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "years of work"


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    ended, parent, other = (tmp_path / f".model.{tail}" for tail in (dead.stdout.strip(), os.getppid(), "mine"))
    for folder in (ended, parent, other):
        folder.mkdir()
    write(tmp_path / "model")
    assert (ended.exists(), parent.exists(), other.exists()) == (False, True, True)


def test_leftovers_of_a_killed_process_are_not_in_the_way(tmp_path):
    leftover = tmp_path / f".model.{os.getpid()}"
    leftover.mkdir()
    (leftover / "model-00001-of-00009.safetensors").write_text("half")
    write(tmp_path / "model")
    assert not leftover.exists()
    assert {file.name for file in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
