"""What the README says of the code: files and functions that are there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def section(title: str) -> str:
    """Of the README, by its heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


# -- from the papers to the code ---------------------------------------------------------------------------------------

PLACE = re.compile(r"\[[^\]]+\]\(([\w/]+\.py)\)((?: `[\w.]+`)*)")
PLACES = [
    (path, name) for path, names in PLACE.findall(section("From the papers to the code")) for name in names.split()
]


@pytest.mark.parametrize(("path", "name"), PLACES)
def test_every_place_that_the_table_of_equations_names_exists(path, name):
    found = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert (ROOT / path).is_file()
    for part in name.strip("`").split("."):
        found = getattr(found, part)
    assert callable(found)


def test_the_table_of_equations_leaves_none_of_the_architectures_out():
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in section("From the papers to the code").split("\n")
        if row.startswith("| V")
    ]
    covered = {paper: set() for paper in ("V1", "V2", "V3")}
    for paper, equations, *_ in rows:
        first, _, last = equations.partition("–")
        if first.isdigit():
            covered[paper] |= set(range(int(first), int(last or first) + 1))
    assert covered["V1"] == set(range(1, 18))
    assert covered["V2"] == set(range(1, 32))
    assert covered["V3"] == set(range(1, 26))


@pytest.mark.parametrize("path", sorted({path for path in re.findall(r"\]\(([\w/.-]+)\)", README) if ":" not in path}))
def test_every_file_that_the_readme_links_to_exists(path):
    assert (ROOT / path).exists()
