"""The house rules that a program can check (see CONTRIBUTING.md). Import directions are in pyproject.toml."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "intttrain"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
# path -> why this file may be longer. A reason that no longer holds fails the test, too.
LONG_FILES = {"intttrain/interop/modeling_intttrain.py": "lies as one file beside exported weights, for users to read"}
# "path::function" -> why this one may be longer. A reason that no longer holds fails the test, too.
LONG_FUNCTIONS: dict[str, str] = {}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "shared", "tools"}
# What a training host must not load: gigabytes of memory, seconds of start-up, or a second runtime on the TPU.
HEAVY = ("torch", "transformers", "tensorflow", "tensorflow_datasets", "seqio", "tensorboard")


def sources(*roots: str) -> list[Path]:
    return sorted(path for root in roots for path in (REPO / root).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def report(problems: list[str], rule: str) -> None:
    assert not problems, f"{rule}\n  " + "\n  ".join(problems)


# --- size and names ------------------------------------------------------------------------------------------------


def test_files_are_short():
    long = {path: len(path.read_text().splitlines()) for path in sources("intttrain", "tests", "configs", "launch")}
    long = {name_of(path): lines for path, lines in long.items() if lines >= MAX_FILE_LINES}
    problems = [f"{name}: {lines} lines" for name, lines in long.items() if name not in LONG_FILES]
    problems += [f"{name} is listed in LONG_FILES but is short" for name in LONG_FILES if name not in long]
    report(problems, f"A file has fewer than {MAX_FILE_LINES} lines; cut it where the subject changes.")


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end without the docstring: nobody should save lines by explaining less."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def test_functions_are_short():
    found = {}
    for path in sources("intttrain", "tests", "configs", "launch"):
        for node in functions(parsed(path)):
            lines = code_lines(node)
            if lines >= MAX_FUNCTION_LINES:
                found[f"{name_of(path)}::{node.name}"] = lines
    problems = [f"{name}: {lines} lines" for name, lines in found.items() if name not in LONG_FUNCTIONS]
    report(problems, f"A function has fewer than {MAX_FUNCTION_LINES} lines; cut it, or give the reason in this file.")
    report([name for name in LONG_FUNCTIONS if name not in found], "These are short again; remove them from the list.")


def test_module_names_say_what_is_inside():
    problems = [name_of(path) for path in sources("intttrain", "tests") if path.stem in VAGUE_NAMES]
    problems += [name_of(path) for path in PACKAGE.rglob("*/") if path.name in VAGUE_NAMES]
    report(problems, f"No module is called {', '.join(sorted(VAGUE_NAMES))}: the name has to say what is inside.")


def test_every_module_has_a_docstring():
    problems = [
        name_of(path) for path in sources("intttrain", "configs", "launch") if not ast.get_docstring(parsed(path))
    ]
    report(problems, "A module begins with a docstring: what it is for, and the legend of its dimension letters.")


# --- configuration and environment ---------------------------------------------------------------------------------


def looks_like_config(node: ast.expr, ours: set[str], foreign: set[str]) -> bool:
    """True for ``config``, ``train_config``, ``cfg.model.ttt`` and for arguments annotated with a config class."""
    while isinstance(node, ast.Attribute):
        node = node.value
    if not isinstance(node, ast.Name) or node.id in foreign:
        return False
    return node.id in ours or node.id in {"config", "cfg"} or node.id.endswith(("_config", "_cfg"))


def annotated_arguments(tree: ast.Module, classes: set[str]) -> tuple[set[str], set[str]]:
    """Names of a module's arguments annotated with one of the classes, and of those annotated otherwise only.

    The second kind is somebody else's configuration, for example the JSON of a Hugging Face folder.
    """
    ours, others = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            (ours if names_in(node.annotation) & classes else others).add(node.arg)
    return ours, others - ours


def names_in(annotation: ast.expr) -> set[str]:
    inside = list(ast.walk(annotation))
    return {n.id for n in inside if isinstance(n, ast.Name)} | {n.attr for n in inside if isinstance(n, ast.Attribute)}


def default_uses(tree: ast.Module, classes: set[str]) -> Iterator[int]:
    """Lines on which a value is taken from a config with a default of the reader's own."""
    ours, foreign = annotated_arguments(tree, classes | {"ConfigDict"})
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if (
            isinstance(called, ast.Attribute)
            and called.attr == "get"
            and looks_like_config(called.value, ours, foreign)
        ):
            yield node.lineno
        is_probe = isinstance(called, ast.Name) and called.id in {"getattr", "hasattr"}
        if is_probe and node.args and looks_like_config(node.args[0], ours, foreign):
            yield node.lineno


