"""What pydantic says about a configuration, as one sentence with the dotted path, the value and the rule."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

from intttrain.config.errors import did_you_mean
from intttrain.config.registry import Registry, expected, hints_of


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
            tags = " or ".join(map(repr, _choices(hints_of(section)[path[-1]])))
            return f"{dotted}={problem['input']!r}: kind is not set; it is {tags}"
        case "union_tag_invalid":
            tag, known = problem["ctx"]["tag"], _choices(hints_of(section)[path[-1]])
            return f"{dotted}.kind={tag!r}: {expected(tag, tuple(known))}"
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
            found = _choices(hints_of(section)[part])
            section = found.get("", section)
            choices = {} if "" in found else found
    last = loc[-1]
    return section, path if last in choices else [*path, str(last)]


def _choices(hint: Any) -> dict[str, Any]:
    """Returns the configuration classes that a field may hold, by kind; the only one under no name."""
    if isinstance(hint, Registry):
        return hint.sections()
    found = _sections_in(hint)
    return {"": found[0]} if len(found) == 1 else {_tag(cls): cls for cls in found}


def section_of(section: Any, name: str, value: Any) -> Any:
    """Returns the class of the section that ``value``, a mapping of the field ``name``, is; ``None`` for no section."""
    hint = hints_of(section)[name]
    choices, kind = _choices(hint), value.get("kind")
    if isinstance(hint, Registry):
        kind = hint.kind_of(value)
    return choices.get("") or choices.get(kind)


def _sections_in(hint: Any) -> list[Any]:
    """Returns the configuration classes that an annotation mentions."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [cls for part in get_args(hint) for cls in _sections_in(part)]


def _tag(cls: Any) -> str:
    return str(get_args(get_type_hints(cls)["kind"])[0])
