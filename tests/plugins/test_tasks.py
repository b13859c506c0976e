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
    assert "counting aeiou in" in outcome.err and "are in aeiou" in outcome.out
    own = ("--config.eval.own.kind=vowels", "--config.eval.own.letters= e", "--config.eval.own.written=true")
    done(*command, PLUGINS, *own, f"--json={trained / 'vowels.json'}")
    first, second, other = (json.loads(path.read_text()) for path in sorted(trained.rglob("vowels.json")))
    assert (first["step"], first["letters"], second["letters"], second["among"]) == (4, "aeiou", " e", 8)
    assert second == other
    assert "vowels.json of step 4 already" in done(*command, "--follow").err


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task=vowel"], ["--task=vowel: it must be one of", "did you mean 'vowels'?"]),
        (["--config.eval.own={'kind': 'vowel'}"], ["eval.own.kind='vowel'", "did you mean 'vowels'?"]),
        (["--config.eval.own={'kind': 'vowels', 'letter': 'a'}"], ["unknown key eval.own.letter", "'letters'"]),
        (["--config.eval.own={'kind': 'vowels', 'written': 1}"], ["eval.own.written=1"]),
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
