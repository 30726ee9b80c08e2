"""Turn text into token shards that train.py reads.

python data/prepare.py my-text.txt --out prepared      a file, or a folder of files
python train.py --data prepared
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from moe.config import DataConfig, MoeError
from moe.corpus import prepare
from moe.metrics import Display


@dataclass(frozen=True)
class Arguments:
    source: Annotated[str, tyro.conf.Positional]  # a text file, a folder of text files, or a data set's name
    out: Path | None = None  # the folder to make; by default one under out/data/
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"
    vocab_size: int = 512  # of the BPE, 256 bytes and the end of text included
    val_fraction: float = 0.1  # the last characters of the text
    errors: Literal["strict", "replace"] = "strict"  # what undecodable bytes do: stop, or become U+FFFD


def main() -> int:
    args = tyro.cli(Arguments, description=__doc__)
    display = Display()
    try:
        config = DataConfig(args.source, args.tokenizer, args.vocab_size, args.val_fraction, args.errors)
        corpus = prepare(config, args.out, advance=display.advance)
    except MoeError as error:
        display.close()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    display.close()
    for split in ("train", "val"):
        counts = {"characters": corpus.characters(split), "bytes": corpus.bytes(split), "tokens": corpus.tokens(split)}
        print(f"{split:6}" + "".join(f"{number:>16,} {name}" for name, number in counts.items()))
    print(f"\nnext   python train.py --data {corpus.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
