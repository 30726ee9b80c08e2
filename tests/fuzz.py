"""Damaged files by the thousand, for every reader in the table of fuzzing.py.

python tests/fuzz.py                        100,000 inputs for all of them: minutes on two cores
python tests/fuzz.py --reader shard         one alone, with as many inputs as it gets of those
python tests/fuzz.py --reader shard --again out/fuzz/shard-0123456789ab    one input again

Half of the inputs are damaged at random, by seed; the other half are led by the code they reach where atheris is
installed (pip install -e ".[fuzz]"). Each reader has processes of its own, with limits on their memory and on the
seconds an input takes. What escapes is kept under out/fuzz, and makes the exit status 1.
"""

import argparse
import hashlib
import importlib.util
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from types import FrameType
from typing import NamedTuple

SECONDS = 10  # of computing, that an input may take
SILENCE = 90  # seconds without a finished input, after which a process is given up
MEMORY = 3 << 30  # bytes that reading may take beyond what the process has when it begins
KEPT = Path("out/fuzz")
MOST_KEPT = 10  # escapes of a process
MOST_STARTS = 20  # processes of a reader
LONGEST = 300_000  # bytes of an input that coverage has led to
COUNTS = struct.Struct("4q")  # inputs, and how many of them were read, refused and escaped


class TooSlow(BaseException):
    """No Exception, lest a reader catch it."""


class Counts(NamedTuple):
    inputs: int = 0
    read: int = 0
    refused: int = 0
    escapes: int = 0


# -- a process that reads ----------------------------------------------------------------------------------------------


class Worker:
    """Feeds one reader, and writes down how far it is where its parent can see it, whatever becomes of the process."""

    def __init__(self, name: str, folder: Path, tally: Path) -> None:
        import fuzzing  # here, because atheris has to watch it being imported

        self.name, self.folder, self.outcome = name, folder / "folder", fuzzing.outcome
        self.reader = fuzzing.READERS[name]
        self.reader.build(self.folder)
        self.valid = (self.folder / self.reader.file).read_bytes()
        self.input = folder / "input"
        self.counts = Counts()
        with open(tally, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), COUNTS.size)
        assert self.outcome(self.reader, self.valid, self.folder).kind == "read", "the valid file is read"
        signal.signal(signal.SIGPROF, self.too_slow)
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        if pages:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, most))

    def too_slow(self, number: int, frame: FrameType | None) -> None:
        raise TooSlow

    def feed(self, data: bytes) -> None:
        self.input.write_bytes(data)
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            kind, message = self.outcome(self.reader, data, self.folder)
        except TooSlow:
            kind, message = "escape", f"takes longer than {SECONDS} seconds"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        escaped = kind == "escape"
        inputs, read, refused, escapes = self.counts
        self.counts = Counts(inputs + 1, read + (kind == "read"), refused + (kind == "refused"), escapes + escaped)
        self.shared[:] = COUNTS.pack(*self.counts)
        if escaped and self.counts.escapes <= MOST_KEPT:
            keep(self.name, data, message)

    def at_random(self, inputs: int, seed: int) -> None:
        random = Random(f"{self.name} {seed}")
        for _ in range(inputs):
            self.feed(self.reader.damage(self.valid, random))

    def led_by_coverage(self, inputs: int, seed: int, folder: Path) -> None:
        """Never returns: the process ends with the last input."""
        import atheris

        def mutate(data: bytes, most: int, number: int) -> bytes:
            random = Random(number)
            source = self.valid if random.random() < 0.2 else data
            new = self.reader.damage(source, random) if random.random() < 0.7 else atheris.Mutate(data, most)
            return new[:most]

        seeds = folder / "seeds"
        seeds.mkdir()
        (seeds / "valid").write_bytes(self.valid)
        flags = {"runs": inputs, "seed": seed + 1, "max_len": LONGEST, "len_control": 0, "detect_leaks": 0}
        flags |= {"timeout": 10_000, "rss_limit_mb": 0, "artifact_prefix": f"{folder}/"}
        arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), str(seeds)]
        atheris.Setup(arguments, self.feed, custom_mutator=mutate)
        atheris.Fuzz()


