"""The public names: documented, light to import, seen by type checkers; and the examples of docs/api.md run."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import intttrain

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs" / "api.md").read_text()


def test_the_examples_of_the_page_run(capsys):
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), names)
    assert names["first"].mean() < names["second"].mean()
    means, *losses, tokens = capsys.readouterr().out.splitlines()
    assert len(means.split()) == 2 and len(tokens.strip("[]").split()) == 4
    losses = np.array(losses, float)
    assert len(losses) == 3 and np.isfinite(losses).all()


def test_every_name_is_documented_and_no_other():
    rows = re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)", row)]
    assert sorted(documented) == sorted(intttrain.__all__)


def test_the_three_lists_agree():
    """What is exported, what is loaded, and what type checkers see."""
    tree = ast.parse(Path(intttrain.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == intttrain._MODULE_OF and sorted(seen) == sorted(intttrain.__all__)
    for name, module in seen.items():
        assert getattr(intttrain, name) is getattr(sys.modules[module], name)
    assert set(intttrain.__all__) <= set(dir(intttrain))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no public name 'make_trainer'"):
        _ = intttrain.make_trainer
    from intttrain import layout  # a folder that is not a public name is still found

    assert layout.__name__ == "intttrain.layout"


def test_importing_loads_nothing_and_a_name_starts_no_device():
    program = """
import sys
import intttrain
print(sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "numpy", "flax", "ml_collections")))
intttrain.make_train_step, intttrain.Generator, intttrain.load_trained
import jax
jax.config.update("jax_platforms", "none such")  # the first use of a device would fail
intttrain.default_config()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-3000:]
