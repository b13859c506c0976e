"""What the exported modelling file implements, read from its text: it needs torch, and writing a folder does not."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

from intttrain.config import TTTConfig
from intttrain.config.errors import UserError
from intttrain.config.registry import UPDATE_RULES
from intttrain.config.ttt import BOUNDS

MODELING_FILE = "modeling_intttrain.py"
MODELING_PATH = Path(__file__).with_name(MODELING_FILE)


def check_implemented(ttt: TTTConfig) -> None:
    """Checks that the modelling file computes what this configuration asks for.

    Raises:
      UserError: an update rule, a target or a bound that is not in its tables.
    """
    update, tables = UPDATE_RULES.kind_of(ttt.update), tables_of(MODELING_PATH.read_text(encoding="utf-8"))
    bounds = {f"model.ttt.{field}": ("BOUNDS", name) for field, name in BOUNDS.items() if ttt.bounds[name]}
    for key, (table, name) in {
        "model.ttt.update.kind": ("UPDATE_RULES", update), "model.ttt.target": ("TARGETS", ttt.target), **bounds,
    }.items():  # fmt: skip
        if name not in tables[table]:
            raise UserError(
                f"{key}={name!r} cannot be exported: {MODELING_FILE}, which computes the update in Hugging Face "
                f"transformers, knows {', '.join(map(repr, tables[table]))} only; implement {name!r} there and add it "
                f"to {table} (docs/huggingface.md)"
            )


@functools.cache
def tables_of(source: str) -> dict[str, tuple[str, ...]]:
    """Returns the keys of every dict that a module assigns to a name in capitals."""
    found = {}
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(keys=keys)) if name.isupper():
                found[name] = tuple(str(ast.literal_eval(key)) for key in keys if key is not None)
    return found
