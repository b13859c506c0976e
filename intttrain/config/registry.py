"""What is chosen by name: each choice is registered in the file that defines it, with its section of the configuration.

    @OPTIMIZERS.register("lion", LionConfig)
    def lion(config: LionConfig, ...): ...

A registry is a table from names to whatever its users call (``docs/plugins.md`` says what that is for each). Modules
named in ``config.plugins`` are imported before the configuration is validated, so they may add to all of them.

Imports go down only, and definitions stand above this folder. A registry therefore knows by name which modules of this
package hold its definitions and imports them when it is first asked, exactly as if they were plugins of everybody.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

import pydantic
from pydantic_core import SchemaValidator, core_schema

from intttrain.config.errors import UserError, did_you_mean, reason_of
from intttrain.config.literals import section

T = TypeVar("T")
D = TypeVar("D")  # what a decorator is put on, and gives back


@section
class NoSection:
    """The section of a choice that has no settings."""


@dataclasses.dataclass(frozen=True)
class Entry(Generic[T]):
    """One choice.

    Attributes:
      value: what its users call.
      section: the class of its section in the configuration.
      check: refuses a configuration with a ``UserError`` once all of its values are valid by themselves.
      home: the module that registered it.
    """

    value: T
    section: Any
    check: Callable[[Any], None] | None
    home: str


class Registry(Generic[T]):
    """Choices by name, in the order in which they were registered.

    Attributes:
      what: what one of them is called in messages.
      default: the choice of a section that has no ``kind``.
    """

    def __init__(self, what: str, *modules: str, default: str | None = None, needs: Sequence[str] = ()) -> None:
        """Makes an empty registry.

        Args:
          what: "gate rule".
          modules: of this package, that register what is shipped.
          default: see above.
          needs: fields that every section has to have, because code outside of the choice reads them.
        """
        self.what, self.default = what, default
        self._modules, self._needs = modules, needs
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False
        self._union: SchemaValidator | None = None
        self._check_every: Callable[[Any], None] | None = None

    def register(
        self, name: str, section: Any = None, *, check: Callable[[Any], None] | None = None
    ) -> Callable[[D], D]:
        """Returns a decorator that adds what it is put on under ``name`` and gives it back; see ``Entry``.

        Raises:
          UserError: another module has registered the name, or the section lacks a field that is read elsewhere.
        """

        home = _registering_module()

        def add(value: D) -> D:
            self._add(home, name, Entry(value, section or NoSection, check, home))  # type: ignore[arg-type]
            return value

        return add

    def add(self, name: str, value: T, section: Any = None, *, check: Callable[[Any], None] | None = None) -> None:
        """Adds a value under ``name``, as ``register`` does."""
        home = _registering_module()
        self._add(home, name, Entry(value, section or NoSection, check, home))

    def check_every(self, check: Callable[[Any], None]) -> Callable[[Any], None]:
        """Makes ``check`` refuse configurations whatever is chosen, as ``Entry.check`` does for one choice."""
        self._check_every = check
        return check

    def _add(self, home: str, name: str, entry: Entry[T]) -> None:
        if home not in self._modules:
            self.entries()  # what is shipped comes first, and a name of it is taken
        if name in self._entries and (other := self._entries[name].home) != home:  # a module may be loaded again
            raise UserError(f"the {self.what} {name!r} is registered by {other} and by {home}; give one another name")
        lacking = set(self._needs) - {field.name for field in dataclasses.fields(entry.section)}
        if lacking:
            raise UserError(f"the {self.what} {name!r}: its section lacks {', '.join(sorted(lacking))}")
        self._entries[name] = entry
        self._union = None

    def entries(self) -> Mapping[str, Entry[T]]:
        """Returns everything that is registered, this package's own first."""
        if not self._loaded:
            self._loaded = True  # first: the modules may ask while they are imported
            for module in self._modules:
                importlib.import_module(module)
        return self._entries

    def names(self, among: Callable[[T], bool] | None = None) -> tuple[str, ...]:
        """Returns the names, of those that ``among`` accepts."""
        return tuple(name for name, entry in self.entries().items() if among is None or among(entry.value))

    def __getitem__(self, name: str) -> T:
        """Returns what is registered under a name. Raises ``UserError`` with the nearest one."""
        return self.entries()[self.checked(name)].value

    def checked(self, name: str, among: Callable[[T], bool] | None = None) -> str:
        """Returns the name. Raises ``UserError`` if nothing that ``among`` accepts is registered under it."""
        if (problem := self.problem(name, among)) is None:
            return name
        raise UserError(f"there is no {self.what} {name!r}; {problem}")

    def problem(self, name: str, among: Callable[[T], bool] | None = None) -> str | None:
        """Returns what a name may be that is not registered, or not accepted by ``among``; ``None`` for one that is."""
        names = self.names(among)
        return None if name in names else expected(name, names)

    # --- sections ---

    def kind_of(self, section: Any) -> str | None:
        """Returns the name of the choice that a section, as a mapping or validated, belongs to."""
        if isinstance(section, Mapping):
            kind = section.get("kind", self.default)
            return kind if isinstance(kind, str) else None if kind is None else repr(kind)
        if dataclasses.is_dataclass(section) and not isinstance(section, type | NoSection):
            known = [name for name, entry in self.entries().items() if type(section) is entry.section]
            return known[0] if len(known) == 1 else str(vars(section)["kind"]) if known else type(section).__name__
        return self.default

    def choice(self, section: Any) -> T:
        """Returns what is registered for a validated section."""
        return self[self.kind_of(section) or ""]

    def check(self, section: Any, config: Any) -> None:
        """Applies the rules of a section's choice to the whole configuration. Raises ``UserError``."""
        chosen = self.entries()[self.kind_of(section) or ""]
        for check in (self._check_every, chosen.check):
            if check is not None:
                check(config)

    def sections(self) -> dict[str, Any]:
        """Returns the class of every choice's section."""
        return {name: entry.section for name, entry in self.entries().items()}

    def validated(self, value: Any) -> Any:
        """Returns a section as its frozen dataclass, which was validated when it was made.

        Raises:
          pydantic.ValidationError: a mapping that is no section of a registered choice.
        """
        if dataclasses.is_dataclass(value):  # so a default configuration loads no definitions
            return value
        sections = self.sections()
        if self._union is None:  # a union that is told apart by ``kind``, as it stands now
            choices: dict[Any, Any] = {
                name: core_schema.no_info_plain_validator_function(functools.partial(_validate_section, section))
                for name, section in sections.items()
            }
            self._union = SchemaValidator(core_schema.tagged_union_schema(choices, discriminator=self.kind_of))
        return self._union.validate_python(value)


