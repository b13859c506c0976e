"""The example configurations and launchers that come with the program, found by name and copied for editing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from intttrain.config.errors import UserError, did_you_mean
from intttrain.storage.files import write_json

FOLDERS = ("configs", "launch")
PACKAGE = Path(__file__).resolve().parents[1]
# An installed wheel carries the examples (setup.py puts them there), a checkout has them beside the package.
EXAMPLES = PACKAGE / "examples" if (PACKAGE / "examples").is_dir() else PACKAGE.parent


def find_config(value: str) -> str:
    """Returns the value of ``--config`` with the path of the shipped example in place of its bare name.

    ``tiny`` and ``tiny:dense`` are examples; a path, and a file that is there and has such a name, stays what it is.

    Raises:
      UserError: it is a bare name, and neither a file nor an example.
    """
    name, colon, variant = value.partition(":")
    if not name or "/" in name or name.endswith(".py") or Path(name).is_file():
        return value
    shipped = {path.stem: path for path in (EXAMPLES / "configs").glob("*.py")}
    if name not in shipped:
        raise UserError(f"--config={value}: {name} is neither a file nor an example{did_you_mean(name, shipped)}")
    return f"{shipped[name]}{colon}{variant}"


def with_found_configs(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a command with the path of an example wherever ``--config`` names one."""
    found, named = [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if named:
            found.append(find_config(argument))
        elif flag in ("-config", "--config") and equals:
            found.append(f"{flag}={find_config(value)}")
        else:
            found.append(argument)
        named = not named and argument in ("-config", "--config")
    return found


def copy_examples(values: flags.FlagValues) -> int:
    """Copies the example configurations and launchers into the folder --output, and replaces nothing."""
    output = Path(values.output)
    for folder in FOLDERS:
        if (output / folder).exists():
            raise UserError(f"{output / folder} exists and is not replaced; name another folder with --output=FOLDER")
    copied = {}
    for folder in FOLDERS:
        shutil.copytree(EXAMPLES / folder, output / folder, ignore=shutil.ignore_patterns("__pycache__"))
        copied[folder] = sorted(path.name for path in (output / folder).iterdir())
        print(f"{output / folder}: {', '.join(copied[folder])}")
    if values.json:
        write_json(Path(values.json), {"output": values.output, **copied})
    return 0
