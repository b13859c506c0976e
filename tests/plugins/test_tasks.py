"""An evaluation task from outside the package, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.app.small import World, cli, done, error_line
from tests.plugins.conftest import PLUGINS, forget


def test_a_task_of_ones_own_reports_beside_the_others(trained: Path, world: World) -> None:
    forget()  # what is stored with the run names the module
    command = ("eval", world.config, f"--workdir={trained}", "--task=vowels")
    outcome = done(*command)
    assert "on: 8 letters" in outcome.err and "off: " in outcome.out
    given = (PLUGINS, "--config.eval.own.kind=vowels", "--config.eval.own.letters=xyz", f"--json={trained / 'v.json'}")
    assert "xyz" in done(*command, *given).out
    (first, second) = sorted((trained / "eval").rglob("vowels.json"))
    assert [json.loads(path.read_text())["letters"] for path in (first, second)] == ["aeiou", "xyz"]
    assert json.loads((trained / "v.json").read_text()) == json.loads(second.read_text())
    assert "vowels.json of step 4 already" in done(*command, "--follow").err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task=vowel"], ["--task=vowel: it must be one of", "did you mean 'vowels'?"]),
        (["--config.eval.own={'kind': 'vowel'}"], ["eval.own.kind='vowel'", "did you mean 'vowels'?"]),
        (["--config.eval.own={'kind': 'vowels', 'letter': 'a'}"], ["unknown key eval.own.letter", "'letters'"]),
        (["--config.eval.own={'kind': 'vowels', 'max_new_tokens': 0}"], ["eval.own.max_new_tokens=0"]),
        (["--config.eval.own={'kind': 'ruler', 'samples': 1}"], ["unknown key eval.own.samples", "nothing to choose"]),
        (
            ["--task=counted", "--config.eval.own={'kind': 'vowels'}"],
            ["--task=counted: eval.own has the settings of 'vowels'", "{'kind': 'counted'}"],
        ),
        (["--task=counted"], ["eval.own.of is not set"]),
    ],
)
def test_mistakes_are_one_line(trained: Path, world: World, flags: list[str], parts: list[str]) -> None:
    line = error_line(cli("eval", world.config, PLUGINS, f"--workdir={trained}", *flags))
    assert all(part in line for part in parts), line
