"""Examples by name, the folder that `intttrain init` makes, and the program as it is installed from a wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from intttrain.app.examples import EXAMPLES, find_config, with_found_configs
from tests.app.small import REPO, cli, done

CONFIGS = {path.name for path in (REPO / "configs").glob("*.py")}
LAUNCHERS = {path.name for path in (REPO / "launch").iterdir() if path.is_file()}
BUILT_FROM = ("intttrain", "configs", "launch", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


# --- by name -------------------------------------------------------------------------------------------------------


def test_a_bare_name_is_an_example_and_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("tiny") == str(EXAMPLES / "configs" / "tiny.py")
    assert find_config("qwen3:4b_8k") == str(EXAMPLES / "configs" / "qwen3.py") + ":4b_8k"
    for path in ("tiny.py", "./tiny", "configs/tiny.py:dense", "", ":dense"):
        assert find_config(path) == path
    Path("tiny").mkdir()  # for example the folder of a run
    assert find_config("tiny") != "tiny"
    Path("tiny").rmdir()
    Path("tiny").write_text("a configuration without an ending")
    assert find_config("tiny:dense") == "tiny:dense"


def test_every_way_to_give_the_flag():
    path = str(EXAMPLES / "configs" / "paper.py")
    assert with_found_configs(["--config=paper", "--workdir=paper"]) == [f"--config={path}", "--workdir=paper"]
    assert with_found_configs(["-config=paper"]) == [f"-config={path}"]
    assert with_found_configs(["--config", "paper", "paper"]) == ["--config", path, "paper"]
    assert with_found_configs(["--config.name=paper", "--config"]) == ["--config.name=paper", "--config"]


def test_the_example_is_what_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "tiny-dense" in done("config", "--config=tiny:dense").out
    assert done("config", "--config=qwen3").out == done("config", f"--config={REPO}/configs/qwen3.py:4b_8k").out
    for name, wanted in (("tinny", "did you mean 'tiny'?"), ("mine", "choose from llama3, paper, qwen3, tiny")):
        outcome = cli("config", f"--config={name}:dense")
        assert (outcome.status, outcome.out) == (2, "")
        assert outcome.err == f"error: --config={name}:dense: {name} is neither a file nor an example; {wanted}\n"
    assert "'intttrain init' copies it" in cli("config", "--config=configs/tiny.py").err


# --- a folder to work in -------------------------------------------------------------------------------------------


def test_init_copies_and_never_replaces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = done("init", "--output=work", "--json=work.json")
    for folder, names in (("configs", CONFIGS), ("launch", LAUNCHERS)):
        assert files_in(tmp_path / "work" / folder) == names
        assert f"work/{folder}: {', '.join(sorted(names))}" in outcome.out
        assert json.loads(Path("work.json").read_text())[folder] == sorted(names)
    mine = tmp_path / "work" / "configs" / "tiny.py"
    mine.write_text("mine")
    shutil.rmtree(tmp_path / "work" / "launch")
    again = cli("init", "--output=work")
    assert (again.status, again.out) == (2, "")
    assert again.err.startswith("error: work/configs exists and is not replaced; ") and again.err.count("\n") == 1
    assert mine.read_text() == "mine" and files_in(tmp_path / "work") == {"configs"}
    assert cli("init", "--output=gs://bucket").status == 2
    assert "work/configs" not in done("init").out and files_in(tmp_path / "configs") == CONFIGS


# --- installed from a wheel ----------------------------------------------------------------------------------------


class Installed:
    """A program that was built as an archive of sources, from that as a wheel, and installed far from the checkout."""

    def __init__(self, root: Path) -> None:
        source = root / "source"
        source.mkdir()
        for name in BUILT_FROM:
            copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy2
            copy(REPO / name, source / name)
        build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
        self._python(sys.executable, "-c", build, str(root), cwd=source)
        (archive,) = root.glob("*.tar.gz")
        pip = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")
        self._python(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root), str(archive))
        (self.wheel,) = root.glob("*.whl")
        self.prefix, self.folder = root / "prefix", root / "folder"
        self.folder.mkdir()
        venv.create(self.prefix, symlinks=True, with_pip=False)
        python = str(self.prefix / "bin" / "python")
        self._python(*pip, "--python", python, "install", "--no-deps", "--no-index", str(self.wheel))
        (packages,) = self.prefix.glob("lib/python*/site-packages")
        borrowed = [path for path in sys.path if path.endswith("-packages")]
        (packages / "borrowed.pth").write_text("\n".join(borrowed))

    def _python(self, *command: str, cwd: Path | None = None) -> None:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [str(self.prefix / "bin" / arguments[0]), *arguments[1:]]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


def test_the_wheel_holds_the_package_and_the_examples(installed):
    with zipfile.ZipFile(installed.wheel) as opened:
        names = {name for name in opened.namelist() if ".dist-info/" not in name}
    package = {str(path.relative_to(REPO)) for path in (REPO / "intttrain").rglob("*.py")}
    examples = {f"intttrain/examples/configs/{name}" for name in CONFIGS}
    launchers = {f"intttrain/examples/launch/{name}" for name in LAUNCHERS}
    assert names == package | examples | launchers | {"intttrain/py.typed"}


def test_the_installed_program_brings_its_examples(installed):
    where = installed("python", "-c", "import intttrain.app.examples as e; print(e.EXAMPLES)").stdout.strip()
    assert Path(where).is_relative_to(installed.prefix)
    assert "tiny-dense" in installed("intttrain", "config", "--config=tiny:dense").stdout
    result = installed("intttrain", "init", "--output=work")
    assert result.returncode == 0, result.stderr
    assert files_in(installed.folder / "work" / "configs") == CONFIGS
    for name in LAUNCHERS:
        copy, original = installed.folder / "work" / "launch" / name, REPO / "launch" / name
        assert os.access(copy, os.X_OK) is os.access(original, os.X_OK), name


def test_a_configuration_imports_its_neighbour(installed):
    """From the folder where the command runs, as with ``python -m intttrain``, and before what is installed."""
    (installed.folder / "configs").mkdir()
    (installed.folder / "configs" / "tiny.py").write_text("NAME = 'the neighbour'\n")
    # Refused after the import and before JAX is loaded: the quickest answer that shows what was imported.
    (installed.folder / "mine.py").write_text("from configs import tiny\n\nraise ValueError(tiny.NAME)\n")
    for program in (("intttrain",), ("python", "-m", "intttrain")):
        result = installed(*program, "config", "--config=mine.py")
        assert (result.returncode, result.stderr) == (2, "error: --config: mine.py:3: the neighbour\n")
