"""The model card: what a model is, what it was trained on and what came of it, from the run's own files."""

from collections.abc import Mapping
from pathlib import Path

from moe.checkpoint import RunFolder, StoredRun
from moe.config import ModelConfig
from moe.hub.families import Family
from moe.hub.folder import HubError
from moe.machine.cost import count, readable
from moe.metrics import clock, read_metrics
from moe.tokenizer import NoTokenizer, Tokenizer

FIGURES = {"nats per character": "nats_per_character", "bits per byte": "bits_per_byte", "nats per token": "loss"}
USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained("{name}") for kind in (AutoTokenizer, AutoModelForCausalLM))
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```
"""


def card(name: str, family: Family, config: ModelConfig, tokenizer: Tokenizer, facts: Mapping[str, str]) -> str:
    """Markdown, with the head that the hub reads. facts: lines of the table about its training."""
    size = count(config)
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{family.model_types[0]}]"]
    attention = "latent" if config.attention == "latent" else f"grouped, {config.key_value_heads} key-value heads"
    shape = {
        "parameters": f"{readable(size.total)}, {readable(size.active)} active for a token",
        "layers": f"{config.num_hidden_layers}, {config.num_moe_layers} of them with experts",
        "width": str(config.hidden_size),
        "attention": f"{attention}, {config.num_attention_heads} heads",
        "context": f"{config.max_position_embeddings:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
    }
    if config.num_moe_layers:
        shared = f", {config.n_shared_experts} shared" if config.n_shared_experts else ""
        shape["experts"] = f"{config.n_routed_experts}, {config.num_experts_per_tok} for each token{shared}"
    parts = [*head, "---", "", f"# {cell(name)}", "", f"A language model of the {family.name} architecture.", ""]
    parts += [*table(shape), *(("", "## Where it comes from", "", *table(facts)) if facts else ())]
    if not isinstance(tokenizer, NoTokenizer):
        parts += ["", "## Use", USE.format(name=cell(name), prompt="Once").rstrip()]
    return "\n".join(parts) + "\n"


def table(rows: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {cell(value)} |" for name, value in rows.items())]


def cell(text: str) -> str:
    """Text that cannot end its cell or become markup."""
    return "".join({"|": "\\|", "<": "&lt;", "\n": " ", "`": "'", '"': "'"}.get(letter, letter) for letter in text)


def facts_of(stored: StoredRun) -> dict[str, str]:
    """A run's training as lines of the card: its text, length and result; of an imported one where it is from."""
    run = stored.checkpoint.absolute().parents[1]
    if imported := RunFolder(run).read_setup()[2].get("imported"):
        return {"imported from": str(imported)}
    config, step = stored.config, int(stored.checkpoint.name)
    facts = {"text": Path(config.data.source).name, "seed": str(config.seed)}
    if config.init_from:
        facts["started from"] = Path(config.init_from).name
    records = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    try:
        for record in (record for record in records if record["step"] == step):
            facts["steps"] = f"{step:,}, {record['tokens']:,} tokens in {clock(record['seconds'])}"
            for split, meaning in (("val", "validation"), ("test", "test")):
                if f"{split}_loss" in record:
                    priced = (f"{record[f'{split}_{name}']:.4f} {unit}" for unit, name in FIGURES.items())
                    facts[meaning] = ", ".join(priced)
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # missing, null, a list, not finite
        what = f"{type(error).__name__}: {error}"
        raise HubError(f"{run / 'metrics.jsonl'}: step {step} lacks what training writes ({what})") from None
    return facts
