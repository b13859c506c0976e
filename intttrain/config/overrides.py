"""Single values of a configuration given as text, ``--config.a.b=value``.

The type of the field says how its text is read, whatever the field holds at that moment. So ``None`` is always None,
a section that is None can be given whole, and a text that does not fit its field is refused here by name.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import ml_collections

from intttrain.config.errors import UserError, did_you_mean
from intttrain.config.registry import Registry, hints_of, import_plugins, kinds_of
from intttrain.config.schema import Config

SWITCHES = {"true": True, "1": True, "false": False, "0": False}


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[tuple[str, str | None]]) -> dict[str, Any]:
    """Returns the configuration with values replaced; what is not named stays as it is, right or wrong.

    Args:
      tree: nested mappings, from a configuration file.
      overrides: (key, text) in the order of the command line; the text is None where there was no ``=``.

    Raises:
      UserError: a key that does not exist or would undo an earlier one, or a text that its field cannot be read from.
    """
    changed: dict[str, Any] = dict(tree)
    given: dict[str, str | None] = {}
    first = [pair for pair in overrides if re.match(r"plugins\b", pair[0])]  # the other keys may be theirs
    for group in (first, [pair for pair in overrides if pair not in first]):
        for key, text in group:
            _check_order(given, key, text)
            given[key] = text
            changed = _Override(key, text).applied(changed, (Config,), _path(key), "")
        import_plugins(changed.get("plugins", ()))
    return changed


def _check_order(given: Mapping[str, str | None], key: str, text: str | None) -> None:
    if key in given:
        raise UserError(f"--config.{key} is given twice, as {given[key]} and {text}; leave one of them out")
    for earlier in given:
        if earlier.startswith((f"{key}.", f"{key}[")):
            raise UserError(f"--config.{key} comes after --config.{earlier} and would undo it; give it first")


def _path(key: str) -> list[str | int]:
    """Returns ``["data", "train", 1, "path"]`` for ``data.train[1].path``."""
    path: list[str | int] = []
    for part in key.split("."):
        if not (match := re.fullmatch(r"(\w+)((?:\[[^\[\]]*\])*)", part)):
            raise UserError(
                f"--config.{key}: {part!r} is not the name of a value; write for example data.train[0].path"
            )
        path.append(match[1])
        for index in re.findall(r"\[([^\[\]]*)\]", match[2]):
            if not re.fullmatch(r"[0-9]+", index):
                raise UserError(f"--config.{key}: [{index}] is no index; entries are counted [0], [1], ...")
            path.append(int(index))
    return path


@dataclasses.dataclass(frozen=True)
class _Override:
    """One value of the command line."""

    key: str
    text: str | None

    def applied(self, value: Any, kinds: tuple[Any, ...], path: Sequence[str | int], at: str) -> Any:
        """Returns ``value``, which stands at the key ``at`` and may be of ``kinds``, replaced at ``path``."""
        if not path:
            return self._read(kinds)
        part, rest = path[0], path[1:]
        if value is None:
            raise self._refusal(f"cannot be set: {at} is None; give all of it, --config.{at}={_example(kinds)}")
        if isinstance(part, int):
            return self._in_entry(value, kinds, part, rest, at)
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        section = _section(kinds, value)
        if section is None or not isinstance(value, Mapping):
            raise self._refusal(f"cannot be set: {at} is no section; set --config.{at} itself")
        hints = hints_of(section)
        if any(isinstance(kind, Registry) for kind in kinds):
            hints["kind"] = str  # one that is told by its class alone has no such field
        if part not in hints:
            name = f"{at}.{part}" if at else part
            raise UserError(f"--config: unknown configuration key {name}{did_you_mean(part, hints)}")
        inside = f"{at}.{part}" if at else part
        return {**value, part: self.applied(value.get(part), kinds_of(hints[part]), rest, inside)}

    def _in_entry(self, value: Any, kinds: tuple[Any, ...], index: int, rest: Sequence[str | int], at: str) -> Any:
        entries = [kind for kind in kinds if get_origin(kind) is tuple]
        if not entries or not isinstance(value, tuple | list):
            raise self._refusal(f"cannot be set: {at} has no entries; set --config.{at} itself")
        if index >= len(value):
            last = f"the last is {at}[{len(value) - 1}]" if len(value) else "it is empty"
            raise self._refusal(f"cannot be set: {at} has no entry {index}, {last}; to add one, give all of {at}")
        entry = self.applied(value[index], kinds_of(get_args(entries[0])[0]), rest, f"{at}[{index}]")
        return (*value[:index], entry, *value[index + 1 :])

    def _read(self, kinds: tuple[Any, ...]) -> Any:
        """Returns the value that the text stands for."""
        text = self.text
        (kind,) = [kind for kind in kinds if kind is not NoneType and not _sections((kind,))] or [Mapping]
        if text is None:
            if kind is bool:
                return True
            raise UserError(f"--config.{self.key} has no value; write --config.{self.key}=VALUE")
        if text == "None":
            if NoneType in kinds:
                return None
            raise self._refusal("it cannot be None" + ("; use () for no entries" if get_origin(kind) is tuple else ""))
        if kind is str or get_origin(kind) is Literal:
            return text
        if kind is bool:
            if (switch := SWITCHES.get(text.lower())) is None:
                raise self._refusal("use true or false")
            return switch
        if kind in (int, float):
            return self._number(kind)
        return self._literal(kinds, kind)

    def _number(self, kind: Any) -> Any:
        text = self.text or ""
        try:
            return int(text, 0) if kind is int else float(text)
        except ValueError:
            raise self._refusal("this is no whole number" if kind is int else "this is no number") from None

    def _literal(self, kinds: tuple[Any, ...], kind: Any) -> Any:
        """Returns a tuple or a section, written as in Python; a single entry without quotes may stand alone."""
        wanted = _example(kinds)
        if get_origin(kind) is tuple and re.fullmatch(r"[^\s,()\[\]{}'\"]+", self.text or ""):
            return (self._read(kinds_of(get_args(kind)[0])),)
        try:
            value = ast.literal_eval((self.text or "").strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise self._refusal(f"cannot be read; write {wanted}, with quotes around text") from None
        if get_origin(kind) is tuple:
            if isinstance(value, tuple | list):
                return tuple(value)
            one = "" if isinstance(value, set | NoneType) else f"; one entry is written ({value!r},)"
            raise self._refusal(f"is not a tuple{one}")
        if not isinstance(value, dict):
            raise self._refusal(f"is not a section; write {wanted}")
        return value

    def _refusal(self, reason: str) -> UserError:
        given = f"--config.{self.key}" if self.text is None else f"--config.{self.key}={self.text}"
        return UserError(f"{given}: {reason}")


def _section(kinds: tuple[Any, ...], value: Any) -> Any:
    """Returns the class of the section that stands there, by its ``kind`` where there are several."""
    sections = _sections(kinds)
    if len(sections) > 1 and isinstance(value, Mapping):
        registries = [kind for kind in kinds if isinstance(kind, Registry)]
        name = registries[0].kind_of(value) if registries else value.get("kind", None)
        return sections[name] if name in sections else next(iter(sections.values()))
    return next(iter(sections.values()), None)


def _sections(kinds: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the sections among some types by their kind."""
    registered = {
        name: section for kind in kinds if isinstance(kind, Registry) for name, section in kind.sections().items()
    }
    classes = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    return registered | {_tag(kind) if len(classes) > 1 else "": kind for kind in classes}


def _tag(section: Any) -> str:
    return str(get_args(get_type_hints(section)["kind"])[0])


def _example(kinds: tuple[Any, ...]) -> str:
    """Returns how a tuple or section is written: with the values that have to be given."""
    sections = _sections(kinds)
    written = []
    for name, section in sections.items():
        needed = [f.name for f in dataclasses.fields(section) if f.default is f.default_factory is dataclasses.MISSING]
        tags = {field: f"'{name}'" for field in needed if field == "kind" and len(sections) > 1}
        written.append("{" + ", ".join(f"'{field}': {tags.get(field, '...')}" for field in needed) + "}")
    for kind in kinds:
        if get_origin(kind) is tuple:
            entry = kinds_of(get_args(kind)[0])
            written.append(f"({_example(entry)},)" if dataclasses.is_dataclass(entry[0]) else _plain_tuple(entry[0]))
        elif kind is NoneType:
            written.append("None")
        elif get_origin(kind) is dict:
            written.append("{'key': value}")
    return " or ".join(written)


def _plain_tuple(entry: Any) -> str:
    return {int: "(1, 2)", float: "(0.5, 1.0)"}.get(entry, "('a', 'b')")
