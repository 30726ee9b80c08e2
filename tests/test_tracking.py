"""What Weights & Biases is told: names in groups, loads as histograms, one run however often it is resumed."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_training

import moe.metrics
from moe.machine.tracking import Wandb, former_id, grouped

ROOT = Path(__file__).parent.parent
RECORD = {
    "step": 2,
    "tokens": 1024,
    "loss": 3.0,
    "z_loss": None,
    "max_vio": 0.5,
    "max_vio_by_layer": [0.5, 0.25],
    "load_by_layer": [[3, 1], [2, 2]],
    "val_loss": 3.1,
}


class Pretended:
    """The part of the package that is used."""

    def __init__(self, fails: str = "") -> None:
        self.logged: list[tuple[int, dict]] = []
        self.kept: list[tuple[str, str]] = []
        self.ended, self.fails, self.step, self.id, self.dir = 0, fails, 0, "abcd1234", "run/wandb/offline-run-1/files"
        self.started: dict = {}

    def init(self, **settings):
        self._perhaps_fail("init")
        self.started = settings
        return self

    def log(self, values, step):
        self._perhaps_fail("log")
        self.logged.append((step, values))

    def log_artifact(self, artifact):
        self.kept.append((artifact.type, artifact.path))

    def finish(self):
        self.ended += 1

    def _perhaps_fail(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError(call)

    Settings = SimpleNamespace

    class Histogram:
        def __init__(self, np_histogram):
            self.counts, self.edges = (part.tolist() for part in np_histogram)

    class Artifact:
        def __init__(self, name, type):
            self.name, self.type, self.path = name, type, ""

        def add_file(self, path):
            self.path = path


@pytest.fixture
def pretended(monkeypatch) -> Pretended:
    package = Pretended()
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def start(folder=Path("run"), mode="online", **settings) -> tuple[Wandb, list[str], list[str]]:
    said: list[str] = []
    warned: list[str] = []
    return Wandb(mode, folder, {"seed": 1}, said.append, warned.append, [1, 2], **settings), said, warned


def test_names_are_grouped_layers_told_apart_and_loads_drawn_as_histograms(pretended):
    start()[0].log(RECORD, {"utilisation": 0.3})
    ((step, values),) = pretended.logged
    bars = {name: values.pop(name) for name in ("balance/layer_1/load", "balance/layer_2/load")}
    assert step == 2
    assert values == {
        "step": 2,
        "tokens": 1024,
        "train/loss": 3.0,
        "balance/max_vio": 0.5,
        "balance/layer_1/max_vio": 0.5,
        "balance/layer_2/max_vio": 0.25,
        "val/loss": 3.1,
        "speed/utilisation": 0.3,
    }
    assert [bar.counts for bar in bars.values()] == [[3, 1], [2, 2]]
    assert bars["balance/layer_1/load"].edges == [0, 1, 2]


def test_every_metric_of_a_run_has_a_group_but_what_others_are_drawn_over(debug_run):
    names = {name for record in moe.metrics.read_metrics(debug_run / "metrics.jsonl") for name in record}
    shown = {name for name in names if not name.endswith("_by_layer")}
    assert {name for name in shown if "/" not in grouped(name)} == {"step", "tokens", "seconds"}
    assert grouped("mtp_2_loss") == "train/mtp_2_loss"


def test_a_histogram_wider_than_can_be_drawn_is_left_out(pretended):
    run, _, warned = start()
    run.log(RECORD | {"load_by_layer": [[1] * 513]}, {})
    assert "balance/layer_1/load" not in pretended.logged[0][1]
    assert warned == []


def test_steps_that_are_there_already_are_not_told_again(pretended):
    run = start()[0]
    pretended.step = 3  # where a killed run's story ended
    for step in (2, 3, 4):
        run.log(RECORD | {"step": step}, {})
    assert [step for step, _ in pretended.logged] == [3, 4]


def test_a_resumed_run_goes_on_under_the_id_that_its_folder_knows(pretended, tmp_path):
    assert former_id(tmp_path) is None
    for name in ("run-20260101_000000-old", "offline-run-20260301_000000-my-own.id", "run-20260201_000000-b", "latest"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert former_id(tmp_path) == "my-own.id"
    start(tmp_path, resuming=True)
    assert (pretended.started["id"], pretended.started["resume"]) == ("my-own.id", "allow")
    start(tmp_path)  # what a start left that never reached a checkpoint is another run
    assert (pretended.started["id"], pretended.started["resume"]) == (None, None)


def test_a_report_is_kept_if_there_is_one(pretended, tmp_path):
    run = start()[0]
    run.report(tmp_path / "report.html")
    assert pretended.kept == []
    (tmp_path / "report.html").write_text("<p>")
    run.report(tmp_path / "report.html")
    assert pretended.kept == [("report", str(tmp_path / "report.html"))]


@pytest.mark.parametrize(("quiet", "mode", "silent"), [(False, "online", False), (True, "online", True)])
def test_it_keeps_quiet_when_asked_to_and_never_takes_the_display(pretended, quiet, mode, silent):
    assert start(mode=mode, quiet=quiet)[1] == []
    assert vars(pretended.started["settings"]) == {"console": "off", "silent": silent}


def test_offline_it_is_said_how_to_send_a_run_and_nothing_else(pretended):
    assert start(mode="offline")[1] == ["wandb    offline: wandb sync run/wandb/offline-run-1 sends it"]
    assert pretended.started["settings"].silent


@pytest.mark.parametrize("call", ["init", "log"])
def test_whatever_goes_wrong_is_told_once_and_ends_nothing(pretended, call):
    pretended.fails = call
    run, _, warned = start()
    run.log(RECORD, {})
    run.log(RECORD, {})
    run.report(Path(__file__))
    run.close()
    assert warned == [f"wandb is left out from here on (ConnectionError: {call}); metrics.jsonl has everything"]
    assert pretended.kept == []


def test_training_tells_every_step_and_its_end(pretended, text):
    assert (
        run_training("--out", "run", "--data", text, "--data.tokenizer", "bytes", "--wandb", "online", "--quiet") == 0
    )
    assert [step for step, _ in pretended.logged] == list(range(1, 31))
    assert pretended.ended == 1
    assert pretended.started["config"]["model"]["n_routed_experts"] == 4
    assert pretended.started["config"]["runtime"]["device"] == "cpu"
    assert all(values["speed/utilisation"] > 0 for _, values in pretended.logged)


def test_the_real_package_takes_it_all_offline_and_says_nothing(tmp_path):
    (tmp_path / "report.html").write_text("<p>all's well</p>")
    code = (
        "from pathlib import Path; from test_tracking import *\n"
        "for step, resuming in ((2, False), (3, True)):\n"
        "    run = Wandb('offline', Path(), {'seed': 1}, lambda line: None, print, [1, 2], resuming)\n"
        "    run.log(RECORD | {'step': step}, {'utilisation': 0.3}); run.report(Path('report.html')); run.close()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "WANDB_CONFIG_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert first.name.split("-")[-1] == second.name.split("-")[-1]
    for folder in (first, second):
        (story,) = (path.read_bytes() for path in folder.glob("*.wandb"))
        for name in (
            b"balance/layer_2/max_vio",
            b"balance/layer_1/load",
            b"histogram",
            b"speed/utilisation",
            b"report",
        ):
            assert name in story
