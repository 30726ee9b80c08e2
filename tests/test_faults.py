"""A save that is killed, refused by the disk or cut off by a power failure never costs what was saved before."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import kills
import pytest
import torch
from conftest import TEXT, run_training
from safetensors import SafetensorError

import moe
from moe.checkpoint import RunFolder, State
from moe.config import TrainConfig
from moe.machine import stored
from moe.machine.stored import CheckpointError, verify
from moe.machine.weights import load_tensors
from moe.metrics import read_metrics

ROOT = Path(__file__).parent.parent
OPTIONS = ("--tokens-per-step", 64, "--train.sequence-length", 16, "--data.tokenizer", "bytes", "--steps", 6)
OPTIONS += ("--train.save-interval", 2, "--train.keep-last", 1, "--train.eval-interval", 0)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT.read_text()[:1500])


def train_once(*more: object) -> int:
    return run_training("--out", "run", "--data", "text.txt", *OPTIONS, "--quiet", *more)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_at_any_file_operation_of_a_save_a_whole_checkpoint_is_left_and_nothing_else_stays(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED_AT_EVERY_OPERATION]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    newest = [int(line) for line in result.stdout.split()]
    assert len(newest) >= 15  # so many operations there are, and more
    assert newest == sorted(newest)  # first only the old one, from some operation on the new one
    assert set(newest) == {1, 2}


KILLED_AT_EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from moe.checkpoint import RunFolder, State
from moe.config import TrainConfig
from moe.machine.stored import verify
from moe.machine.weights import load_tensors

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
torch.set_num_threads(1)

def save(step):
    tensors = {name: torch.full((100,), float(step)) for name in ("a", "b")}
    RunFolder(Path("run")).save(tensors, tensors.items(), State(step=step), TrainConfig(keep_last=1, keep_best=False))

def die_at(number):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in OPERATIONS and "run" in str(arguments[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

number, status = 0, signal.SIGKILL
while status == signal.SIGKILL:
    number += 1
    shutil.rmtree("run", ignore_errors=True)
    Path("run").mkdir()
    save(1)
    if os.fork() == 0:
        die_at(number)
        save(2)
        os._exit(0)
    status = os.wait()[1]
    folder = RunFolder(Path("run"))
    newest = folder.checkpoints()[-1]
    verify(newest)
    assert load_tensors(newest / "model.safetensors")["a"].eq(int(newest.name)).all()
    print(int(newest.name))
    folder.acquire()
    folder.release()
    left = {path.name for path in Path("run/checkpoints").iterdir()}
    assert newest.name in left and left <= {"00000001", "00000002"}, left
    assert all((path / "manifest.json").exists() for path in Path("run/checkpoints").iterdir())
"""


def test_nothing_gets_its_name_before_its_data_are_on_the_disk_and_the_manifest_comes_last(monkeypatch):
    synced, named = set(), []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def inode(path):
        return os.stat(path).st_ino

    def noting_fsync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def noting(call):
        def renamed(source, target):
            if not str(target).endswith(".old"):
                files = [Path(source), *Path(source).glob("*")]
                assert all(inode(file) in synced for file in files if file.is_file()), f"{target} before its data"
                if Path(target).name == "manifest.json":
                    assert {file.name for file in Path(source).parent.iterdir()} > {stored.MODEL, stored.STATE}
                    assert all(inode(file) in synced for file in Path(source).parent.iterdir())
            call(source, target)
            named.append(Path(target))
            synced.discard(inode(Path(target).parent))

        return renamed

    run = RunFolder(Path("run"))
    Path("run").mkdir()
    run.metrics.write_text('{"step": 1}\n')
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting(rename))
    monkeypatch.setattr(os, "replace", noting(replace))
    for step in (1, 2):
        tensors = {"a": torch.zeros(10)}
        path = run.save(tensors, tensors.items(), State(step=step), TrainConfig(keep_last=1))
        assert inode(run.metrics) in synced  # or a resumed run would have a gap there
        assert inode(path.parent) in synced  # the name itself
        run.metrics.write_text(run.metrics.read_text() + '{"step": 2}\n')
        synced.discard(inode(run.metrics))
    assert [path.name for path in named if path.name.isdigit()] == ["00000001", "00000002"]


