"""`python -m moe.lab score RUN FILE`: what a text costs under a model."""

import json
import sys
from pathlib import Path

import tyro

import moe
from moe.command import run_commands
from moe.device import Dtype
from moe.lab.score import Windows, score


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise moe.MoeError(f"{path}: {error.strerror}") from None


def score_command(
    run: tyro.conf.Positional[Path],
    file: tyro.conf.Positional[Path],
    windows: Windows = "overlapping",
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Price every byte of a file from the bytes before it.

    Args:
        run: A run's folder.
        file: Any file; what is not UTF-8 is priced byte by byte.
        windows: How a long text is cut. overlapping: every token but the first window's sees at least half a window, of
            at most 4,096 tokens. separate: windows side by side, as training's validation has them.
        dtype: Of the weights and of all products; bfloat16 takes half the memory.
        json: Print one JSON object.
    """
    result = score(moe.load(run, dtype=dtype), read_bytes(file), windows).to_json()
    if json:
        print(as_json(result))
    else:
        for name in ("nats_per_character", "bits_per_byte", "nats_per_token"):
            print(f"{result[name]:>12.4f} {name.replace('_', ' ')}")
        for name in ("characters", "bytes", "tokens"):
            print(f"{result[name]:>12,} {name}")


def as_json(result: object) -> str:
    return json.dumps(result)


def main() -> int:
    return run_commands("python -m moe.lab", {"score": score_command})


if __name__ == "__main__":
    sys.exit(main())
