"""Write with a trained model.

python sample.py                              one sample from the newest run
python sample.py out/tiny --prompt "ROMEO:"   continue a prompt
python sample.py --num-samples 3 --seed 7     several at once, repeatable
python sample.py -i                           ask again and again
python sample.py --color                      which expert had the say
"""

import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

import moe
from moe.checkpoint import Run
from moe.config import SampleConfig
from moe.lab.colour import Paper, chosen_layer, coloured, expert_layers, shares
from moe.lab.trace import trace
from moe.machine.command import out_of_memory, read_arguments
from moe.machine.device import Dtype
from moe.machine.flags import build, checked, flags_of
from moe.machine.help import Manual, row, two_columns
from moe.machine.nearest import instead_of
from moe.sampling import SamplingError, draws, mended, prompt_tokens, to_stderr

MANUAL = Manual(
    "python sample.py",
    __doc__ or "",
    {
        "The text": ("run", "--prompt", "--prompt-file", "-i", "--num-samples", "--max-new-tokens", "--seed"),
        "How the next token is drawn": ("--temperature", "--top-k", "--top-p", "--min-p"),
        "What is shown": ("--color", "--color-layer", "--json"),
    },
)
SETTINGS = ("--seed", "--temperature", "--top-k", "--top-p", "--min-p", "--max-new-tokens")  # of the prompt loop


@dataclass(frozen=True)
class Arguments:
    run: Annotated[Path | None, tyro.conf.Positional] = (
        None  # folder of a run or of a checkpoint; by default the newest under out/
    )
    prompt: str | None = None  # the text to continue; by default the start of a text
    prompt_file: Path | None = None  # a file with the prompt; - reads standard input
    interactive: Annotated[bool, tyro.conf.arg(aliases=("-i",))] = False  # a loop of prompts; /help says what it knows
    max_new_tokens: int = 200  # where a sample ends at the latest
    drawing: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    num_samples: int = 1  # made together, as one batch
    seed: int | None = None  # the same seed writes the same; by default each sample is another
    dtype: Dtype = "float32"  # of the weights and of all products; bfloat16 takes half the memory
    color: bool = False  # each token in the colour of the expert with the largest gate
    color_layer: int | None = None  # in this layer; by default in the last that has experts
    json: bool = False  # one JSON object: prompt, samples[{text, tokens, logprobs, stopped}]

    def __post_init__(self) -> None:
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise SamplingError(f"--seed {self.seed} must lie between 0 and 2**63 - 1")
        if self.max_new_tokens < 0 or self.num_samples < 1:
            raise SamplingError("--max-new-tokens must not be negative, and --num-samples at least 1")
        if (self.prompt is not None) + (self.prompt_file is not None) + self.interactive > 1:
            raise SamplingError("--prompt, --prompt-file and --interactive exclude each other")
        if self.json and (self.color or self.color_layer is not None):
            raise SamplingError("--json and --color exclude each other")


