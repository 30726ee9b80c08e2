"""Less memory, the same result: layers computed again, logits piece by piece, micro-batches of any size."""

from dataclasses import replace

import pytest
import torch
from conftest import CPU, SMALL, build

from moe import model as room
from moe.attention import Cache
from moe.config import ConfigError, ModelConfig, TrainConfig
from moe.machine import cost, device
from moe.machine.cost import activation_bytes, count
from moe.machine.device import DeviceError, Runtime, resolve, working_losses
from moe.model import IGNORE, Transformer
from moe.presets import presets


def gradients(model: Transformer, tokens, between=lambda: None, bfloat16: bool = False):
    """Losses, and every gradient, with something happening between forward and backward."""
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        losses = model.losses(tokens, tokens.roll(-1, 1), mtp_weight=0.3)
    between()
    losses.objective.backward()
    return losses, {name: weight.grad.clone() for name, weight in model.named_parameters()}


def kept_bytes(model: Transformer, tokens) -> int:
    """Of all tensors that autograd keeps for the backward pass, weights not counted."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    seen, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(tokens, tokens)
    del losses
    return sum(seen.values())


@pytest.mark.parametrize("backend", ["loop", "grouped"])
@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1}])
def test_layers_computed_again_give_the_same_losses_gradients_and_loads(backend, changes):
    model, tokens = build(expert_backend=backend, hidden_dropout=0.2, **changes), torch.randint(64, (3, 16))
    plain, wanted = gradients(model, tokens)
    model.activation_checkpointing = True
    again, got = gradients(model, tokens)
    assert torch.equal(plain.objective, again.objective)
    assert torch.equal(plain.routing.load, again.routing.load)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2}])
def test_computing_again_never_routes_again(changes):
    model, tokens = build(**changes), torch.randint(64, (3, 16))
    _, wanted = gradients(model, tokens)
    model.activation_checkpointing = True

    def disturb():  # from here on every token would choose other experts
        for layer in model.moe_layers():
            layer.router.expert_bias.copy_(10 * torch.randn(8))

    _, got = gradients(model, tokens, disturb)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name])
    _, elsewhere = gradients(model, tokens)
    assert not torch.allclose(elsewhere["layers.1.mlp.down_proj"], wanted["layers.1.mlp.down_proj"])


@pytest.mark.parametrize("backend", ["loop", "grouped"])
def test_computing_again_in_bfloat16_is_the_same_to_the_last_bit(backend):
    model = build(expert_backend=backend, hidden_dropout=0.2, num_nextn_predict_layers=1, tie_word_embeddings=True)
    tokens = torch.randint(64, (3, 16))
    _, wanted = gradients(model, tokens, bfloat16=True)
    model.activation_checkpointing = True
    _, got = gradients(model, tokens, bfloat16=True)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_cache_is_filled_even_where_layers_would_be_computed_again():
    model, tokens = build(), torch.randint(64, (1, 8))
    wanted = model(tokens)
    model.activation_checkpointing = True
    cache = Cache(model.config, 1, 8, tokens.device, torch.float32)
    got = torch.cat([model(piece, cache) for piece in tokens.split(2, dim=1)], dim=1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_computing_again_keeps_less():
    model, tokens = Transformer(replace(SMALL, num_hidden_layers=6)), torch.randint(64, (4, 32))
    plain = kept_bytes(model, tokens)
    model.activation_checkpointing = True
    assert kept_bytes(model, tokens) < plain / 3


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 4},
        {"hidden_size": 256, "num_experts_per_tok": 4, "moe_intermediate_size": 64},
        {"attention": "grouped", "num_key_value_heads": 2},
    ],
)
def test_the_estimate_of_kept_memory_is_within_a_half_of_what_is_counted(changes):
    config = ModelConfig(**changes)
    for length in (64, 128, 256):
        counted = kept_bytes(Transformer(config), torch.randint(512, (16, length)))
        assert 0.67 < activation_bytes(config, 16, length) / counted < 1.5


@pytest.mark.parametrize("pieces", [1, 7, 48])
def test_logits_made_piece_by_piece_give_the_same_loss_and_gradients(monkeypatch, pieces):
    model, tokens = build(num_nextn_predict_layers=1), torch.randint(64, (3, 16))
    targets = tokens.roll(-1, 1)
    targets[0, 3:9] = IGNORE
    results = []
    for logits in (room.LOGITS, 64 * (48 // pieces)):
        monkeypatch.setattr(room, "LOGITS", logits)
        model.zero_grad()
        losses = model.losses(tokens, targets, mtp_weight=0.3)
        losses.objective.backward()
        results.append((losses, [weight.grad.clone() for weight in model.parameters()]))
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    torch.testing.assert_close(results[0][0].mtp, results[1][0].mtp)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_more_logits_exist_at_a_time_than_promised(monkeypatch):
    monkeypatch.setattr(room, "LOGITS", 640)
    sizes, original = [], room.F.cross_entropy
    monkeypatch.setattr(
        room.F,
        "cross_entropy",
        lambda logits, *rest, **more: sizes.append(logits.numel()) or original(logits, *rest, **more),
    )
    Transformer(SMALL).losses(*torch.randint(64, (2, 3, 16))).objective.backward()
    assert max(sizes) <= 640
    assert sum(sizes) == 2 * 3 * 16 * 64  # each once, and once more for its gradient


def test_micro_batches_that_would_not_be_equal_are_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"must divide the 12 sequences of a step: 12, 6, 4, 3, 2, 1 do"):
        TrainConfig(tokens_per_step=192, sequence_length=16, micro_batch_size=5)
    with pytest.raises(ConfigError, match=r"multiple of train.sequence_length = 60: 180 is"):
        TrainConfig(tokens_per_step=192, sequence_length=60)


def on_cpu(name: str, **training):
    config = presets()[name]
    return replace(config, device="cpu", train=replace(config.train, **training))


def test_the_micro_batch_is_what_fits_the_memory(monkeypatch):
    tiny = on_cpu("tiny")
    assert resolve(tiny)[0].micro_batch_size == 16
    for fits in (1, 2, 4):
        memory = count(tiny.sized_model).training_bytes + 4 * 1.4 * activation_bytes(tiny.sized_model, fits, 256)
        monkeypatch.setattr("moe.machine.device.machine_bytes", lambda device, memory=memory: memory)
        assert resolve(tiny)[0].micro_batch_size == fits
    assert resolve(on_cpu("tiny", micro_batch_size=2))[0].micro_batch_size == 2


def test_a_model_that_no_memory_here_could_train_is_refused_before_it_is_built(monkeypatch):
    with pytest.raises(DeviceError, match=r"671.0B parameters takes 9,.*GB.*choose a smaller --preset"):
        resolve(on_cpu("v3"))
    monkeypatch.setattr("moe.machine.device.machine_bytes", lambda device: None)  # a system that does not say
    assert resolve(on_cpu("v3"))[0].micro_batch_size == 1


def test_a_containers_limit_is_the_memory_there_is(tmp_path, monkeypatch):
    whole = cost.machine_bytes("cpu")
    monkeypatch.setattr(cost, "CONTAINER", tmp_path / "memory.max")
    for content, wanted in (("4096000\n", 4_096_000), (f"{1 << 60}\n", whole), ("max\n", whole)):
        (tmp_path / "memory.max").write_text(content)
        assert cost.machine_bytes("cpu") == wanted


def test_sizes_that_no_tensor_can_have_are_refused():
    with pytest.raises(ConfigError, match="no tensor has the sizes"):
        count(ModelConfig(hidden_size=10**18))


def test_micro_batches_of_huge_steps_are_found_at_once():
    train = TrainConfig(tokens_per_step=256 * 2**40)
    assert train.micro_batch_sizes() == [2**power for power in range(40, -1, -1)]
    assert TrainConfig(tokens_per_step=256 * 12).micro_batch_sizes() == [12, 6, 4, 3, 2, 1]


class PretendedGPU:
    """A GPU whose memory is so many sequences large, and on which some ways of computing fail."""

    def __init__(self, monkeypatch, sequences: int = 100, broken: tuple[str, ...] = ()) -> None:
        self.tried: list[tuple[int, str]] = []

        def try_steps(model, losses_of, config, runtime):
            way = "compiled" if losses_of is not model.losses and runtime.compile else runtime.expert_backend
            self.tried.append((runtime.micro_batch_size, way))
            if way in broken:
                raise RuntimeError(f"no kernel for {way}\nand so on")
            if runtime.micro_batch_size > sequences:
                raise torch.OutOfMemoryError

        monkeypatch.setattr(device, "try_steps", try_steps)
        monkeypatch.setattr(device, "machine_bytes", lambda device: 80 << 30)
        for name in ("reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1 << 30)

    def find(self, fresh: bool = True, compiled: bool = False):
        config = replace(presets()["tiny"], model=replace(SMALL, max_position_embeddings=256))
        runtime = Runtime("cuda", "bfloat16", compiled, "grouped", 8, 1)
        said: list[str] = []
        model = Transformer(config.model)
        found = working_losses(model, config, runtime, fresh, said.append)[1]
        assert all(layer.backend == found.expert_backend for layer in model.moe_layers())
        return found, said


def test_on_a_gpu_the_largest_micro_batch_that_fits_is_found_by_trying(monkeypatch):
    gpu = PretendedGPU(monkeypatch, sequences=3)
    found, said = gpu.find()
    assert (found.micro_batch_size, found.expert_backend, said) == (2, "grouped", [])
    assert [micro for micro, _ in gpu.tried] == [16, 8, 4, 2, 2]


def test_a_resumed_run_keeps_the_micro_batch_it_has(monkeypatch):
    gpu = PretendedGPU(monkeypatch, sequences=100)
    assert gpu.find(fresh=False)[0].micro_batch_size == 8
    assert gpu.tried == [(8, "grouped")]


def test_nothing_that_fits_is_the_users_to_mend(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        PretendedGPU(monkeypatch, sequences=0).find()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own, about its use of torch
@pytest.mark.parametrize("fresh", [True, False])
def test_a_way_that_fails_on_a_gpu_gives_way_to_a_slower_one_with_a_notice(monkeypatch, fresh):
    found, said = PretendedGPU(monkeypatch, broken=("compiled",)).find(fresh, compiled=True)
    assert (found.compile, found.expert_backend) == (False, "grouped")
    assert said == ["notice: compiled training failed here (no kernel for compiled): trying a slower way"]
    found, said = PretendedGPU(monkeypatch, broken=("compiled", "grouped")).find(fresh, compiled=True)
    assert (found.compile, found.expert_backend, len(said)) == (False, "loop", 2)
    with pytest.raises(DeviceError, match="no way of computing"):
        PretendedGPU(monkeypatch, broken=("compiled", "grouped", "loop")).find(fresh, compiled=True)


def test_trying_leaves_no_gradients_and_draws_no_random_numbers():
    model, config = Transformer(SMALL), replace(presets()["debug"], model=replace(SMALL, max_position_embeddings=64))
    before = torch.get_rng_state()
    device.try_steps(model, model.losses, config, replace(CPU, micro_batch_size=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_cpu_compiles_what_will_take_half_an_hour_and_a_loop_is_never_compiled(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda name: "/usr/bin/c++")
    tiny = on_cpu("tiny")
    assert not resolve(tiny)[0].compile
    assert resolve(replace(tiny, minutes=30.0))[0].compile
    assert resolve(replace(tiny, steps=1_000_000))[0].compile
    looped = replace(tiny, minutes=30.0, model=replace(tiny.model, expert_backend="loop"))
    assert not resolve(looped)[0].compile
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert not resolve(replace(tiny, minutes=30.0))[0].compile
