"""Write with a trained model.

python sample.py                              one sample from the newest run under out/
python sample.py out/tiny --prompt "ROMEO:"   continue a prompt
python sample.py --num-samples 3 --seed 7     several at once, repeatable
python sample.py -i                           ask again and again
"""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

import moe
from moe.checkpoint import Run
from moe.config import SampleConfig
from moe.machine.command import out_of_memory
from moe.machine.device import Dtype
from moe.sampling import SamplingError, sample, to_stderr


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path | None, tyro.conf.Positional] = (
        None  # folder of a run or of a checkpoint; by default the newest
    )
    prompt: str | None = None  # the text to continue; by default the start of a text
    prompt_file: Path | None = None  # a file with the prompt; - reads standard input
    interactive: Annotated[bool, tyro.conf.arg(aliases=("-i",))] = False  # a loop of prompts, until an empty one
    max_new_tokens: int = 200
    drawing: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    num_samples: int = 1  # made together, as one batch
    seed: int | None = None
    dtype: Dtype = "float32"  # of the weights and of all products; bfloat16 takes half the memory
    json: bool = False  # one JSON object: prompt, samples[{text, tokens}]


def read_prompt(args: Arguments) -> str:
    """The prompt, from wherever it comes. Bytes that are not UTF-8 stay what they are."""
    if (args.prompt is not None) + (args.prompt_file is not None) + args.interactive > 1:
        raise SamplingError("--prompt, --prompt-file and --interactive exclude each other")
    if args.prompt_file is None:
        return args.prompt or ""
    try:
        data = sys.stdin.buffer.read() if str(args.prompt_file) == "-" else args.prompt_file.read_bytes()
    except OSError as error:
        raise SamplingError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    return data.decode("utf-8", "surrogateescape")


def write(text: str) -> None:
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def stream(run: Run, args: Arguments, prompt: str) -> list[list[int]]:
    """Make the samples, printing a single one as it comes; their tokens."""
    alone = args.num_samples == 1 and not args.json
    text = run.tokenizer.stream(continuing=bool(prompt))
    tokens: list[list[int]] = [[] for _ in range(args.num_samples)]
    if alone:
        write(prompt)
    for row, token in sample(
        run, prompt, args.drawing, args.max_new_tokens, args.num_samples, args.seed, on_overflow=to_stderr
    ):
        tokens[row].append(token)
        if alone:
            write(text.push(token))
    if alone:
        write(text.finish() + "\n")
    return tokens


def show(run: Run, args: Arguments, prompt: str) -> None:
    tokens = stream(run, args, prompt)
    texts = [run.tokenizer.decode(ids, continuing=bool(prompt)) for ids in tokens]
    if args.json:
        readable = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        print(
            json.dumps(
                {
                    "prompt": readable,
                    "samples": [{"text": text, "tokens": ids} for text, ids in zip(texts, tokens, strict=True)],
                }
            )
        )
    elif args.num_samples > 1:
        for number, text in enumerate(texts, 1):
            write(f"--- sample {number} of {args.num_samples}\n{prompt}{text}\n")


def converse(answer: Callable[[str], None]) -> None:
    print("Write the beginning of a text; an empty line ends.", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 stay what they are
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            prompt = input()
        except EOFError:
            return
        if not prompt:
            return
        answer(prompt)


def main() -> int:
    try:
        args = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        if args.seed is not None and not 0 <= args.seed < 2**63:
            raise SamplingError(f"--seed {args.seed} must lie between 0 and 2**63 - 1")
        if args.max_new_tokens < 0 or args.num_samples < 1:
            raise SamplingError("--max-new-tokens must not be negative, and --num-samples at least 1")
        prompt = read_prompt(args)
        run = moe.load(args.run, dtype=args.dtype)
        if args.interactive:
            converse(lambda line: show(run, args, line))
        else:
            show(run, args, prompt)
    except moe.MoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print("error: out of memory: lower --num-samples, or pass --dtype bfloat16", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stderr.close()
        return 141
    except OSError as error:  # a folder that may not be read
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
