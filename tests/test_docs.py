"""The pages keep up with the code: fields, links, names and command lines in them exist.

``path.py::name`` in backticks is the way a page names code; the path is relative to ``intttrain/`` or the repository.
"""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import functools
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from absl import flags

from intttrain.app.cli import COMMANDS
from intttrain.config import Config, default_config, resolve
from intttrain.config import evaluation as config_eval
from intttrain.config import schema as config_module
from intttrain.config import training as config_train
from intttrain.config import ttt as config_ttt
from intttrain.config.registry import Named
from intttrain.train.compatibility import FREE_TO_CHANGE

REPO = Path(__file__).resolve().parents[1]
DOCS = REPO / "docs"
PAGES = sorted(DOCS.rglob("*.md")) + [page for page in (REPO / "README.md", REPO / "CONTRIBUTING.md") if page.exists()]
MAX_PAGE_LINES = 200
GROWING = ("log.md", "config.md")  # a line for every experiment, and for every setting
SETTINGS = (config_module, config_ttt, config_eval, config_train)
SECTIONS = {name: value for module in SETTINGS for name, value in vars(module).items()}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))


# --- configuration -------------------------------------------------------------------------------------------------

REQUIRED = "required"
# Sections that the default configuration does not hold; each has a table of its own under its class name.
ALTERNATIVES = ("Llama3Scaling", "YarnScaling", "SeqioSource", "TfdsSource", "MixtureItem", "StageConfig", "GateConfig")


@dataclasses.dataclass(frozen=True)
class FieldRow:
    default: str
    choices: tuple[str, ...]


def shown(value: Any) -> str:
    """How a default is written in a table."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def choices_of(cls: type, name: str) -> tuple[str, ...]:
    hint = get_type_hints(cls, include_extras=True)[name]
    for mark in get_args(hint):
        if isinstance(mark, Named):
            return tuple(map(shown, mark.registry.names(mark.among)))
    return tuple(map(shown, get_args(hint))) if get_origin(hint) is Literal else ()


def rows_of_default(section: Any, prefix: str = "") -> Iterator[tuple[str, FieldRow]]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from rows_of_default(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, FieldRow(shown(value), choices_of(type(section), field.name))


def rows_of_class(cls: type) -> dict[str, FieldRow]:
    rows = {}
    for field in dataclasses.fields(cls):
        default = REQUIRED if field.default is dataclasses.MISSING else shown(field.default)
        rows[field.name] = FieldRow(default, choices_of(cls, field.name))
    return rows


def tables_of(text: str) -> dict[str, dict[str, list[str]]]:
    """Returns {nearest heading: {first cell: the other cells}} of the rows whose first cell is code."""
    tables: dict[str, dict[str, list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            first, *rest = (cell.strip() for cell in line.strip()[1:-1].split("|"))
            tables.setdefault(heading, {})[first.strip("`")] = rest
    return tables


def check_rows(documented: dict[str, list[str]], wanted: dict[str, FieldRow]) -> None:
    missing, gone = sorted(wanted.keys() - documented.keys()), sorted(documented.keys() - wanted.keys())
    assert not missing, f"docs/config.md does not name {missing}"
    assert not gone, f"docs/config.md names {gone}, which config/schema.py does not have"
    for name, row in wanted.items():
        default, *rest = documented[name]
        assert default.strip("`") == row.default, f"{name}: docs/config.md says {default}, the default is {row.default}"
        absent = [choice for choice in row.choices if choice not in " ".join(rest)]
        assert not absent, f"{name}: docs/config.md does not name the choices {absent}"


def documented_defaults() -> dict[str, list[str]]:
    """Returns the rows of the large table, without those of the alternatives."""
    tables = tables_of((DOCS / "config.md").read_text())
    wanted = [rows for heading, rows in tables.items() if not any(f"`{name}`" in heading for name in ALTERNATIVES)]
    return {name: cells for rows in wanted for name, cells in rows.items()}


def test_every_field_is_documented_with_its_default():
    default = resolve(default_config())
    assert default.model.ttt is not None
    check_rows(documented_defaults(), dict(rows_of_default(default)))


def test_the_resume_column_is_the_rule():
    documented = documented_defaults()
    for name, _ in rows_of_default(resolve(default_config())):
        free = any(fnmatch.fnmatchcase(name, pattern) for pattern in FREE_TO_CHANGE)
        assert (documented[name][-1] == "free") is free, f"{name}: free to change on resume is {free}"


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_sections_outside_the_default_are_documented(name):
    headings = [rows for heading, rows in tables_of((DOCS / "config.md").read_text()).items() if f"`{name}`" in heading]
    assert len(headings) == 1, f"docs/config.md needs one heading with `{name}`"
    check_rows(headings[0], rows_of_class(SECTIONS[name]))


def test_no_section_is_forgotten():
    files = {module.__name__ for module in SETTINGS}
    classes = {
        name for name, value in SECTIONS.items() if dataclasses.is_dataclass(value) and value.__module__ in files
    }
    in_default = {type(section).__name__ for section in sections(resolve(default_config()))} - {"NoSection"}
    assert classes == in_default | set(ALTERNATIVES)


@pytest.mark.parametrize("page", ["docs/config.md", "docs/tour.md", "CONTRIBUTING.md"])
def test_pages_name_every_file_that_holds_settings(page):
    assert {cls.__module__ for cls in sections_of(Config)} <= {module.__name__ for module in SETTINGS}
    text = (REPO / page).read_text()
    files = [module.__name__.removeprefix("intttrain.").replace(".", "/") + ".py" for module in SETTINGS]
    assert not [file for file in files if f"`{file}`" not in text]


def sections_of(hint: Any) -> set[type]:
    """Returns the configuration classes that an annotation mentions, with those of their fields."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return {hint}.union(*map(sections_of, get_type_hints(hint).values()))
    return set().union(*map(sections_of, get_args(hint)))


