"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intttrain.core.workdir import Place


def write_text(path: Place, text: str) -> None:
    """Writes ``text`` so that ``path`` holds all of it or what it held before; makes the folder."""
    if not isinstance(path, Path):  # an object of a bucket, which appears whole
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Place, content: Mapping[str, Any]) -> None:
    """Writes ``content`` as ``write_text`` does. Raises ``ValueError`` for numbers that JSON does not have."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
