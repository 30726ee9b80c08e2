"""What a CUDA graph repeats is the decoder's step, in the same shapes at every position. Recording needs a GPU; where
there is none, a pretended one runs the step again wherever a graph would repeat it."""

import pytest
import torch
from conftest import build
from test_decoding import KINDS, logits_step_by_step
from torch.utils._python_dispatch import TorchDispatchMode

from moe.attention import Cache
from moe.decoding import graphs
from moe.decoding.decoder import Decoder
from moe.decoding.graphs import GraphDecoder, Room, decoder


def graph_decoder(model, cache: Cache) -> GraphDecoder:
    return GraphDecoder(Decoder(model, cache))


@pytest.fixture
def recordings(monkeypatch) -> list[torch.Tensor]:
    """Those that were made, by the logits that each repetition overwrites."""
    made: list[torch.Tensor] = []

    def pretended(step):
        logits = [step() for _ in range(4)][-1]
        made.append(logits)
        return lambda: logits.copy_(step())

    monkeypatch.setattr(graphs, "recorded", pretended)
    monkeypatch.setattr(graphs, "ROOM", 8)
    return made


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_recorded_step_computes_the_model(kind, sequences, recordings):
    model = build(**KINDS[kind]).eval()
    tokens = torch.randint(64, (sequences, 24))
    wanted = model(tokens)[:, 4:]
    got = logits_step_by_step(model, tokens, 5, room=5, make=graph_decoder)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max())
    assert len(recordings) == 3  # with room for 8, 16 and 32


class Calls(TorchDispatchMode):
    """Which operations reach the device, with their shapes and their plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shown = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: (x.shape, x.stride()), (args, kwargs))
        self.made.append(f"{function} {shown}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["gather", "grouped"])
@pytest.mark.parametrize("attention", ["latent", "grouped"])
@torch.inference_mode()
def test_the_step_is_the_same_wherever_it_is(attention, backend, monkeypatch):
    steps = []
    monkeypatch.setattr(graphs, "recorded", lambda step: steps.append(step) or step)
    model = build(attention=attention, expert_backend=backend).eval()
    cache = Cache(model.config, 2, 16, torch.device("cpu"), torch.float32)
    model(torch.randint(64, (2, 5)), cache)
    write = graph_decoder(model, cache)
    made = []
    for _ in range(3):
        write(torch.randint(64, (2,)))
        with Calls() as calls:
            steps[0]()
        made.append(calls.made)
    assert made[0] == made[1] == made[2]
    assert any("bmm" in call or "scaled_dot_product" in call for call in made[0])


@torch.inference_mode()
def test_what_is_not_a_number_behind_the_end_is_never_read():
    model = build().eval()
    cache = Cache(model.config, 1, 12, torch.device("cpu"), torch.float32)
    for entries in cache.entries:
        entries.fill_(torch.nan)
    model(torch.randint(64, (1, 5)), cache)
    assert all(entries.isfinite().all() for entries in Room(cache).entries)


@torch.inference_mode()
def test_where_recording_fails_writing_goes_on_and_says_so_once(monkeypatch):
    def fails(step):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "recorded", fails)
    model, tokens = build().eval(), torch.randint(64, (2, 12))
    with pytest.warns(UserWarning, match=r"failed here \(operation not permitted when stream is capturing\)") as said:
        got = logits_step_by_step(model, tokens, 5, room=5, make=graph_decoder)
    assert len(said) == 1
    torch.testing.assert_close(got, model(tokens)[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "dtype", "capability", "wanted"),
    [
        ("loop", torch.bfloat16, (9, 0), True),
        ("gather", torch.float32, (8, 0), False),
        ("grouped", torch.bfloat16, (9, 0), False),
        ("grouped", torch.bfloat16, (8, 6), True),
        ("grouped", torch.float32, (9, 0), True),
    ],
)
def test_what_has_to_wait_for_the_choices_is_never_recorded(backend, dtype, capability, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert graphs.waits(backend, dtype) is wanted


def test_without_a_gpu_nothing_is_recorded():
    model = build().eval()
    assert isinstance(decoder(model, Cache(model.config, 1, 8, torch.device("cpu"), torch.float32)), Decoder)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["latent", "grouped"])
@torch.inference_mode()
def test_on_a_gpu_the_recorded_step_computes_the_model(attention, monkeypatch):
    monkeypatch.setattr(graphs, "ROOM", 8)
    model = build(attention=attention, hidden_size=64, moe_intermediate_size=32).eval().cuda()
    tokens = torch.randint(64, (2, 24), device="cuda")
    wanted = model(tokens)[:, 4:]
    made = []

    def make(model, cache: Cache):
        made.append(decoder(model, cache))
        return made[-1]

    got = logits_step_by_step(model, tokens, 5, room=5, make=make)
    assert isinstance(made[0], GraphDecoder)
    assert made[0].works
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
