"""Writing with this project against writing with transformers: the same weights, the same prompt, the same tokens.

Notation: B sequences, E routed experts, K experts per token.

A run (by default a small one of random weights, made for the occasion) is exported by `python -m moe.hub export` and
opened by transformers. Both write greedily in float32 with a cache, in turns: some tokens alone and many sequences at
once, and the first token behind a long prompt.

Beside it stands what memory allows. Each step reads every weight that it multiplies with, once for all B sequences: the
attention, dense and shared ones always, and of the E routed experts of a layer those that any sequence chose,
E (1 - (1 - K/E)^B) if they choose independently and evenly. No step is faster than reading those bytes.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import moe
from moe.attention import Cache
from moe.checkpoint import RunFolder, State, load
from moe.config import ModelConfig, RunConfig, TrainConfig
from moe.experts import MoE
from moe.lab.bench import BenchError, Row, alternate, check_rounds, copy_bandwidth, medians, present, ratio
from moe.machine.cost import readable
from moe.machine.device import Runtime, resolve_device
from moe.machine.weights import tensors_of
from moe.model import Transformer
from moe.sampling import generate
from moe.tokenizer import NoTokenizer

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=192,
    num_hidden_layers=6,
    max_position_embeddings=1024,
    num_attention_heads=6,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=512,
    n_routed_experts=8,
    moe_intermediate_size=144,
)  # 5M parameters
CHECKOUT = Path(moe.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Text:
    sequences: int  # B
    prompt: int
    new_tokens: int

    def within(self, context: int) -> "Text":
        new = min(self.new_tokens, max(context // 2, 1))
        return Text(self.sequences, max(min(self.prompt, context - new), 1), new)


TEXTS = (Text(1, 64, 128), Text(16, 64, 128), Text(1, 512, 1))


@dataclass(frozen=True)
class DecodeBench:
    """Writing with this project against transformers' generate, on the same weights."""

    run: Path | None = None  # a run; by default a small model of random weights
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 7
    json: bool = False  # print one JSON object

    def main(self) -> None:
        check_rounds(self.rounds)
        if importlib.util.find_spec("transformers") is None:
            raise BenchError("bench decode compares with transformers: pip install transformers")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            run = self.run or write_run(folder / "run", MODEL)
            device = resolve_device(self.device)[0]
            theirs = open_in_transformers(export(run, folder / "export")).to(device)
            ours = load(run, device=device).model
            further = {"transformers": importlib.metadata.version("transformers")}
            texts = [text.within(ours.config.max_position_embeddings) for text in TEXTS]
            rows = measure(ours, theirs, texts, self.rounds, device)
            present(rows, cells, device, self.json, lambda rows: [memory_line(ours)], further)


def write_run(path: Path, config: ModelConfig) -> Path:
    """A run of random weights."""
    torch.manual_seed(0)
    model, words = Transformer(config), NoTokenizer()
    run = RunFolder(path)
    window = min(256, config.max_position_embeddings)
    train = TrainConfig(sequence_length=window, tokens_per_step=window, short_until=0.0)
    whole = RunConfig(model=config, train=train)
    runtime = Runtime("cpu", "float32", False, "auto", 1, torch.get_num_threads())
    path.mkdir()
    run.write_setup(whole, runtime, words, {"text": "", "tokenizer": words.hash})
    run.save(tensors_of(model), None, State())
    return path


def export(run: Path, to: Path) -> Path:
    """By the command, in a process of its own."""
    command = [sys.executable, "-m", "moe.hub", "export", str(run), str(to), "--dtype", "float32"]
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env=environment, check=False
    )
    if found.returncode:
        said = found.stderr.strip().splitlines()
        raise BenchError(f"{run} could not be exported: {said[-1].removeprefix('error: ') if said else 'no message'}")
    return to