def keep(name: str, data: bytes, message: str) -> None:
    """The input, and why it is kept."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    again = f"python tests/fuzz.py --reader {name!r} --again {path}"
    path.with_suffix(".txt").write_text(f"{message}\n\n{again}\n", "utf-8", errors="backslashreplace")
    last = message.strip().split("\n")[-1][:300]
    print(f"ESCAPE  {name}: {last}\n        {again}", flush=True)


def work(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(1)
    if not importlib.util.find_spec("atheris"):
        return Worker(args.reader, args.folder, args.tally).at_random(args.inputs, args.seed)
    import atheris

    with atheris.instrument_imports(include=["moe"]):
        worker = Worker(args.reader, args.folder, args.tally)
    half = args.inputs // 2
    worker.at_random(half, args.seed)
    worker.led_by_coverage(args.inputs - half, args.seed, args.folder)


# -- the process that watches ------------------------------------------------------------------------------------------


def run_reader(name: str, inputs: int, seed: int) -> tuple[Counts, float]:
    """All inputs of a reader, in as many processes as it takes."""
    began, total, starts = time.monotonic(), Counts(), 0
    while total.inputs < inputs and starts < MOST_STARTS:
        counts = run_worker(name, inputs - total.inputs, seed + 1000 * starts)
        total, starts = Counts(*(a + b for a, b in zip(total, counts, strict=True))), starts + 1
    return total, time.monotonic() - began


def run_worker(name: str, inputs: int, seed: int) -> Counts:
    """One process. If it dies, or does not come back from an input, that is an escape too."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        tally, log = Path(folder, "tally"), Path(folder, "log")
        tally.write_bytes(COUNTS.pack(*Counts()))
        options = {"--reader": name, "--inputs": inputs, "--seed": seed, "--folder": folder, "--tally": tally}
        flags = [str(part) for option in options.items() for part in option]
        command = [sys.executable, __file__, "--work", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stderr=file, env=environment)
        status = watch(process, tally)
        counts = Counts(*COUNTS.unpack(tally.read_bytes()))
        if counts.inputs < inputs and status != 0:
            last, said = Path(folder, "input"), log.read_text("utf-8", "replace")[-2000:]
            what = "does not come back" if status is None else f"ends the process with status {status}"
            if not last.exists():
                raise SystemExit(f"{name}: the reader does not start:\n{said}")
            keep(name, last.read_bytes(), f"{said}\n{what}")
            counts = counts._replace(inputs=counts.inputs + 1, escapes=counts.escapes + 1)
        return counts


def watch(process: subprocess.Popen, tally: Path) -> int | None:
    """Its exit status; None if it had to be killed."""
    before, since = b"", time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = tally.read_bytes()
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > SILENCE:
            process.kill()
            process.wait()
            return None
    return process.returncode


def again(name: str, file: Path) -> int:
    import fuzzing

    with tempfile.TemporaryDirectory() as folder:
        reader = fuzzing.READERS[name]
        reader.build(Path(folder, "folder"))
        found = fuzzing.outcome(reader, file.read_bytes(), Path(folder, "folder"))
    print(f"{found.kind}: {found.message}")
    return int(found.kind == "escape")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="for all readers together")
    parser.add_argument("--reader", help="one of them alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--again", type=Path, help="an input that was kept")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # as a process of this one's
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tally", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return 0
    from fuzzing import READERS

    if args.reader and args.reader not in READERS:
        parser.error(f"there is no reader {args.reader!r}: there are {', '.join(READERS)}")
    if args.again:
        return again(args.reader, args.again)
    if not importlib.util.find_spec("atheris"):
        print("atheris is not installed, so all inputs are random: pip install atheris")
    shares = sum(reader.share for reader in READERS.values())
    inputs = {name: -(-reader.share * args.inputs // shares) for name, reader in READERS.items()}
    inputs = {name: number for name, number in inputs.items() if args.reader in (None, name)}
    columns = ("inputs", "read", "refused", "escapes", "seconds")
    print(f"{'reader':22}" + "".join(f"{column:>10}" for column in columns), flush=True)
    began, total = time.monotonic(), Counts()
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda name: (name, *run_reader(name, inputs[name], args.seed)), inputs)
        for name, counts, seconds in results:
            print(f"{name:22}" + "".join(f"{number:>10,}" for number in (*counts, round(seconds))), flush=True)
            total = Counts(*(a + b for a, b in zip(total, counts, strict=True)))
    seconds = round(time.monotonic() - began)
    print(f"{'all':22}" + "".join(f"{number:>10,}" for number in (*total, seconds)))
    return int(total.escapes > 0)


if __name__ == "__main__":
    sys.exit(main())