@dataclass
class Sample:
    """logprobs: of each token the natural logarithm of the probability that the model gave it, before temperature and
    filters. stopped: by an end of text, before max_new_tokens."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    stopped: bool = False


def read_prompt(args: Arguments) -> str:
    """The prompt, from wherever it comes. Bytes that are not UTF-8 stay what they are."""
    if args.prompt_file is None:
        return mended(args.prompt or "")
    try:
        data = sys.stdin.buffer.read() if str(args.prompt_file) == "-" else args.prompt_file.read_bytes()
    except OSError as error:
        raise SamplingError(f"--prompt-file {args.prompt_file}: {error.strerror}") from None
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")  # a byte order mark is no text


def write(text: str) -> None:
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def make(run: Run, args: Arguments, prompt: str, show: Callable[[str], None] | None = None) -> list[Sample]:
    """The samples; the text of the first is shown as it comes."""
    text = run.tokenizer.stream(continuing=bool(prompt))
    samples = [Sample() for _ in range(args.num_samples)]
    settings = args.drawing, args.max_new_tokens, args.num_samples, args.seed
    try:
        for drawn in draws(run, prompt, *settings, note=to_stderr, logprobs=args.json):
            sample = samples[drawn.sample]
            if drawn.ends:
                sample.stopped = True
                continue
            sample.tokens.append(drawn.token)
            sample.logprobs.append(drawn.logprob)
            if show and drawn.sample == 0:
                show(text.push(drawn.token))
    finally:
        if show:
            show(text.finish() + "\n")
    return samples


def answer(run: Run, args: Arguments, prompt: str) -> list[Sample]:
    """Make the samples and print them."""
    colours, several = args.color or args.color_layer is not None, args.num_samples > 1
    if colours:
        chosen_layer(run.model, args.color_layer)  # which may have to be refused
    streaming = not (args.json or several or colours)
    if streaming:
        write(prompt)
    samples = make(run, args, prompt, write if streaming else None)
    if args.json:
        print(as_json(run, prompt, samples))
    elif not streaming:
        for number, sample in enumerate(samples, 1):
            write(f"--- sample {number} of {len(samples)}\n" if several else "")
            if colours:
                in_colours(run, prompt, sample, args.color_layer)
            else:
                write(f"{prompt}{run.tokenizer.decode(sample.tokens, continuing=bool(prompt))}\n")
    return samples


def as_json(run: Run, prompt: str, samples: list[Sample]) -> str:
    made = [
        {
            "text": run.tokenizer.decode(sample.tokens, continuing=bool(prompt)),
            "tokens": sample.tokens,
            "logprobs": sample.logprobs,
            "stopped": sample.stopped,
        }
        for sample in samples
    ]
    readable = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return json.dumps({"prompt": readable, "samples": made})


def whole(run: Run, prompt: str, sample: Sample) -> list[int]:
    """The ids of prompt and sample, as the model reads them."""
    return prompt_tokens(run, prompt)[0].tolist() + sample.tokens


def in_colours(run: Run, prompt: str, sample: Sample, layer: int | None) -> None:
    paper = Paper.of(sys.stdout)
    if not paper.colours:
        to_stderr("no colours here (no terminal, or NO_COLOR): behind each token stands its expert")
    write(coloured(run.model, run.tokenizer, whole(run, prompt, sample), layer, paper) + "\n")


# -- the prompt loop ---------------------------------------------------------------------------------------------------
class Conversation:
    """Prompts to be continued, and commands: whatever a line asks for."""

    def __init__(self, run: Run, args: Arguments) -> None:
        self.run, self.args = run, args
        self.last: tuple[str, Sample] | None = None  # a prompt, and what was made of it
        self.flags = {flag.names[-1]: flag for flag in flags_of(Arguments)}

    def hold(self) -> None:
        """Until an empty line, or the end of the input."""
        with suppress(ImportError):  # Windows' terminals edit by themselves
            import readline  # noqa: F401
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not UTF-8 stay what they are
        to_stderr("write the beginning of a text; /help lists commands, an empty line ends")
        while (line := next_line()) and line.rstrip() != "/quit":
            try:
                self.hear(mended(line))
            except moe.MoeError as error:
                print(f"error: {error}", file=sys.stderr)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                print("error: out of memory: write a shorter text", file=sys.stderr)
            except KeyboardInterrupt:  # the end of this sample alone
                print("stopped", file=sys.stderr)

    def hear(self, line: str) -> None:
        command, _, value = line.removeprefix("/").partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            prompt = line.removeprefix("/") if line.startswith("//") else line
            self.last = prompt, answer(self.run, self.args, prompt)[0]
        elif command == "help":
            self.help()
        elif command == "experts":
            self.experts(value.strip())
        elif (name := f"--{command.replace('_', '-')}") in SETTINGS:
            given = checked([name, *value.split()], [self.flags[name]], MANUAL.usage)
            self.args = build(Arguments, given, self.args)
        else:
            known = [*(name.removeprefix("--") for name in SETTINGS), "experts", "help", "quit"]
            raise SamplingError(f"/{command} is not known: {instead_of(command, known)}; // begins a text with a slash")

    def help(self) -> None:
        """The commands, and what is set now."""
        now = {flag.names[-1]: flag for flag in flags_of(Arguments, self.args)}
        rows = [(f"/{row(now[name])[0].removeprefix('--')}", row(now[name])[1]) for name in SETTINGS]
        rows += [
            ("/experts [LAYER]", "of the last sample: how its tokens were shared, and the text by expert"),
            ("//TEXT", "continue a text that begins with a slash"),
            ("/quit", "or an empty line, or Ctrl-D; Ctrl-C stops a sample"),
        ]
        print(two_columns(rows, Paper.of(sys.stdout).width).replace("(default: ", "(now: "), file=sys.stderr)

    def experts(self, layer: str) -> None:
        expert_layers(self.run.model)
        if self.last is None:
            raise SamplingError("there is no sample yet: write the beginning of a text first")
        if layer and not layer.isdecimal():
            raise SamplingError(f"/experts {layer}: give the number of a layer, or none for the last")
        chosen_layer(self.run.model, int(layer) if layer else None)
        found = trace(self.run.model, whole(self.run, *self.last), alternatives=1)
        write(shares(found, self.run.model.config.n_routed_experts, Paper.of(sys.stdout).width) + "\n\n")
        in_colours(self.run, *self.last, int(layer) if layer else None)


def next_line() -> str | None:
    """A line of the input, or None at its end."""
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            if not typed:
                print("> ", end="", file=sys.stderr, flush=True)
            return input("> " if typed else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print("\n(an empty line, /quit or Ctrl-D ends)", file=sys.stderr)


def main() -> int:
    try:
        args = read_arguments(Arguments, MANUAL, sys.argv[1:])
        prompt = read_prompt(args)
        run = moe.load(args.run, dtype=args.dtype)
        if args.interactive:
            Conversation(run, args).hold()
        else:
            answer(run, args, prompt)
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
