"""The word that was meant by one that is not known."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names the nearest of the known words, or nothing where none is near."""
    by_form = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), by_form, n=1)
    return f"did you mean {by_form[near[0]]}?" if near else ""


def instead_of(word: str, known: Iterable[str]) -> str:
    """What to say behind "is not known: ", where the known words are few enough to be listed."""
    names = list(known)
    question = did_you_mean(word, names)
    return f"{question} There are {', '.join(names)}" if question else f"there are {', '.join(names)}"
