"""Mistakes that mixture-of-experts code is known to make, made here on purpose: the tests must notice every one.

python tests/mutants.py                 all of them
python tests/mutants.py bias "a group"  those whose name holds one of these words

A mutant changes one place of a copy of the project. It is caught when a test that watches over this place fails, by an
assertion or an error of the project's own; a change that does not even run says nothing of the tests, and is reported
as broken. So is one whose place has changed: it has to follow the code.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds for the tests of one mutant
NOTICED = re.compile(r"assert\b|AssertionError|Failed|moe\.")  # how the reason of a failure begins that counts


@dataclass(frozen=True)
class Mutant:
    name: str  # the mistake
    file: str
    old: str  # occurs there once
    new: str
    tests: str  # arguments of pytest: those that watch over this place


@dataclass(frozen=True)
class Outcome:
    verdict: str  # caught, SURVIVED or BROKEN
    why: str  # the first test that failed, or what went wrong
    seconds: float = 0.0


ROUTER, EXPERTS, ATTENTION, ROTARY = "moe/router.py", "moe/experts.py", "moe/attention.py", "moe/rotary.py"
MODEL, LAYERS, OPTIM, DATA, SCORE = "moe/model.py", "moe/layers.py", "moe/optim.py", "moe/data.py", "moe/lab/score.py"
CHECKPOINT, STORED, METRICS = "moe/checkpoint.py", "moe/machine/stored.py", "moe/metrics.py"
SAMPLING, DECODER, TRAIN = "moe/sampling.py", "moe/decoding/decoder.py", "train.py"

OF_ROUTER, OF_EXPERTS, OF_ROTARY = "tests/test_router.py", "tests/test_experts.py", "tests/test_rotary.py"
OF_ATTENTION, OF_DECODER, OF_MTP = "tests/test_attention.py", "tests/test_decoding.py", "tests/test_mtp.py"
OF_OPTIM, OF_SCORE = "tests/test_optim.py", "tests/test_score.py"
OF_SAMPLING = "tests/test_sampling.py -k 'filter or seed or padding or beyond'"
OF_TRANSFORMERS = "tests/test_model.py -k 'deepseek_v3 or (family and DeepseekV3)'"
OF_ACCUMULATION = "tests/test_model.py -k 'accumulation or micro_batches'"
OF_BATCHES = "tests/test_corpus.py -k 'batches or epoch or separate_windows'"
OF_RESUMING = "tests/test_resume.py -k 'uninterrupted and float32 and loss and not switch'"
OF_AVERAGE = "tests/test_checkpoint.py -k average"
OF_RECOMPUTING = "tests/test_memory.py -k 'computing_again or piece_by_piece'"
OF_LOG = "tests/test_checkpoint.py tests/test_resume.py -k 'metrics_are_whole_lines or without_gaps'"
OF_DISK = (
    "tests/test_faults.py -k 'manifest_comes_last or killed_at_any or best_checkpoint or moment_of or before_the_next'"
)
OF_DAMAGE = "tests/test_checkpoint.py -k damaged_checkpoint"
OF_LOOP = "tests/test_loop.py"

MUTANTS = (
    # -- the choice and the gates --------------------------------------------------------------------------------------
    Mutant(
        "the bias is added to the gates",
        ROUTER,
        "self.gates(scores, chosen)",
        "self.gates(scores + self.expert_bias, chosen)",
        OF_ROUTER,
    ),
    Mutant(
        "gates are normalised over all experts, before the choice",
        ROUTER,
        "(gates.sum(-1, keepdim=True) + TINY)",
        "(scores.sum(-1, keepdim=True) + TINY)",
        OF_ROUTER,
    ),
    Mutant(
        "gates of a single expert are normalised, though not asked for",
        ROUTER,
        "if self.config.norm_topk_prob:",
        "if self.config.norm_topk_prob or chosen.shape[-1] == 1:",
        OF_ROUTER,
    ),
    Mutant("gates are not scaled", ROUTER, "gates * self.config.routed_scaling_factor", "gates", OF_ROUTER),
    Mutant(
        "groups are masked by zero",
        ROUTER,
        "masked_fill(~kept.unsqueeze(-1), -torch.inf)",
        "masked_fill(~kept.unsqueeze(-1), 0.0)",
        OF_ROUTER,
    ),
    Mutant(
        "a group is worth its best expert alone in DeepSeek-V3 too",
        ROUTER,
        '2 if config.topk_method == "noaux_tc" else 1',
        "1",
        OF_ROUTER,
    ),
    Mutant(
        "autocast reaches the router",
        ROUTER,
        "torch.autocast(x.device.type, enabled=False)",
        "torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type))",
        OF_ROUTER,
    ),
    Mutant(
        "the bias is forgotten when writing",
        DECODER,
        "self.router.select(scores + self.bias)",
        "self.router.select(scores)",
        OF_DECODER,
    ),
    # -- the balance ---------------------------------------------------------------------------------------------------
    Mutant("the bias is not centred", ROUTER, "step - step.mean()", "step", OF_ROUTER),
    Mutant(
        "the bias moves towards the busy experts",
        ROUTER,
        "(load.float().mean() - load.float()).sign()",
        "(load.float() - load.float().mean()).sign()",
        OF_ROUTER,
    ),
    Mutant(
        "the bias moves in proportion to the load",
        ROUTER,
        "(load.float().mean() - load.float()).sign()",
        "(load.float().mean() - load.float()) / load.float().mean()",
        OF_ROUTER,
    ),
    Mutant("the bias becomes bfloat16", ROUTER, "if moved.dtype != torch.float32:", "if False:", OF_ROUTER),
    Mutant(
        "the bias is no part of the state",
        ROUTER,
        '"expert_bias", torch.zeros(config.n_routed_experts)',
        '"expert_bias", torch.zeros(config.n_routed_experts), persistent=False',
        OF_ROUTER,
    ),
    Mutant(
        "every forward pass moves the bias, those of an evaluation as well",
        ROUTER,
        "load = count_load(routing.chosen, config.n_routed_experts)",
        "load = count_load(routing.chosen, config.n_routed_experts)\n        self.update_bias(load)",
        OF_ROUTER,
    ),
    Mutant(
        "training moves the bias by the load of an evaluation",
        TRAIN,
        "record |= score.record() | {",
        "model.update_expert_bias(val_load)\n            record |= score.record() | {",
        OF_LOOP,
    ),
    Mutant(
        "training never moves the bias",
        TRAIN,
        "model.update_expert_bias(losses.routing.load)",
        "pass",
        "tests/test_checkpoint.py -k moves_the_expert_bias",
    ),
    Mutant(
        "the load is counted before groups limit the choice",
        ROUTER,
        "load = count_load(routing.chosen, config.n_routed_experts)",
        "load = count_load((routing.scores + self.expert_bias).topk(routing.chosen.shape[-1]).indices, "
        "config.n_routed_experts)",
        OF_ROUTER,
    ),
    Mutant(
        "the load of earlier micro-batches is counted again with each later one",
        MODEL,
        "RoutingStats(load.sum(0),",
        "RoutingStats(load.cumsum(0).sum(0),",
        OF_ACCUMULATION,
    ),
    Mutant(
        "the bias sees the load of the last micro-batch alone",
        MODEL,
        "RoutingStats(load.sum(0),",
        "RoutingStats(load[-1],",
        OF_ACCUMULATION,
    ),
    Mutant(
        "f_i of the sequence-wise balance loss is not divided by K",
        ROUTER,
        "counts * experts / (top_k * scores.shape[1])",
        "counts * experts / scores.shape[1]",
        OF_ROUTER,
    ),
    Mutant(
        "f_i of the switch loss is not divided by K",
        ROUTER,
        "frequency = load.float() / load.sum()",
        "frequency = load.float() / len(scores)",
        OF_ROUTER,
    ),
    Mutant(
        "P_i of the balance loss is a share of the chosen scores alone",
        ROUTER,
        "share = (scores / (scores.sum(-1, keepdim=True) + TINY)).mean(1)",
        "share = (scores / (scores.gather(-1, best).sum(-1, keepdim=True) + TINY)).mean(1)",
        OF_ROUTER,
    ),
    Mutant(
        "the balance loss counts a choice by biased scores",
        ROUTER,
        "routing.scores.unflatten(0, (sequences, -1))",
        "(routing.scores + self.expert_bias).unflatten(0, (sequences, -1))",
        OF_ROUTER,
    ),
    Mutant(
        "the sequence-wise balance loss is one of the whole micro-batch",
        ROUTER,
        "routing.scores.unflatten(0, (sequences, -1))",
        "routing.scores.unflatten(0, (1, -1))",
        OF_ACCUMULATION,
    ),
    Mutant(
        "the balance loss has no gradient",
        ROUTER,
        "return (frequency * share).sum(-1).mean()",
        "return (frequency * share.detach()).sum(-1).mean()",
        OF_ROUTER,
    ),
    Mutant(
        "the switch loss weighs by the load of its micro-batch",
        OPTIM,
        "losses_of(tokens, targets, global_load, mtp)",
        "losses_of(tokens, targets, None, mtp)",
        OF_ACCUMULATION,
    ),
    Mutant(
        "balance losses are added up over micro-batches",
        OPTIM,
        "(losses.objective / len(batches)).backward()",
        "(losses.objective - losses.loss + losses.loss / len(batches)).backward()",
        OF_ACCUMULATION,
    ),
    Mutant(
        "the z-loss makes logits grow",
        MODEL,
        "+ self.config.router_z_loss * routing.z_loss.sum()",
        "- self.config.router_z_loss * routing.z_loss.sum()",
        OF_ROUTER,
    ),
    Mutant(
        "MaxVio is the mean of the layers'",
        METRICS,
        "max_violation(load).max().item()",
        "max_violation(load).mean().item()",
        OF_ROUTER,
    ),
    Mutant(
        "the balance loss that is told is the sum of the layers'",
        METRICS,
        "routing.balance_loss.mean().item()",
        "routing.balance_loss.sum().item()",
        OF_ROUTER,
    ),
    # -- the experts ---------------------------------------------------------------------------------------------------
    Mutant(
        "the shared expert is gated",
        EXPERTS,
        "out + self.shared_experts(rows)",
        "out + routing.scores.amax(-1, keepdim=True).to(dtype) * self.shared_experts(rows)",
        OF_EXPERTS,
    ),
    Mutant("gate and up are swapped", EXPERTS, "return F.silu(gate) * up", "return F.silu(up) * gate", OF_EXPERTS),
    Mutant(
        "the gate scales what goes into an expert",
        EXPERTS,
        "swiglu(F.linear(x[token], up_projections[expert])) * gates[token, slot].unsqueeze(-1)",
        "swiglu(F.linear(x[token] * gates[token, slot].unsqueeze(-1), up_projections[expert]))",
        OF_EXPERTS,
    ),
    Mutant(
        "tokens beyond an expert's capacity are dropped",
        EXPERTS,
        "token, slot = (chosen == expert).nonzero(as_tuple=True)",
        "token, slot = (chosen == expert).nonzero()[: 2 * chosen.numel() // len(gate_up_proj) + 1].unbind(-1)",
        OF_EXPERTS,
    ),
    Mutant(
        "sorted pairs forget whose they are",
        EXPERTS,
        "scatter_(0, place, pairs // chosen.shape[1])",
        "scatter_(0, place, pairs % len(chosen))",
        OF_EXPERTS,
    ),
    Mutant(
        "the gradient of a gate is weighted by the gate",
        EXPERTS,
        "(grad_weighted * hidden).sum(-1)[place]",
        "(grad_weighted * weights * hidden).sum(-1)[place]",
        OF_EXPERTS,
    ),
    # -- attention -----------------------------------------------------------------------------------------------------
    Mutant("attention is not causal", ATTENTION, "is_causal=True", "is_causal=False", OF_ATTENTION),
    Mutant("in bfloat16 the next token is seen", ATTENTION, ".triu(1)", ".triu(2)", OF_ATTENTION),
    Mutant(
        "behind a cache the next token is seen",
        ATTENTION,
        "triu(total - new + 1)",
        "triu(total - new + 2)",
        OF_ATTENTION,
    ),
    Mutant(
        "latent attention scales by the width without rotation",
        ATTENTION,
        "self.scale = config.query_head_dim**-0.5",
        "self.scale = config.qk_nope_head_dim**-0.5",
        OF_TRANSFORMERS,
    ),
    Mutant(
        "YaRN's factor on the softmax is left out",
        ATTENTION,
        "**-0.5 * softmax_magnitude(config.rope_scaling)",
        "**-0.5",
        OF_TRANSFORMERS,
    ),
    Mutant(
        "the latent is not normalised",
        ATTENTION,
        "torch.cat((self.kv_a_layernorm(latent),",
        "torch.cat((latent,",
        OF_TRANSFORMERS,
    ),
    Mutant(
        "the inner norms have the eps of the others",
        ATTENTION,
        "self.kv_a_layernorm = RMSNorm(rank, eps=1e-6)",
        "self.kv_a_layernorm = RMSNorm(rank, eps=config.rms_norm_eps)",
        OF_TRANSFORMERS,
    ),
    Mutant(
        "the absorbed form leaves out the latent's norm",
        DECODER,
        "torch.cat((self.latent_norm(latent), turned(key, turn)), -1)",
        "torch.cat((latent, turned(key, turn)), -1)",
        OF_DECODER,
    ),
    Mutant(
        "query heads meet the keys of another group",
        ATTENTION,
        "key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)",
        "key.repeat(1, copies, 1, 1), value.repeat(1, copies, 1, 1)",
        OF_ATTENTION,
    ),
    Mutant(
        "a new entry is written over the last one",
        ATTENTION,
        "entries.select(1, self.length),",
        "entries.select(1, self.length - 1),",
        OF_DECODER,
    ),
    Mutant(
        "what a growing cache holds is moved by one position",
        ATTENTION,
        "roomier[:, : self.length] = full[:, : self.length]",
        "roomier[:, : self.length] = full[:, : self.length].roll(1, 1)",
        OF_ATTENTION,
    ),
    Mutant(
        "positions behind a cache begin at zero again",
        MODEL,
        "past = cache.length if cache is not None else 0",
        "past = 0",
        OF_ATTENTION,
    ),
    Mutant(
        "what is written stands one position further",
        DECODER,
        "self.turns.at(self.cache.length)",
        "self.turns.at(self.cache.length + 1)",
        OF_DECODER,
    ),
    # -- positions -----------------------------------------------------------------------------------------------------
    Mutant(
        "rotated pairs lie half a head apart where they should be neighbours",
        ROTARY,
        "copy.unflatten(-1, (-1, 2))",
        "copy.unflatten(-1, (2, -1)).mT.contiguous()",
        OF_ROTARY,
    ),
    Mutant(
        "a pair's second number turns first", ROTARY, "torch.complex(cos, sin)", "torch.complex(sin, cos)", OF_ROTARY
    ),
    Mutant("frequencies fall half as fast", ROTARY, "theta ** (-even / dim)", "theta ** (-even / 2 / dim)", OF_ROTARY),
    Mutant(
        "YaRN's factor on the table is left out",
        ROTARY,
        "return yarn_magnitude(scaling.factor)\n",
        "return 1.0\n",
        OF_ROTARY,
    ),
    Mutant(
        "YaRN's factor reaches either queries or keys",
        ROTARY,
        "yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2",
        "yarn_magnitude(scaling.factor, scaling.mscale_all_dim)",
        OF_ROTARY,
    ),
    # -- the model and its losses --------------------------------------------------------------------------------------
    Mutant(
        "multi-token prediction is asked for the token before",
        MODEL,
        "self.cross_entropy(hidden, targets[:, depth:])",
        "self.cross_entropy(hidden, targets[:, depth - 1 : -1])",
        OF_MTP,
    ),
    Mutant(
        "multi-token prediction sees the token before",
        MODEL,
        "self.embed_tokens(tokens[:, depth:])",
        "self.embed_tokens(tokens[:, depth - 1 : -1])",
        OF_MTP,
    ),
    Mutant(
        "multi-token prediction joins state and embedding in the report's order",
        MODEL,
        "(self.enorm(embedded), self.hnorm(hidden))",
        "(self.hnorm(hidden), self.enorm(embedded))",
        OF_MTP,
    ),
    Mutant(
        "the balance loss is part of the loss that is told",
        MODEL,
        "return Losses(loss, mtp, objective, routing)",
        "return Losses(objective, mtp, objective, routing)",
        OF_ROUTER,
    ),
    Mutant(
        "the loss in pieces is a mean over targets that are not scored as well",
        MODEL,
        "total / (targets != IGNORE).sum()",
        "total / targets.numel()",
        OF_RECOMPUTING,
    ),
    Mutant(
        "what is computed again may choose other experts",
        MODEL,
        "chosen = operation == torch.ops.aten.topk.default",
        "chosen = False",
        OF_RECOMPUTING,
    ),
    Mutant(
        "depth adds variance to a fresh model",
        MODEL,
        "std / math.sqrt(2 * self.config.num_hidden_layers) if output else std",
        "std",
        "tests/test_model.py -k scaled_by_depth",
    ),
    Mutant(
        "dropout acts in evaluation",
        LAYERS,
        "if not self.training or self.p == 0 or",
        "if self.p == 0 or",
        "tests/test_layers.py",
    ),
    # -- the optimizer -------------------------------------------------------------------------------------------------
    Mutant(
        "gradients of micro-batches are added, not averaged",
        OPTIM,
        "(losses.objective / len(batches)).backward()",
        "losses.objective.backward()",
        OF_ACCUMULATION,
    ),
    Mutant(
        "all experts are made orthogonal as one matrix",
        OPTIM,
        "stack.reshape(-1, rows, columns)",
        "stack.reshape(len(weights), -1, columns)",
        OF_OPTIM,
    ),
    Mutant(
        "gate and up are made orthogonal as one matrix",
        OPTIM,
        'stack.shape[-2] // group["fused"]',
        "stack.shape[-2]",
        OF_OPTIM,
    ),
    Mutant("momentum does not look ahead", OPTIM, "torch.lerp(weight.grad, buffer, momentum)", "buffer", OF_OPTIM),
    Mutant(
        "norms and biases decay",
        OPTIM,
        '{"params": groups["norms"], "peak_lr": config.adam_lr}',
        '{"params": groups["norms"], "peak_lr": config.adam_lr, "weight_decay": config.muon_weight_decay}',
        OF_OPTIM,
    ),
    Mutant(
        "the router learns at the pace of the embedding",
        OPTIM,
        '{"params": groups["router"], "peak_lr": config.router_lr}',
        '{"params": groups["router"], "peak_lr": config.adam_lr}',
        OF_OPTIM,
    ),
    Mutant(
        "the average forgets as fast at the start",
        OPTIM,
        "min(self.decay, (1 + step) / (10 + step))",
        "self.decay",
        OF_OPTIM,
    ),
    # -- the text ------------------------------------------------------------------------------------------------------
    Mutant(
        "targets are the tokens themselves", DATA, "ids[:, 1:].reshape(shape)", "ids[:, :-1].reshape(shape)", OF_BATCHES
    ),
    Mutant(
        "epochs are shuffled by the generator that everyone draws from",
        DATA,
        "np.random.default_rng((self.seed, self.cursor.epoch))",
        "np.random.default_rng(int(torch.randint(1 << 31, ())))",
        OF_BATCHES,
    ),
    Mutant(
        "every epoch has the order of the first",
        DATA,
        "np.random.default_rng((self.seed, self.cursor.epoch))",
        "np.random.default_rng(self.seed)",
        OF_BATCHES,
    ),
    Mutant(
        "the last window of an epoch is never read",
        DATA,
        "if self.cursor.window == len(self.starts):",
        "if self.cursor.window == len(self.starts) - 1:",
        OF_BATCHES,
    ),
    Mutant("a short last window is not priced", DATA, "((0, whole), (whole, last))", "((0, whole),)", OF_BATCHES),
    # -- the price of a text -------------------------------------------------------------------------------------------
    Mutant(
        "the balance loss is part of val_loss",
        SCORE,
        "losses[goal != IGNORE].cpu()",
        "(losses[goal != IGNORE] + model.config.aux_loss_alpha * routing.balance_loss.sum()).cpu()",
        OF_SCORE,
    ),
    Mutant(
        "val_loss is a mean of batches' means",
        SCORE,
        "return np.concatenate(prices) if prices",
        "return np.concatenate([np.full(len(p), np.mean([q.mean() for q in prices])) for p in prices]) if prices",
        OF_SCORE,
    ),
    Mutant(
        "a text is priced under dropout", SCORE, "with evaluating(model), autocast():", "with autocast():", OF_AVERAGE
    ),
    Mutant(
        "the load of an evaluation is that of its last batch",
        SCORE,
        "load = routing.load if load is None else load + routing.load",
        "load = routing.load",
        OF_SCORE,
    ),
    Mutant(
        "the last overlapping window is left out",
        SCORE,
        "max(len(ids) - 1 - (length - half), 1)",
        "max(len(ids) - 1 - length, 1)",
        OF_SCORE,
    ),
    Mutant(
        "the bytes of a split are its characters",
        SCORE,
        "corpus.characters(split), corpus.bytes(split)",
        "corpus.characters(split), corpus.characters(split)",
        OF_SCORE,
    ),
    Mutant(
        "the characters of a part of a split are its bytes",
        SCORE,
        "sum(byte & 0xC0 != 0x80 for byte in data)",
        "len(data)",
        OF_SCORE,
    ),
    # -- writing -------------------------------------------------------------------------------------------------------
    Mutant(
        "top-p drops the token that crosses the line",
        SAMPLING,
        "ordered.cumsum(-1) - ordered >= config.top_p",
        "ordered.cumsum(-1) > config.top_p",
        OF_SAMPLING,
    ),
    Mutant(
        "top-p sees the chances before the temperature",
        SAMPLING,
        "ordered, index = logits.softmax(-1)",
        "ordered, index = below.softmax(-1)",
        OF_SAMPLING,
    ),
    Mutant(
        "min-p is a share of the mean chance",
        SAMPLING,
        "chances.amax(-1, keepdim=True)",
        "chances.mean(-1, keepdim=True)",
        OF_SAMPLING,
    ),
    Mutant("a seed is not used", SAMPLING, "1, generator=generator)", "1)", OF_SAMPLING),
    Mutant("padding of the vocabulary is drawn", SAMPLING, "logits[:, :vocab_size]", "logits", OF_SAMPLING),
    Mutant("a full context keeps its oldest half", SAMPLING, "[:, -half:]]", "[:, :half]]", OF_SAMPLING),
    # -- a run, and how it goes on -------------------------------------------------------------------------------------
    Mutant("random numbers are not restored", TRAIN, "set_random_state(state.rng)", "pass", OF_RESUMING),
    Mutant("the optimizers' state is not restored", CHECKPOINT, "optimizers.load_state(tensors)", "pass", OF_RESUMING),
    Mutant(
        "the cursor is one window further",
        CHECKPOINT,
        "Cursor(self.epoch, self.window)",
        "Cursor(self.epoch, self.window + 1)",
        OF_RESUMING,
    ),
    Mutant(
        "the schedule begins again when a run goes on",
        TRAIN,
        "optimizers.step(state.progress(config))",
        "optimizers.step(state.progress(config) - eta.progress)",
        OF_RESUMING,
    ),
    Mutant("gradients are never cleared", TRAIN, "optimizers.zero_grad()", "pass", OF_RESUMING),
    Mutant(
        "the schedule is one step ahead",
        TRAIN,
        "optimizers.step(state.progress(config))",
        "optimizers.step((state.step + 1) / config.steps)",
        OF_LOOP,
    ),
    Mutant(
        "gradients are not clipped before the step",
        TRAIN,
        "config.optim.grad_clip",
        "0.0 * config.optim.grad_clip",
        OF_LOOP,
    ),
    Mutant(
        "the average is not what is evaluated",
        TRAIN,
        "with average.applied():\n                limit",
        "if True:\n                limit",
        OF_AVERAGE,
    ),
    Mutant(
        "the average is evaluated but not saved",
        TRAIN,
        "tensors_of(model),",
        "average.other or tensors_of(model),",
        OF_AVERAGE,
    ),
    Mutant("a step is told twice when a run goes on", METRICS, "<= keep_steps", "<= keep_steps + 1", OF_LOG),
    Mutant(
        "the manifest is there before the files",
        STORED,
        "passing.mkdir(parents=True)",
        "path.mkdir(parents=True)\n        (path / MANIFEST).write_text('{\"files\": {}}')\n        passing.mkdir()",
        OF_DISK,
    ),
    Mutant("files are not synced before the manifest", STORED, "sync(file)", "pass", OF_DISK),
    Mutant(
        "a damaged file of the right size is loaded", STORED, ' or sha256_of(path) != expected["sha256"]', "", OF_DAMAGE
    ),
    Mutant("a save that failed is noticed at the next one", TRAIN, "folder.saved(patient=False)", "pass", OF_DISK),
    Mutant("what is saved meanwhile is no copy", CHECKPOINT, 'tensor.to("cpu", copy=True)', "tensor", OF_DISK),
    Mutant("the best checkpoint is removed", CHECKPOINT, "if path not in best]", "]", OF_DISK),
)


def mutate(project: Path, mutant: Mutant) -> None:
    path = project / mutant.file
    path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")


def stale() -> list[str]:
    """Which mutants the code has left behind: what they change is no longer there, or not once."""
    found = {mutant: (ROOT / mutant.file).read_text("utf-8").count(mutant.old) for mutant in MUTANTS}
    return [f"{one.name}: {one.file} has {one.old!r} {count} times" for one, count in found.items() if count != 1]


def copy_project(to: Path) -> None:
    """All that git knows of or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def in_project(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, where the packages to be imported are those of this copy."""
    own = {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "999"}
    options: dict = {"cwd": project, "env": os.environ | own, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *arguments], timeout=PATIENCE, check=False, **options)


def outcome_of(tests: str, mutant: Mutant | None = None) -> Outcome:
    """What these tests make of a copy of the project, with a mutant in it or without."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="mutant-") as folder:
        project = Path(folder) / "project"
        copy_project(project)
        options = [
            "-x",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-rfE",
            "--hypothesis-seed=0",
            f"--basetemp={folder}/scratch",
        ]
        try:
            if mutant:
                mutate(project, mutant)
            done = in_project(project, "-m", "pytest", *options, *shlex.split(tests))
        except subprocess.TimeoutExpired:
            return Outcome("BROKEN", f"its tests took longer than {PATIENCE} s", PATIENCE)
    return Outcome(*judge(done), time.monotonic() - began)


def judge(done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """Verdict and why, of what pytest said."""
    if done.returncode == 0:
        return "SURVIVED", "its tests pass"
    failure = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::.*?)(?: - (.*))?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failure is None:
        return "BROKEN", (done.stdout + done.stderr).strip()[-500:]
    test, reason = failure[1], failure[2] or ""
    return ("caught", test) if NOTICED.match(reason) else ("BROKEN", f"{test}: {reason}")


def wanted(names: list[str]) -> list[Mutant]:
    return [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]


def check_import() -> str | None:
    """What is wrong with a copy, if it is not the copy that Python imports."""
    with TemporaryDirectory(prefix="mutant-") as folder:
        copy_project(Path(folder))
        said = in_project(Path(folder), "-c", "import moe, train; print(moe.__file__, train.__file__)").stdout.strip()
        print(f"imported from a copy: {said}")
        here = Path(folder).resolve()
        return None if [here / "moe/__init__.py", here / "train.py"] == list(map(Path, said.split())) else said


def check_tests(selections: Iterable[str], workers: ThreadPoolExecutor) -> bool:
    """Whether all tests pass as long as nothing is changed."""
    selections = sorted(set(selections))
    fine = True
    for tests, outcome in zip(selections, workers.map(outcome_of, selections), strict=True):
        print(f"{outcome.seconds:5.1f} s  unchanged, {tests}", flush=True)
        if outcome.verdict != "SURVIVED":
            print(f"error: these fail as they are: {outcome.why}", file=sys.stderr)
            fine = False
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutant's name; by default all of them")
    parser.add_argument("--jobs", type=int, default=2, help="so many at a time, each on one thread")
    arguments = parser.parse_args()
    began, chosen, tally = time.monotonic(), wanted(arguments.names), dict.fromkeys(("caught", "SURVIVED", "BROKEN"), 0)
    if not chosen:
        parser.error(f"no mutant is called {' or '.join(arguments.names)}")
    if left_behind := stale():
        print("error: these mutants are stale:", *left_behind, sep="\n", file=sys.stderr)
        return 2
    if (elsewhere := check_import()) is not None:
        print(f"error: a copy of the project is not what is imported, but {elsewhere}", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(arguments.jobs) as workers:
        if not check_tests((mutant.tests for mutant in chosen), workers):
            return 2
        outcomes = workers.map(lambda mutant: outcome_of(mutant.tests, mutant), chosen)
        for mutant, outcome in zip(chosen, outcomes, strict=True):
            tally[outcome.verdict] += 1
            print(f"{outcome.seconds:5.1f} s  {outcome.verdict:8}  {mutant.name:75}  {outcome.why}", flush=True)
    broken = f", {tally['BROKEN']} broken" if tally["BROKEN"] else ""
    print(f"\n{time.monotonic() - began:.0f} s")
    print(f"{len(chosen)} mutants, {tally['caught']} caught{broken}")
    return 0 if tally["caught"] == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
