"""The mistakes of mutants.py follow the code; that the tests notice them is for `python tests/mutants.py` to show."""

import mutants


def test_what_every_mutant_changes_is_there_once():
    assert mutants.stale() == []


def test_no_mutant_is_listed_twice_and_each_changes_something():
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS)
    assert all(mutant.old != mutant.new for mutant in mutants.MUTANTS)
