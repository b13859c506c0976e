"""Puts the example configurations and launchers into the wheel; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExamples(build_py):
    """Copies them to ``intttrain/examples``, where ``intttrain/app/examples.py`` looks for them."""

    def run(self) -> None:
        super().run()
        for folder in () if self.editable_mode else ("configs", "launch"):
            target = Path(self.build_lib, "intttrain", "examples", folder)
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithExamples})