def test_configuration_is_complete_where_it_is_read():
    trees = [parsed(path) for path in (PACKAGE / "config" / name for name in ("schema.py", "ttt.py"))]
    classes = {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    assert "TTTConfig" in classes
    problems = [
        f"{name_of(path)}:{line}"
        for path in sources("intttrain", "configs")
        for line in default_uses(parsed(path), classes)
    ]
    report(problems, "No .get(), getattr() or hasattr() on configuration: every default stands in intttrain/config.")


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ('config.get("a", 1)', True),
        ('config.model.ttt.get("a")', True),
        ('def f(model: ModelConfig): return getattr(model, "ttt", None)', True),
        ('def f(ttt: config.TTTConfig | None): return hasattr(ttt, "eta")', True),
        ('def f(config: ml_collections.ConfigDict): return config.get("a", 1)', True),
        ('def f(config: dict[str, int]): return config.get("a")', False),
        ('sections.get("a", 1)', False),
        ("config.model.ttt.eta", False),
    ],
)
def test_the_check_above_can_fail(code, caught):
    assert bool(list(default_uses(ast.parse(code), {"ModelConfig", "TTTConfig"}))) is caught


# What gives a library its settings before it is loaded.
SETS_VARIABLES = {"intttrain/layout/hardware.py", "intttrain/logs/workdir.py"}


def test_environment_and_process_index_are_read_in_pod_only():
    watched = {("os", "environ"), ("os", "getenv"), ("os", "putenv"), ("jax", "process_index")}
    problems = [
        f"{name_of(path)}:{node.lineno} {node.value.id}.{node.attr}"
        for path in sources("intttrain")
        if PACKAGE / "pod" not in path.parents and name_of(path) not in SETS_VARIABLES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in watched
    ]
    report(problems, "Environment variables and the process index belong to intttrain/pod: pass what was decided.")


# Where no public name tells what is asked, with what is asked. A release of JAX may break these.
PRIVATE_NAMES = {
    "intttrain/pod/coordination.py": "the key-value store and the barrier of the coordination service",
    "tests/pod/test_distributed.py": "whether a backend was started",
    "tests/test_architecture.py": "whether a backend was started",
    "tests/ttt/test_kernel.py": "whether the interpreter of the kernels met a race",
}


def private_names(tree: ast.Module) -> Iterator[str]:
    """Modules and attributes of JAX, imported or inside a program that stands in a string, that begin with _."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^(?:from|import) (jax(?:lib)?\._\S+)", node.value, flags=re.MULTILINE)
            continue
        if isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found = [ast.unparse(node)]
        else:
            continue
        yield from (name for name in found if re.match(r"jax(lib)?\.([\w.]*\.)?_[a-z]", name))


def test_private_names_of_jax_are_touched_in_one_module_of_pod():
    touching = {name_of(path) for path in sources("intttrain", "tests") if any(private_names(parsed(path)))}
    rule = "Use public names of JAX, or list the file in PRIVATE_NAMES with what it needs."
    report(sorted(touching ^ PRIVATE_NAMES.keys()), rule)
    ours = [name for name in PRIVATE_NAMES if name.startswith("intttrain/")]
    assert all(name.startswith("intttrain/pod/") for name in ours), "CONTRIBUTING.md: only in pod/"


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("from jax._src.distributed import global_state", True),
        ("import jax._src.core", True),
        ("jax._src.core.Tracer", True),
        ("from jax.experimental import _private", True),
        ('program = """\nfrom jax._src import xla_bridge\n"""', True),
        ("from jax.experimental import pallas", False),
        ("from flax._x import y", False),
    ],
)
def test_the_check_of_private_names_can_fail(code, caught):
    assert any(private_names(ast.parse(code))) is caught


# --- imports -------------------------------------------------------------------------------------------------------


def test_import_contracts_hold():
    pytest.importorskip("importlinter")
    command = (
        "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_imports_are_light_and_touch_no_device():
    """Importing everything but the exported modelling file loads no second framework and starts no backend.

    On a TPU pod the first use of a device has to come after the processes have found each other.
    """
    modules = [
        ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("intttrain")
        if path.stem != "modeling_intttrain"
    ]
    program = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print(sorted(name for name in {HEAVY!r} if name in sys.modules))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-3:-1] == ["[]", "False"]


# --- documents -----------------------------------------------------------------------------------------------------


def test_readme_tree_mentions_every_folder():
    readme = REPO / "README.md"
    if not readme.exists():
        pytest.skip("README.md is not written yet")
    text = readme.read_text()
    assert FOLDERS
    problems = [folder for folder in FOLDERS if f"{folder}/" not in text]
    report(problems, "The annotated tree of README.md names every folder of the package.")


def test_links_between_pages_lead_somewhere():
    markdown_link = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
    problems = [
        f"{name_of(page)} -> {target}"
        for page in [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md")]
        for target in markdown_link.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    report(problems, "A link between pages leads to a file of this repository.")
