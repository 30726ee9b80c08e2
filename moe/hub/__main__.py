"""Published models in, models trained here out.

python -m moe.hub import Qwen3-30B-A3B out/qwen    a Hugging Face folder becomes a run
python sample.py out/qwen --prompt "Once"          which samples, scores, and is trained on with --init-from
python -m moe.hub export out/tiny tiny             a run becomes a folder that transformers opens
python -m moe.hub parity                           every family against transformers, as a table
"""

import json as jsonlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moe.config import MoeError
from moe.hub.configs import Reading
from moe.hub.exports import SHARD_BYTES, export_run
from moe.hub.imports import import_run
from moe.machine.command import run_commands
from moe.machine.cost import count, readable
from moe.machine.device import Dtype
from moe.tokenizer import NoTokenizer

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


def import_command(
    dir: Folder,
    run: RunFolder,
    dtype: Literal["stored"] | Dtype = "stored",
    skip_mtp: bool = False,
    reading: Reading = "transformers",
    tokenizer: Path | None = None,
) -> None:
    """Make a run of a Hugging Face folder.

    Args:
        dir: The folder, with config.json and .safetensors files.
        run: The run's folder, which must not hold one yet.
        dtype: Of the stored weights. stored: as they are, FP8 as bfloat16.
        skip_mtp: Leave DeepSeek-V3's layers for multi-token prediction out.
        reading: Where DeepSeek's own inference code computes otherwise than transformers, which of them to follow.
        tokenizer: Another folder to take the tokenizer from.
    """
    source, words = import_run(dir, run, dtype, skip_mtp, reading, tokenizer)
    size = count(source.config)
    print(f"imported {source.family.name}, {readable(size.total)} parameters, {readable(size.active)} active: {run}")
    depths, skipped = source.config.num_nextn_predict_layers, source.skipped
    if depths or skipped:
        print(f"multi-token prediction: {f'{skipped} modules skipped' if skipped else f'{depths} modules'}")
    if isinstance(words, NoTokenizer):
        print("no tokenizer.json there: the run neither reads nor writes text until one is named with --tokenizer")


def export_command(
    run: RunFolder, dir: Folder, dtype: Dtype | None = None, mtp: bool = False, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        run: A run's folder.
        dir: The folder to write, which must not be there yet, or be empty.
        dtype: Of the weights; by default as the run stores them.
        mtp: Multi-token prediction as well, in DeepSeek's form, which transformers reports as unexpected keys.
        shard_bytes: Where the next file of weights begins.
    """
    if shard_bytes < 1:
        raise MoeError(f"--shard-bytes {shard_bytes}: give the bytes of a file, at least 1")
    family, left_out = export_run(run, dir, dtype, mtp, shard_bytes)
    print(f"exported {family.architecture}: {dir}")
    if left_out:
        print(f"multi-token prediction: {left_out} modules left out, as transformers' class does; --mtp keeps them")


def parity_command(family: str | None = None, models: int = 6, seed: int = 0, json: bool = False) -> None:
    """Compare every family with transformers on small random models, and print the table.

    Args:
        family: One alone, such as DeepseekV3.
        models: Drawn for each family.
        seed: Of the draws.
        json: Print one JSON object.
    """
    from moe.hub.parity import HEAD, compare, line_of, only

    families, rows = only(family), []
    if not json:
        print(HEAD)
    for one in families:
        rows.append(compare(one, models, seed))
        if not json:
            print(line_of(rows[-1]), flush=True)
    if json:
        print(jsonlib.dumps({"rows": [asdict(row) for row in rows]}))
    if wrong := [row.family for row in rows if not row.good]:
        raise MoeError(f"not as in transformers: {', '.join(wrong)}")


def main() -> int:
    commands: dict[str, Any] = {"import": import_command, "export": export_command, "parity": parity_command}
    return run_commands("python -m moe.hub", commands, __doc__)


if __name__ == "__main__":
    sys.exit(main())