def open_in_transformers(folder: Path) -> Any:
    """A model that writes as many tokens as it is told, whatever they are."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    opener: Any = transformers.AutoModelForCausalLM
    model = opener.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def measure(ours: Transformer, theirs: Any, texts: Sequence[Text], rounds: int, device: str) -> Iterator[Row]:
    """ratio: how many times faster this project is."""
    bandwidth = copy_bandwidth(sum(tensor.nbytes for tensor in tensors_of(ours).values()), device)
    for text in texts:
        generator = torch.Generator().manual_seed(text.sequences)
        prompt = torch.randint(ours.config.vocab_size, (text.sequences, text.prompt), generator=generator).to(device)
        ways = writers(ours, theirs, prompt, text.new_tokens)
        written = {name: way() for name, way in ways.items()}
        times = alternate(ways, rounds, device=device)
        took, tokens = medians(times), text.sequences * text.new_tokens
        bound = bandwidth / step_bytes(ours, text.sequences) * text.sequences
        figures = {
            "tokens_per_second": {name: tokens / seconds for name, seconds in took.items()},
            "same_tokens": bool(written["moe"].equal(written["transformers"])),
            "bandwidth_bound": bound if text.new_tokens > 1 else None,  # tokens a second
            "copy_bandwidth": bandwidth,
        }
        shape = {"sequences": text.sequences, "prompt": text.prompt, "new_tokens": text.new_tokens}
        yield Row(shape, took, ratio(times, "transformers", "moe"), figures)


def writers(ours: Transformer, theirs: Any, prompt: Tensor, new_tokens: int) -> dict[str, Callable[[], Tensor]]:
    seen = torch.ones_like(prompt)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
    return {
        "moe": lambda: generate(ours, prompt, new_tokens, temperature=0.0),
        "transformers": lambda: theirs.generate(prompt, attention_mask=seen, **options),
    }


def experts_touched(experts: int, chosen: int, sequences: int) -> float:
    """Of a layer, expected of so many tokens that choose independently and evenly."""
    return experts * (1 - (1 - chosen / experts) ** sequences)


def step_bytes(model: Transformer, sequences: int) -> float:
    """Of weights that one new token for each sequence multiplies with; the embedding, a table look-up, is not there."""
    config, stacked = model.config, 0
    for layer in model.layers:
        if isinstance(layer.mlp, MoE):
            stacked += layer.mlp.gate_up_proj.nbytes + layer.mlp.down_proj.nbytes
    embedding = 0 if config.tie_word_embeddings else model.embed_tokens.weight.nbytes
    mtp = sum(weight.nbytes for weight in model.mtp.parameters())
    always = sum(weight.nbytes for weight in model.parameters()) - stacked - embedding - mtp
    touched = experts_touched(config.n_routed_experts, config.num_experts_per_tok, sequences)
    return always + stacked * touched / config.n_routed_experts


def cache_bytes(config: ModelConfig) -> int:
    """That a token leaves behind in all layers, measured on a cache."""
    cache = Cache(config, 1, 1, torch.device("cpu"), torch.float32)
    return sum(entries.nbytes for entries in cache.entries)


def memory_line(model: Transformer) -> str:
    config = model.config
    expected = 4 * config.num_hidden_layers * config.cache_width
    heads = config.num_attention_heads * (config.query_head_dim + config.value_head_dim)
    expanded = 4 * config.num_hidden_layers * heads
    size = sum(weight.numel() for weight in model.parameters())
    return (
        f"{readable(size)} parameters; the cache takes {cache_bytes(config):,} bytes a token (4 x layers x "
        f"{config.cache_width} = {expected:,}); all heads' keys and values would take {expanded:,}"
    )


def cells(row: Row) -> dict[str, str]:
    shape, bound = row.shape, row.further["bandwidth_bound"]
    columns = {"sequences": str(shape["sequences"]), "prompt": str(shape["prompt"]), "new": str(shape["new_tokens"])}
    speeds = row.further["tokens_per_second"]
    prefill = shape["new_tokens"] == 1
    for name, speed in speeds.items():
        taken = f"{row.medians[name] * 1e3:,.1f} ms"
        columns[f"{name}, tokens a second"] = taken if prefill else f"{speed:,.0f}"
    columns["bound by memory"] = "" if bound is None else f"{bound:,.0f}"
    columns["times faster"] = f"{row.ratio:.2f}"
    columns["same tokens"] = "yes" if row.further["same_tokens"] else "**no**"
    return columns
