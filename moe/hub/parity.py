"""`python -m moe.hub parity`: every family against transformers, on small random models.

transformers builds a model of a drawn configuration, its weights random, norms away from one and biases away from zero,
since what rests at its neutral value hides mistakes. It is saved, opened here and compared: logits, the experts that
each layer chose, logits token by token from the cache, and the gradient of every tensor. Then it goes back: exported,
opened by transformers, compared again. All in float32 on the CPU.

Differences are relative to the largest absolute value of what is compared.
"""

import importlib.util
import json
import logging
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe.attention import Cache
from moe.decoding.decoder import Decoder
from moe.hub.exports import save
from moe.hub.families import FAMILIES, Family, family_named
from moe.hub.folder import FP8, SCALE, HubError, dequantise
from moe.hub.imports import load
from moe.hub.tensors import pieces
from moe.model import Transformer
from moe.router import Router

BLOCK = (16, 12)  # of the FP8 scales: the drawn models are narrower than DeepSeek's 128
VOCABULARY, LENGTH = 96, 24
ROUNDING = 1e-3
BAR = 1e-4
DEEPSEEK = ("DeepseekV3", "DeepseekV2")


@dataclass
class Row:
    """What was found of one family: the worst of its drawn models."""

    family: str
    models: int = 0
    imports: bool = True  # names, shapes and chosen experts are transformers'
    exports: bool = True  # the same bytes under the same names, nothing missing or unexpected
    logits: float = 0.0
    cached: float = 0.0
    gradients: float = 0.0
    fp8: float = 0.0

    @property
    def good(self) -> bool:
        return self.imports and self.exports and max(self.logits, self.cached, self.fp8, self.gradients) < BAR


def compare(family: Family, models: int, seed: int = 0) -> Row:
    """Draw so many models of a family, and compare each with transformers in every way."""
    if models < 1:
        raise HubError(f"--models {models}: give at least 1")
    row = Row(family.name)
    for number in range(models):
        with tempfile.TemporaryDirectory() as folder:
            compare_model(row, draw(family, seed + number), Path(folder))
    return row