def _registering_module() -> str:
    """Returns the module whose own code, not that of a function, is running: values may be of anybody's classes."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    return str(frame.f_globals["__name__"]) if frame is not None else "__main__"


def _validate_section(section: Any, value: Any) -> Any:
    """Validates one section; where it is told by its class alone, ``kind`` may be given and is not kept."""
    if isinstance(value, Mapping) and "kind" not in {field.name for field in dataclasses.fields(section)}:
        value = {key: inner for key, inner in value.items() if key != "kind"}
    return _validator(section)(value)


@functools.cache
def _validator(section: Any) -> Callable[[Any], Any]:
    return pydantic.TypeAdapter(section).validate_python


def expected(name: str, names: Sequence[str]) -> str:
    """Returns what a name may be, and which is meant if one is near."""
    near = did_you_mean(name, names)
    return f"it must be one of {', '.join(map(repr, names))}{near if 'did you mean' in near else ''}"


@dataclasses.dataclass(frozen=True)
class Named(Generic[T]):
    """Marks a field that holds a registered name: ``Annotated[str, Named(GATE_RULES)]``."""

    registry: Registry[T]
    among: Callable[[T], bool] | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Adds the check to that of the string."""
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, name: str) -> str:
        if problem := self.registry.problem(name, self.among):
            raise ValueError(problem)
        return name


@dataclasses.dataclass(frozen=True)
class SectionOf:
    """Marks a field that holds the section of a registered choice: ``Annotated[Any, SectionOf(SOURCES)]``."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Asks the registry at validation, since it may have grown since this class was made."""
        return core_schema.no_info_plain_validator_function(self.registry.validated)


def hints_of(section: Any) -> dict[str, Any]:
    """Returns the type of every field of a section; a ``Registry`` where the section of one of its choices stands."""
    hints = get_type_hints(section)
    for name, hint in get_type_hints(section, include_extras=True).items():
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        hints[name] = next((mark.registry for mark in marks if isinstance(mark, SectionOf)), hints[name])
    return hints


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types that a value may have: those of a union, or the one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def import_plugins(modules: Any) -> None:
    """Imports a user's modules, which register what they define.

    Args:
      modules: ``config.plugins``, right or wrong; what is no list of names is left to the validation.

    Raises:
      UserError: names the module that cannot be imported, and the reason.
    """
    if not isinstance(modules, tuple | list):
        return
    for module in modules:
        if not isinstance(module, str):
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # it is a program of the user's, anything can come out of it
            reason = f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{reason_of(error)}"
            raise UserError(
                f"plugins: the module {module!r} cannot be imported ({reason}); the folder in which the command runs "
                "and PYTHONPATH are searched"
            ) from error


# The one list of what is chosen by name, and of the modules that define what is shipped.
GATE_RULES: Registry[Any] = Registry("gate rule", "intttrain.ttt.gating")
GATE_SIGNALS: Registry[Any] = Registry("gate signal", "intttrain.ttt.signals")
TARGETS: Registry[Any] = Registry("target", "intttrain.ttt.targets")
UPDATE_RULES: Registry[Any] = Registry("update rule", "intttrain.ttt.rules", default="sum", needs=("kind",))
OPTIMIZERS: Registry[Any] = Registry("optimizer", "intttrain.train.optimizer", default="adamw", needs=("clip_norm",))
SCHEDULES: Registry[Any] = Registry(
    "schedule", "intttrain.train.optimizer",
    needs=("kind", "peak_learning_rate", "warmup_steps", "decay_steps", "final_fraction"),
)  # fmt: skip
SOURCES: Registry[Any] = Registry(
    "data source", "intttrain.data.text_files", "intttrain.data.tensorflow_sources", needs=("kind",)
)
# By name, since ``intttrain eval --help`` lists them without loading any.
SHIPPED_TASKS = {
    "positions": "intttrain.evals.positions.evaluate", "context": "intttrain.evals.positions.context",
    "calibrate": "intttrain.evals.gating.study", "gating": "intttrain.evals.gating.study",
    "ruler": "intttrain.evals.ruler.evaluate", "code": "intttrain.evals.code.evaluate",
}  # fmt: skip
EVAL_TASKS: Registry[Any] = Registry("evaluation task", *dict.fromkeys(SHIPPED_TASKS.values()), default="positions")
FAMILIES: Registry[Any] = Registry("family", "intttrain.config.families")
