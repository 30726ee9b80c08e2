"""Turn text into token shards that train.py reads.

python data/prepare.py my-text.txt --out prepared      a text, .jsonl or .parquet file, or a folder of files
python data/prepare.py tinystories --max-bytes 100000000
python train.py --data prepared

Killed, it goes on from its last shard when the same command is given again.
"""

import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe.config import DataConfig, MoeError
from moe.corpus import prepare
from moe.corpus.sources import SPLITS
from moe.corpus.streams import DATA_SETS
from moe.machine.command import print_anything, read_arguments
from moe.machine.display import Display
from moe.machine.help import Manual


@dataclass(frozen=True)
class Arguments:
    source: Annotated[str, tyro.conf.Positional]  # a file, a folder of files, or a data set's name
    out: Path | None = None  # the folder to make; by default one under out/data/
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"  # learnt from the text, plain bytes, or GPT-2's
    vocab_size: int = 512  # of the BPE, 256 bytes and the end of text included
    val_fraction: float = 0.1  # the last bytes of the text, before those of the test split
    test_fraction: float = 0.0  # the very last bytes
    errors: Literal["strict", "replace"] = "strict"  # what undecodable bytes do: stop, or become U+FFFD
    field: str = "text"  # of JSON lines and .parquet files: where the text is
    max_bytes: int = 0  # read no more text than this; 0: all


def main() -> int:
    known = [(name, f"{found.size}; {found.licence}; {found.home}") for name, found in DATA_SETS.items()]
    manual = Manual("python data/prepare.py", __doc__ or "", lists={"Data sets known by name": known})
    print_anything()
    try:
        args = read_arguments(Arguments, manual, sys.argv[1:])
    except MoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    display = Display()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        settings = asdict(args)
        out = settings.pop("out")
        corpus = prepare(DataConfig(**settings), out, advance=display.advance)
    except (MoeError, OSError) as error:
        display.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        display.close()
        print("stopped: the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    display.close()
    for split in (split for split in SPLITS if corpus.tokens(split)):
        counts = {"characters": corpus.characters(split), "bytes": corpus.bytes(split), "tokens": corpus.tokens(split)}
        print(f"{split:6}" + "".join(f"{number:>16,} {name}" for name, number in counts.items()))
    print(f"\nnext   python train.py --data {corpus.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
