"""constraints.txt pins what pyproject.toml asks for, on every Python that it names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[1]
LOCK = REPO / "constraints.txt"
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PYTHONS = [name.rsplit(" ", 1)[1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]


def lines_of_lock() -> list[str]:
    return [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]


def pins(python: str) -> dict[str, list[str]]:
    """Returns {name: versions} of the lines that pip reads on this Python, on Linux."""
    system = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found: dict[str, list[str]] = {}
    for line in map(Requirement, lines_of_lock()):
        if line.marker is None or line.marker.evaluate(system):
            (pin,) = line.specifier
            found.setdefault(canonicalize_name(line.name), []).append(pin.version)
    return found


def test_every_line_is_a_release_and_nothing_else():
    """No place to fetch from, no path, no hash: these are not the same everywhere."""
    pattern = re.compile(r"[a-z0-9][a-z0-9.-]*==[\w.+!]+( ; [\w'.<>=! ()]+)?")
    assert lines_of_lock() and [line for line in lines_of_lock() if not pattern.fullmatch(line)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_to_a_release_that_it_allows(python):
    locked = pins(python)
    assert {name: versions for name, versions in locked.items() if len(versions) > 1} == {}
    wanted = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"]]
    wanted += [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for line in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(line.name), [])
        assert versions, f"constraints.txt does not pin {line.name} for Python {python}; run `make lock`"
        assert line.specifier.contains(versions[0]), f"pyproject.toml has {line}, constraints.txt {versions[0]}"


def test_torch_is_the_release_of_the_makefile_without_its_libraries():
    (torch,) = re.findall(r"^TORCH +\?= torch==(.+)$", (REPO / "Makefile").read_text(), flags=re.MULTILINE)
    names = pins(PYTHONS[0])
    assert names["torch"] == [torch]
    assert [name for name in names if re.match(r"cuda-|triton|nvidia-(?!long)", name)] == []


def test_the_lock_is_what_make_installs_from():
    """Both installations read it, and a new one installs again."""
    makefile = (REPO / "Makefile").read_text()
    assert re.search(r"^LOCK +\?= constraints\.txt$", makefile, flags=re.MULTILINE)
    for target in ("base", "full"):
        assert f"\n$({target}): pyproject.toml $(LOCK) | $(python)\n" in makefile
    assert "install = { $(locked) $(python) -m pip install" in makefile
