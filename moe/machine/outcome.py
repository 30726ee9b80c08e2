"""What came of a training, in a few lines."""

from collections.abc import Iterator
from typing import Any

from moe.checkpoint import RunFolder, State
from moe.metrics import best_before, clock, read_metrics


def outcome(folder: RunFolder, state: State, record: dict[str, Any]) -> Iterator[str]:
    """record: the last step's line of metrics, with its evaluations."""
    yield f"\ntrained  {state.step:,} steps in {clock(state.seconds)}; checkpoint {folder.checkpoints()[-1]}"
    for label, split, name in (("result", "val", "validation"), ("test", "test", "test")):
        if f"{split}_loss" in record:
            figures = [record[f"{split}_{figure}"] for figure in ("nats_per_character", "bits_per_byte", "loss")]
            prices = "{:.4f} nats per character, {:.4f} bits per byte, {:.4f} nats per token".format(*figures)
            yield f"{label:8} {prices} on the whole {name} split"
    if (earlier := best_before(read_metrics(folder.metrics))) is not None:
        kept = folder.best().get(earlier["val_tokens"], (0, folder.path))[1]
        where = f", kept as {kept}" if kept.name == f"{earlier['step']:08d}" else ""
        best = f"{earlier['val_nats_per_character']:.4f} at step {earlier['step']:,}{where}"
        yield f"best     {best}; what followed made it worse: try fewer steps, or --model.hidden-dropout 0.2"
    if record["val_max_vio"] is not None:
        balance = f"MaxVio {record['val_max_vio']:.2f} in the worst layer, {record['val_dead_experts']} dead experts"
        yield f"balance  over the validation split: {balance}"
