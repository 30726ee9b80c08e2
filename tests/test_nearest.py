"""Who mistypes a name is told the one that was meant."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moe
from moe.config import DataConfig, MoeError
from moe.corpus.streams import DATA_SETS, open_source
from moe.lab import study
from moe.machine.nearest import did_you_mean, instead_of


@pytest.mark.parametrize(
    ("word", "meant"),
    [("tiyn", "tiny"), ("TINY", "tiny"), ("smal", "small"), ("v2lite", "v2-lite"), ("xyz", None), ("", None)],
)
def test_the_nearest_name_is_asked_for_and_none_where_none_is_near(word, meant):
    known = ["tiny", "dense", "small", "v2-lite"]
    assert did_you_mean(word, known) == (f"did you mean {meant}?" if meant else "")
    assert instead_of(word, known).endswith("here are tiny, dense, small, v2-lite")


@given(st.text(), st.lists(st.text()))
def test_any_word_can_be_compared_with_any_others(word, known):
    assert did_you_mean(word, known) in ["", *(f"did you mean {name}?" for name in known)]


@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_a_mistyped_data_set_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MoeError, match=f"did you mean {name}\\?"):
        open_source(DataConfig(source=name[:-2] + name[-1]), lambda *_: None)


def test_a_mistyped_file_is_named_with_its_folder(tmp_path):
    (tmp_path / "my text.txt").touch()
    with pytest.raises(MoeError, match=r"did you mean .*my text\.txt"):
        open_source(DataConfig(source=str(tmp_path / "my txt.txt")), lambda *_: None)


def test_a_mistyped_study_is_named():
    with pytest.raises(MoeError, match="did you mean balance"):
        study.asked_for("balanse", None, None, None)


def test_a_mistyped_run_is_named_and_only_what_holds_one(debug_run):
    with pytest.raises(MoeError, match=r"did you mean .*debug\?"):
        moe.load(debug_run.with_name("debgu"))
    (Path(debug_run.parent) / "debgu2").mkdir()
    with pytest.raises(MoeError, match=r"did you mean .*debug\?"):
        moe.load(debug_run.with_name("debgu2"))
