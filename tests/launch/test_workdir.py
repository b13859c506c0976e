"""Which --workdir a command has: launchers that look for its checkpoints read it as the program does."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from absl import flags

REPO = Path(__file__).resolve().parents[2]
WORDS = [  # what absl reads too
    (["--workdir=runs/a"], "runs/a"),
    (["--workdir", "runs/a"], "runs/a"),
    (["-workdir=runs/a"], "runs/a"),
    (["-workdir", "runs/a b"], "runs/a b"),
    (['--workdir=it\'s a "b" = c'], 'it\'s a "b" = c'),
    (["--workdir=", "--json=a"], ""),
    (["--workdir=a", "--workdir", "gs://b/c"], "gs://b/c"),
    (["--dense_workdir=b", "--workdir=a", "--dense_workdir", "c"], "a"),
    (["--dense_workdir=b"], None),
    (["--json", "--workdir=b", "--workdir=a"], "a"),
]
SCRIPT = [  # in a word that is a script of a shell
    ("exec intttrain train --workdir=gs://b/w --json=a", "gs://b/w"),
    ("intttrain train --workdir gs://b/w; echo", "gs://b/w"),
    ("(intttrain train -workdir=gs://b/w)", "gs://b/w"),
    ('intttrain train --workdir="gs://b/my run" --x', "gs://b/my run"),
    ("intttrain train --workdir 'gs://b/my run'; x", "gs://b/my run"),
    ("intttrain train '--workdir=gs://b/my run'", "gs://b/my run"),
    ('intttrain train "--workdir=a b" -workdir=c', "c"),
    ("A=1 \\\n intttrain train \\\n\t--workdir \\\n b", "\\"),  # no shell is at hand: refused where buckets are needed
    ("intttrain train --dense_workdir=b", None),
]
COMMANDS = [(["intttrain", "train", *words], found) for words, found in WORDS]
COMMANDS += [(["bash", "-c", script], found) for script, found in SCRIPT]


def rule_of(script: str) -> str:
    text = (REPO / "launch" / script).read_text()
    return re.findall(r"^find_workdir\(\) \{.*?^\}$", text, re.DOTALL | re.MULTILINE)[0]


def test_the_batch_script_has_the_same_rule():
    """SLURM copies it to the nodes, where it cannot call a file beside it."""
    assert rule_of("slurm.sh") == rule_of("workdir_of.sh")


@pytest.mark.parametrize(("command", "found"), COMMANDS)
def test_a_workdir_is_found_however_it_is_written(command, found):
    words = [str(REPO / "launch" / "workdir_of.sh"), *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == (found or "") and not done.stderr


@pytest.mark.parametrize(("words", "found"), WORDS)
def test_the_program_reads_the_same(words, found):
    values = flags.FlagValues()
    for name in ("workdir", "dense_workdir", "json"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(["intttrain", *words])
    assert values.workdir == found