def failing_writes(limit: int):
    """The disk takes so many bytes of a file and no more."""
    original = stored.save_file

    def limited(*arguments):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return original(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


def fails(error: Exception, after: int = 0):
    """The original, but for one call."""

    def patched(original):
        calls = []

        def call(*arguments, **options):
            calls.append(1)
            if len(calls) == after + 1:
                raise error
            return original(*arguments, **options)

        return call

    return patched


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")
FAULTS = {
    "a write fails at the first byte": ("save_file", lambda original: failing_writes(0)),
    "a write fails at byte 20,000": ("save_file", lambda original: failing_writes(20_000)),
    "no space is left for the optimizer": ("save_file", fails(SafetensorError("I/O error: No space left"), 1)),
    "fsync fails": ("sync", fails(OSError(errno.EIO, "Input/output error"), 1)),
    "no space is left for the manifest": ("write_whole", fails(FULL)),
    "the rename fails": ("os.rename", fails(FULL)),
    "the folder has become read-only": ("os.mkdir", fails(READ_ONLY)),
    "the old checkpoint cannot be removed": ("shutil.rmtree", fails(READ_ONLY)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_ends_training_in_one_line_and_the_run_goes_on_later_as_if_nothing_had_been(
    fault, monkeypatch, capsys
):
    assert train_once("--steps", "6") == 0
    whole = Path("run").rename("whole")
    with monkeypatch.context() as patch:
        name, patched = FAULTS[fault]
        count = []
        original_save = RunFolder.save

        def second(self, *arguments):
            count.append(1)
            if len(count) != 2:
                return original_save(self, *arguments)
            owner = getattr(stored, name.split(".")[0]) if "." in name else stored
            with pytest.MonkeyPatch.context() as inner:
                last = name.split(".")[-1]
                inner.setattr(owner, last, patched(getattr(owner, last)))
                return original_save(self, *arguments)

        patch.setattr(RunFolder, "save", second)
        assert train_once() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "could not be " in lines[0]
    run = RunFolder(Path("run"))
    verify(run.checkpoints()[-1])
    assert int(run.checkpoints()[-1].name) in (2, 4)
    assert moe.load("run")
    assert train_once("--resume", "auto") == 0
    assert kills.difference(whole, Path("run")) is None


@pytest.mark.parametrize("room", [0, 50])  # in bytes: not even half a line
def test_a_metrics_file_that_cannot_be_written_ends_training_in_one_line(room, monkeypatch, capsys):
    assert train_once() == 0
    metrics = Path("run/metrics.jsonl")
    before, limit = metrics.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    original = moe.metrics.MetricsLog.write

    def full(self, record):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before + room, limit[1]))
        try:
            original(self, record)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with monkeypatch.context() as patch:
        patch.setattr(moe.metrics.MetricsLog, "write", full)
        assert train_once("--resume", "auto", "--steps", "9") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "metrics.jsonl: cannot be written" in line
    assert train_once("--resume", "auto", "--steps", "9") == 0
    assert [record["step"] for record in read_metrics(metrics)] == list(range(1, 10))


def test_what_goes_wrong_while_training_goes_on_is_raised_at_the_next_step_and_only_once(monkeypatch):
    run, tensors = RunFolder(Path("run")), {"a": torch.zeros(3)}
    monkeypatch.setattr(stored, "sync", fails(FULL)(stored.sync))
    run.save_meanwhile(tensors, tensors.items(), State(step=1), TrainConfig())
    with pytest.raises(CheckpointError, match="No space left"):
        run.saved()
    run.saved()
    run.save_meanwhile(tensors, tensors.items(), State(step=2), TrainConfig())
    run.saved()
    assert [path.name for path in run.checkpoints()] == ["00000002"]


def test_what_is_saved_is_the_moment_of_the_save_though_training_goes_on(monkeypatch):
    run, weight = RunFolder(Path("run")), torch.zeros(3)
    run.saving = run.writer.submit(lambda: Path())  # something to wait for
    run.save_meanwhile({"a": weight}, [("b", weight)], State(step=1), TrainConfig())
    weight += 1
    run.saved()
    for name in ("model.safetensors", "optimizer.safetensors"):
        (tensor,) = load_tensors(run.checkpoints()[-1] / name).values()
        assert tensor.eq(0).all()


def test_the_best_checkpoint_is_kept_beside_the_last_ones():
    run, tensors = RunFolder(Path("run")), {"a": torch.zeros(3)}
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        run.save(tensors, tensors.items(), State(step=step, val_loss=loss), TrainConfig(keep_last=2))
    assert [int(path.name) for path in run.checkpoints()] == [2, 4, 5]
    assert run.best() == (1.0, run.path / "checkpoints" / "00000002")
    run.save(tensors, tensors.items(), State(step=6), TrainConfig(keep_last=1, keep_best=False))
    assert [int(path.name) for path in run.checkpoints()] == [6]


def test_killed_at_random_a_run_ends_as_if_it_had_not_been():
    total = kills.harness(kills=2, seed=1, jobs=1, text=TEXT.read_text()[:4000], variants=("many",))
    assert total.faults == []
    assert total.kills >= 2
