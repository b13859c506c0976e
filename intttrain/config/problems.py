"""What pydantic says about a configuration, as one sentence with the dotted path, the value and the rule."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from intttrain.config.errors import did_you_mean


def explain_problem(problem: Any, root: Any) -> str:
    """Turns one pydantic problem of the dataclass ``root`` into one sentence with the dotted path of the field."""
    section, path = _follow(problem["loc"], root)
    dotted = ".".join(path)
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {dotted}{did_you_mean(path[-1], [f.name for f in dataclasses.fields(section)])}"
        case "missing" | "missing_argument":
            return f"{dotted} is not set"
        case "union_tag_not_found":
            tags = " or ".join(map(repr, _tags(section, path[-1])))
            return f"{dotted}={problem['input']!r}: kind is not set; it is {tags}"
        case "union_tag_invalid":
            return f"{dotted}.kind={problem['ctx']['tag']!r}: it must be one of {problem['ctx']['expected_tags']}"
        case "value_error":
            return f"{dotted}={problem['input']!r}: {problem['ctx']['error']}"
        case _:
            return f"{dotted}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _follow(loc: tuple[str | int, ...], section: Any) -> tuple[Any, list[str]]:
    """Returns the section that holds the last part of ``loc``, and the path without pydantic's union tags."""
    choices: dict[str, Any] = {}  # the sections to choose from when the next part is a tag
    path: list[str] = []
    for part in loc[:-1]:
        if part in choices:
            section, choices = choices[str(part)], {}
            continue
        path.append(str(part))
        if isinstance(part, str):
            hint = get_type_hints(section)[part]
            found = sections_in(hint)
            section = found[0] if len(found) == 1 else section
            choices = {tag_of(cls): cls for cls in found} if len(found) > 1 else {}
    last = loc[-1]
    return section, path if last in choices else [*path, str(last)]


def sections_in(hint: Any) -> list[Any]:
    """Returns the configuration classes that an annotation mentions."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for part in get_args(hint) for cls in sections_in(part)]


def _tags(section: Any, name: str) -> list[str]:
    """Returns the kinds to choose from for a field of ``section``."""
    return [tag_of(cls) for cls in sections_in(get_type_hints(section)[name])]


def tag_of(cls: Any) -> str:
    """Returns the ``kind`` by which a section is told from others in its place."""
    return str(get_args(get_type_hints(cls)["kind"])[0])