def compare_model(row: Row, theirs: Any, folder: Path) -> None:
    theirs.save_pretrained(folder / "theirs")
    ours = load(folder / "theirs", device="cpu")
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    chosen_theirs, wanted = watched(theirs, "gate", lambda: theirs(tokens).logits)
    chosen_ours, logits = watched(ours, Router, lambda: ours(tokens))
    row.models += 1
    row.imports &= chosen_ours == chosen_theirs
    row.logits = max(row.logits, difference(logits, wanted))
    row.cached = max(row.cached, difference(token_by_token(ours, tokens), wanted))
    row.gradients = max(row.gradients, gradient_difference(ours, theirs, tokens, logits, wanted))
    row.exports &= comes_back(ours, theirs, folder, tokens, wanted)
    row.fp8 = max(row.fp8, fp8_difference(theirs, folder, tokens))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def draw(family: Family, seed: int) -> Any:
    """A small random model of transformers, its configuration drawn over the fields of its family."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family.name}Config")(**draw_config(family, random.Random(f"{family.name}{seed}")))
    config._attn_implementation = "eager"
    model = getattr(transformers, family.architecture)(config).eval()
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.2)
        elif weight.ndim == 1 and "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)
        elif weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    return model


def draw_config(family: Family, dice: random.Random) -> dict[str, Any]:
    layers, heads = dice.choice([2, 3]), 4
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": dice.choice([32, 48]),
        "intermediate_size": dice.choice([40, 56]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if family.name in DEEPSEEK else dice.choice([1, 2, 4]),
        "max_position_embeddings": 64,
        "rms_norm_eps": dice.choice([1e-6, 1e-5, 1e-3]),
        "tie_word_embeddings": dice.random() < 0.3,
        "rope_parameters": draw_rope(dice),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if "attention_bias" in family.stores:
        fields["attention_bias"] = dice.random() < 0.5
    if "head_dim" in family.stores:
        fields["head_dim"] = dice.choice([6, 8, 12])
    if "norm_topk_prob" in family.stores:
        fields["norm_topk_prob"] = dice.random() < 0.5
    if not family.dense:
        fields |= {family.stores["n_routed_experts"]: 8, "num_experts_per_tok": dice.choice([1, 2, 3])}
        fields |= {"moe_intermediate_size": dice.choice([16, 20])} if family.stores.get("intermediate_size") else {}
    if "mlp_only_layers" in family.stores:
        fields |= dice.choice([{}, {"mlp_only_layers": [layers - 1]}, {"decoder_sparse_step": 2}])
    return fields | (draw_deepseek(family, layers, dice) if family.name in DEEPSEEK else {})


def draw_deepseek(family: Family, layers: int, dice: random.Random) -> dict[str, Any]:
    groups, kept = dice.choice([(1, 1), (2, 1), (4, 2)])
    fields = {
        "q_lora_rank": dice.choice([None, 10]),
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": dice.choice([4, 8]),
        "v_head_dim": dice.choice([6, 8, 20]),
        "n_shared_experts": dice.choice([1, 2]),
        "first_k_dense_replace": dice.randrange(layers),
        "routed_scaling_factor": dice.choice([1.0, 2.5, 16.0]),
        "n_group": groups,
        "topk_group": kept,
    }
    if family.name == "DeepseekV2":
        return fields | {"topk_method": dice.choice(["greedy", "group_limited_greedy"])}
    return fields | {"rope_interleave": dice.random() < 0.7}


def draw_rope(dice: random.Random) -> dict[str, Any]:
    theta = {"rope_theta": dice.choice([1e4, 1e6])}
    longer = {"factor": 4.0, "original_max_position_embeddings": 16}
    mscale = dice.choice([{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.3}])
    return theta | dice.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "yarn", "beta_fast": 4.0, "truncate": dice.random() < 0.5, **longer, **mscale},
            {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 2.0, **longer},
        ]
    )


def watched(model: nn.Module, routers: Any, run: Any) -> tuple[list[list], Tensor]:
    """Run a model; the experts that each of its routers chose, sorted, and its logits. routers: the class, or how their
    names end."""
    chosen: list[list] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        indices = next(part for part in outputs if part.dtype == torch.int64)
        chosen.append(indices.sort(-1).values.tolist())

    named = isinstance(routers, str)
    found = [
        part
        for name, part in model.named_modules()
        if (name.split(".")[-1] == routers if named else isinstance(part, routers))
    ]
    hooks = [router.register_forward_hook(note) for router in found]
    logits = run()
    for hook in hooks:
        hook.remove()
    return chosen, logits


@torch.no_grad()
def token_by_token(model: Transformer, tokens: Tensor) -> Tensor:
    """The logits of every position, each from the cache of those before it. (B, S) -> (B, S, V)."""
    cache = Cache(model.config, len(tokens), tokens.shape[1], tokens.device, torch.float32)
    logits = [model(tokens[:, :1], cache)]
    step = Decoder(model, cache)
    logits += [step(tokens[:, at]).unsqueeze(1) for at in range(1, tokens.shape[1])]
    return torch.cat(logits, dim=1)


def gradient_difference(ours: Transformer, theirs: Any, tokens: Tensor, logits: Tensor, wanted: Tensor) -> float:
    """Of the language-model loss, the largest over all parameters. One whose gradient is nothing but rounding, as a
    router's that only ever gives the gate 1, is compared by the others' size."""
    for one in (logits, wanted):
        F.cross_entropy(one[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    own = {name: weight.grad for name, weight in ours.named_parameters()}
    plan = {piece.theirs: piece for piece in pieces(ours.config, family_named(theirs.config.to_dict()), fused=True)}
    sizes, errors = [], []
    for name, weight in theirs.named_parameters():
        gradient = own[plan[name].ours]
        if weight.grad is None and gradient is None:
            continue
        if weight.grad is None or gradient is None:
            return float("inf")
        sizes.append(weight.grad.abs().max().item())
        errors.append((gradient[plan[name].at] - weight.grad).abs().max().item())
    return max(error / max(size, ROUNDING * max(sizes)) for error, size in zip(errors, sizes, strict=True))


def comes_back(ours: Transformer, theirs: Any, folder: Path, tokens: Tensor, wanted: Tensor) -> bool:
    """Whether the export has the same bytes as what was imported, and opens in transformers without a remark."""
    import transformers

    save(ours, None, folder / "again")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("theirs", "again"))
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    opener: Any = transformers.AutoModelForCausalLM
    opened, remarks = opener.from_pretrained(folder / "again", output_loading_info=True, attn_implementation="eager")
    return same and not any(remarks.values()) and torch.equal(opened.eval()(tokens).logits, wanted)


def fp8_difference(theirs: Any, folder: Path, tokens: Tensor) -> float:
    """Of the logits, when the file holds FP8 weights and transformers the numbers that they stand for."""
    stored = load_file(folder / "theirs" / "model.safetensors")
    quantised: dict[str, Tensor] = {}
    for name, weight in stored.items():
        linear = name.endswith("_proj.weight") or ".experts." in name
        quantised |= quantise(name, weight) if linear else {name: weight}
    where = folder / "fp8"
    where.mkdir()
    save_file(quantised, where / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "theirs" / "config.json").read_text("utf-8"))
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (where / "config.json").write_text(json.dumps(config | {"quantization_config": settings}), "utf-8")
    meant = {
        name: dequantise(weight, quantised[name + SCALE], BLOCK).float() if name + SCALE in quantised else weight
        for name, weight in quantised.items()
        if not name.endswith(SCALE)
    }
    save_file(meant, folder / "theirs" / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        wanted = type(theirs).from_pretrained(folder / "theirs", attn_implementation="eager").eval()(tokens).logits
        return difference(load(where, device="cpu")(tokens), wanted)


def quantise(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix as DeepSeek publishes it: e4m3 numbers, and for each block what they are multiplied by."""
    rows, columns = BLOCK
    padded = F.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # (M/r, r, N/c, c)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(FP8).max
    small = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
    return {name: small[: weight.shape[0], : weight.shape[1]].contiguous().to(FP8), name + SCALE: scales}


def only(name: str | None) -> list[Family]:
    """The family of this name, or all. Raises HubError for another, and without transformers to compare with."""
    if importlib.util.find_spec("transformers") is None:
        raise HubError("the comparison needs transformers: pip install transformers")
    found = [family for family in FAMILIES if name in (None, family.name)]
    if not found:
        raise HubError(f"--family {name} is not one of {', '.join(family.name for family in FAMILIES)}")
    return found


HEAD = """| family | import | export | logits | from the cache | gradients | FP8 |
|---|---|---|---|---|---|---|"""


def line_of(row: Row) -> str:
    """A row of the README's table."""
    marks = ["yes" if good else "**no**" for good in (row.imports, row.exports)]
    sizes = [f"{value:.1e}" for value in (row.logits, row.cached, row.gradients, row.fp8)]
    return f"| {' | '.join([row.family, *marks, *sizes])} |"
