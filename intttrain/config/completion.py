"""A stored configuration as today's schema reads it: what it does not say has its default, what it says must be known.

A run keeps its flat configuration for years, and the schema gains fields meanwhile. A field that a run did not know
worked as its default does, or the default would have been chosen differently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from intttrain.config.dotted import flatten, unflatten
from intttrain.config.problems import section_of
from intttrain.config.schema import Config


def complete(flat_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat configuration with the default of every field that it lacks; what has none stays out."""
    return flatten(_completed(Config, unflatten(flat_config)))


def unknown_keys(flat_config: Mapping[str, Any]) -> list[str]:
    """Returns the keys that the schema does not have."""
    return sorted(_unknown(Config, unflatten(flat_config), ""))


def _completed(section: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(values)
    for field in dataclasses.fields(section):
        if field.name in values:
            result[field.name] = _completed_value(section, field.name, values[field.name])
        elif field.default is not dataclasses.MISSING:
            result[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            result[field.name] = _plain(field.default_factory())
    return result


def _completed_value(section: Any, name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_completed_value(section, name, entry) for entry in value]
    inner = _section(section, name, value)
    return value if inner is None else _completed(inner, value)


def _unknown(section: Any, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    names = {field.name for field in dataclasses.fields(section)}
    for name, value in values.items():
        key = prefix + name
        if name not in names:
            yield from flatten({key: value})
            continue
        entries = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, entry in entries:
            if (inner := _section(section, name, entry)) is not None:
                yield from _unknown(inner, entry, f"{key}." if index is None else f"{key}[{index}].")


def _section(section: Any, name: str, value: Any) -> Any:
    """Returns the class of the section that ``value`` of this field is, ``None`` for anything else."""
    return section_of(section, name, value) if isinstance(value, Mapping) else None


def _plain(default: Any) -> Any:
    return (
        dataclasses.asdict(default) if dataclasses.is_dataclass(default) and not isinstance(default, type) else default
    )