def sections(section: Any) -> Iterator[Any]:
    yield section
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from sections(value)


# --- links and names -----------------------------------------------------------------------------------------------


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@every_page
def test_relative_links_resolve(page):
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", without_fences(page.read_text())):
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name} -> {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} -> {target}#{anchor}; it has {sorted(anchors(file))}"


@functools.cache
def defined_names(path: Path) -> frozenset[str]:
    """Functions, classes, methods, attributes with annotations and constants of a module; ``Class.member`` dotted."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            targets = (
                [node.target]
                if isinstance(node, ast.AnnAssign)
                else node.targets
                if isinstance(node, ast.Assign)
                else []
            )
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return frozenset(names)


@every_page
def test_code_named_in_a_page_exists(page):
    for path, name in re.findall(r"`([\w/.]+\.py)(?:::([\w.]+))?", page.read_text()):
        found = [root / path for root in (REPO / "intttrain", REPO) if (root / path).exists()]
        in_export = path == "modeling_intttrain.py"  # named as the file of an exported folder, too
        assert found or in_export or path == "configs/mine.py", f"{page.name} names {path}, which does not exist"
        if name:
            assert name in defined_names(found[0]), f"{page.name} names {path}::{name}, which does not exist"


def files_named(text: str) -> Iterator[tuple[str, str]]:
    """(path, name or "") of ``ttt/api.py::project``, ``docs/method.md`` and ``docs/decisions/0008`` in code."""
    yield from re.findall(r"``?((?:\w+/)+[\w-]+\.(?:py|md|sh))(?:::([\w.]+))?``?", text)
    yield from ((f"{path}*", "") for path in re.findall(r"docs/decisions/\d{4}", text))
    yield from ((path, "") for path in re.findall(r"\bdocs/[a-z_]+\.md\b", text))


def missing_files(text: str) -> list[str]:
    missing = []
    for path, name in files_named(text):
        found = [file for root in (REPO / "intttrain", REPO) for file in root.glob(path)]
        if not found or (name and name not in defined_names(found[0])):
            missing.append(f"{path}::{name}" if name else path)
    return missing


def test_files_named_in_the_source_exist():
    sources = [path for folder in ("intttrain", "configs", "launch") for path in (REPO / folder).rglob("*.py")]
    wrong = {str(path.relative_to(REPO)): missing for path in sources if (missing := missing_files(path.read_text()))}
    assert not wrong
    planted = "see ``core/config.py``, `ttt/api.py::projekt`, docs/no_page.md, docs/decisions/9999; not `ttt/api.py`"
    assert len(missing_files(planted)) == 4


def test_the_index_names_every_page():
    index = (DOCS / "README.md").read_text()
    absent = [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index]
    assert not absent, f"docs/README.md has no link to {absent}"


def test_pages_are_short():
    lines = {page.name: len(page.read_text().splitlines()) for page in DOCS.glob("*.md") if page.name not in GROWING}
    assert not {name: count for name, count in lines.items() if count > MAX_PAGE_LINES}


# --- layers, libraries, letters ------------------------------------------------------------------------------------

README, CONTRIBUTING = ((REPO / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
CONTRACTS = {contract["id"]: contract for contract in PROJECT["tool"]["importlinter"]["contracts"]}


def section(text: str, heading: str) -> str:
    found = re.search(rf"^## {heading}$.*?(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found.group()


def in_layers(lines: Iterable[str]) -> list[frozenset[str]]:
    return [frozenset(line.replace(" ", "").split("|")) for line in lines]


def test_the_layers_of_the_pages_are_those_of_the_contract():
    wanted = in_layers(layer for layer in CONTRACTS["layers"]["layers"] if not layer.startswith("("))
    sentence = re.search(r"Imports only go down this list of layers: (.*?)\. \[", README, flags=re.DOTALL)
    assert sentence is not None
    assert in_layers(re.findall(r"`([^`]+)`", sentence.group(1))) == wanted, "README.md"
    lines = re.findall(r"^    (\S.*?)(?:  .*)?$", section(CONTRIBUTING, "Layers"), flags=re.MULTILINE)
    assert in_layers(lines) == wanted, "CONTRIBUTING.md"
    tree = re.search(r"^intttrain/\n(.*?)^\w", section(README, "What is where"), flags=re.MULTILINE | re.DOTALL)
    assert tree is not None
    folders = re.findall(r"^  (\w+)/", tree.group(1), flags=re.MULTILINE)
    assert sorted(folders) == sorted(frozenset().union(*wanted)), "the tree of README.md"


def test_the_home_of_every_library_is_that_of_the_contracts():
    rows = re.findall(r"^\| ([^|]*) \| (`[^|]*`) \|$", section(CONTRIBUTING, "Layers"), flags=re.MULTILINE)
    homes = {word: home for libraries, home in rows for word in re.findall(r"\w+", libraries)}
    for contract in CONTRACTS.values():
        for line in contract.get("ignore_imports", ()):
            home, library = line.split(" -> ")
            path = home.removeprefix("intttrain.").replace(".**", "/").replace(".", "/")
            assert path.removesuffix("/") in homes[library], f"{library}: CONTRIBUTING.md says {homes[library]}"


def test_the_readme_names_every_extra():
    named = re.search(r"with extras (.*?)\. An", README, flags=re.DOTALL)
    assert named is not None
    extras = PROJECT["project"]["optional-dependencies"]
    assert set(re.findall(r"`(\w+)`", named.group(1))) == extras.keys()


# What every explanation of a letter in these folders says.
ROOMS = ("ttt", "model", "train", "interop")
MEANINGS = {
    "B": "row", "C": "per chunk", "D": "width", "F": "feed-forward", "H": "head", "K": "key/value", "L": "layer",
    "M": "chunks", "N": "heads", "T": "token", "V": "vocabulary", "W": "taps",
}  # fmt: skip
OTHER_MEANINGS = {("model/decode.py", "M"): "pieces"}


def letters_of(path: Path) -> dict[str, str]:
    """The legend of a module: ``Letters: B row, T tokens, M = T / C chunks; ...`` up to the end of its paragraph."""
    legend = re.search(r"Letters: (.*?)(?:\n\n|\Z)", ast.get_docstring(ast.parse(path.read_text())) or "", re.DOTALL)
    if legend is None:
        return {}
    entries = re.split(r"[,;.]\s+", re.sub(r"\s+", " ", legend.group(1)))
    return dict(entry.rstrip(".").split(" ", 1) for entry in entries if re.match(r"[A-Z] ", entry))


def test_a_letter_means_the_same_in_the_whole_core():
    table = dict(re.findall(r"\| ([A-Z]) \| ([^|]+?) (?=\|)", section(CONTRIBUTING, "Names")))
    assert table.keys() == MEANINGS.keys()
    assert all(MEANINGS[letter] in meaning for letter, meaning in table.items())
    seen = set()
    for path in (path for room in ROOMS for path in sorted((REPO / "intttrain" / room).rglob("*.py"))):
        name = str(path.relative_to(REPO / "intttrain"))
        for letter, meaning in letters_of(path).items():
            wanted = OTHER_MEANINGS.get((name, letter), MEANINGS.get(letter, meaning))
            seen.add(letter)
            assert wanted in meaning, f"{name}: {letter} is {meaning}, CONTRIBUTING.md says {table[letter]}"
    assert table.keys() <= seen


# In the other folders no letter has to mean what it means in ROOMS, but every file says what it means.
OTHER_ROOMS = ("evals", "data", "planner", "layout", "app", "pod", "config", "logs", "storage")


def explained_letters(path: Path) -> set[str]:
    """The letters of a legend, and of those that it names: ``Letters: as in ``metrics``.``"""
    legend = re.search(r"Letters: (.*?)(?:\n\n|\Z)", ast.get_docstring(ast.parse(path.read_text())) or "", re.DOTALL)
    text = re.sub(r"\s+", " ", legend.group(1)) if legend is not None else ""
    named = [explained_letters(path.with_name(f"{name}.py")) for name in re.findall(r"as in ``(\w+)``", text)]
    explained = set(re.findall(r"(?:^|[,;.:] )([A-Za-z]) ", text)).union(*named)
    return explained | {letter.lower() for letter in explained}  # the part of a dim that one device holds


def letters_in_names(source: str) -> set[str]:
    """The letters at the end of the names that a module gives: ``x_BTD`` has B, T and D."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node.arg for node in nodes if isinstance(node, ast.arg)]
    names += [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    dims = [match[1] for name in names if (match := re.fullmatch(r"[a-z0-9_]+_((?=\w*[A-Z])[A-Za-z0-9]{1,6})", name))]
    return {letter for dim in dims for letter in dim if letter.isalpha()}


def test_files_explain_the_letters_of_their_names():
    paths = [path for room in (*ROOMS, *OTHER_ROOMS) for path in sorted((REPO / "intttrain" / room).rglob("*.py"))]
    missing = {str(path): letters_in_names(path.read_text()) - explained_letters(path) for path in paths}
    assert not {path: sorted(letters) for path, letters in missing.items() if letters}
    assert letters_in_names("def f(x_BT): y_nB1 = x_BT; NAMES_OF_ALL = a_Q") == set("BTn")


# --- command lines -------------------------------------------------------------------------------------------------


STATUS = "What is there, and what is not yet"


def test_the_status_of_commands_is_true():
    """A command that the table of the README calls missing is missing."""
    table = re.search(rf"^## {STATUS}$.*?(?=^## )", (REPO / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert table is not None
    missing = [line for line in table.group().splitlines() if re.search("not there|not yet", line)]
    named = {name for line in missing for name in re.findall(r"`intttrain (\w+)", line)}
    assert named and not named & COMMANDS.keys()


def command_lines(text: str) -> list[str]:
    """Every ``intttrain ...`` of a page: lines of code blocks and code inside sentences."""
    text = re.sub(rf"^## {STATUS}$.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    joined = re.sub(r"\\\n\s*", "", text)
    in_blocks = re.findall(r"^\s*(?:\$ )?(intttrain [^\n`]+)$", joined, flags=re.MULTILINE)
    in_sentences = re.findall(r"`(intttrain [^`\n]+)`", joined)
    return [re.sub(r"\s{2,}.*", "", line) for line in in_blocks + in_sentences]


def config_paths() -> set[str]:
    """Dotted names that ``--config.`` takes, sections included."""
    names = {name for name, _ in rows_of_default(resolve(default_config()))} | {"eval.own"}  # which is empty
    names |= {f"data.train[].{field.name}" for field in dataclasses.fields(config_module.MixtureItem)}
    return names | {f"prepare.source.{f.name}" for c in ("SeqioSource", "TfdsSource") for f in _fields(c)}


def _fields(name: str) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(SECTIONS[name])


def check_command_line(line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    assert command in COMMANDS, f"{line!r}: there is no command {command!r}"
    values = flags.FlagValues()
    COMMANDS[command][1](values)
    known = {*values, "json", "help"}
    for argument in arguments:
        if argument in ("...", "&"):
            continue
        assert argument.startswith("--"), f"{line!r}: {argument!r} is not a flag"
        flag = argument.removeprefix("--").split("=")[0]
        dotted = re.sub(r"\[\d+\]", "[]", flag.removeprefix("config."))
        if flag.startswith("config."):
            is_there = any(f"{path}.".startswith(f"{dotted}.") for path in config_paths())  # a whole section too
            assert "config" in known and is_there, f"{line!r}: there is no {flag}"
        else:
            assert flag in known, f"{line!r}: {command} has no flag --{flag}"


COMMAND_LINES = [
    (path, line)
    for path in [*PAGES, *sorted((REPO / "configs").glob("*.py"))]
    for line in command_lines(path.read_text())
]


@pytest.mark.parametrize(("path", "line"), COMMAND_LINES, ids=lambda x: x.name if isinstance(x, Path) else x[:60])
def test_command_lines_use_what_exists(path, line):
    check_command_line(line)


def test_command_lines_are_found_and_the_check_can_fail():
    text = "do `intttrain eval --x=1`:\n\n    intttrain train --config=a.py \\\n      --workdir=b\n\n"
    text += f"the program intttrain\n## {STATUS}\n`intttrain dream`\n## Next\n"
    assert "intttrain eval --x=1" in command_lines(text)
    assert "intttrain train --config=a.py --workdir=b" in command_lines(text)
    assert len(command_lines(text)) == 2
    check_command_line("intttrain train --config=a.py --workdir=b --config.model.ttt.eta=1 --json=c")
    for wrong in ("intttrain import --hf=x", "intttrain train --worker=b", "intttrain export --config.name=x",
                  "intttrain train --config.model.etta=1", "intttrain train now"):  # fmt: skip
        with pytest.raises(AssertionError):
            check_command_line(wrong)


def test_the_configuration_check_can_fail():
    wanted = {"a.b": FieldRow("3", ()), "a.c": FieldRow('"x"', ('"x"', '"y"'))}
    good = {"a.b": ["`3`", "> 0"], "a.c": ['`"x"`', '`"x"`, `"y"`']}
    check_rows(good, wanted)
    for broken in (
        {"a.b": good["a.b"]},
        good | {"a.d": ["`1`"]},
        good | {"a.b": ["`4`"]},
        good | {"a.c": ['`"x"`', "any"]},
    ):
        with pytest.raises(AssertionError):
            check_rows(broken, wanted)
    assert isinstance(resolve(default_config()), Config)
