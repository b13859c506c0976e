"""How the tests run: on the CPU, offline, with shapes checked and nothing promoted silently.

Everything above the first import of JAX has to stay there: JAX reads its environment once.

One CPU device is the default. Splitting the CPU into eight made the same program 10-20 % slower when it was
measured, and a test that is about devices wants to choose their number anyway, in a process of its own.
"""

from __future__ import annotations

import difflib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests" / "golden"

os.environ.update(
    JAX_PLATFORMS="cpu",
    CUDA_VISIBLE_DEVICES="",  # TensorFlow and torch too
    TF_CPP_MIN_LOG_LEVEL="3",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    EPATH_USE_TF="false",  # Orbax would load TensorFlow for gs://
    OMP_NUM_THREADS="1",  # torch: with shapes this small, threads of several workers only wait for each other
)

# A torch with CUDA brings triton, and a process that has loaded TensorFlow dies when it loads triton, too: with
# tensorflow 2.21 and triton 3.7.1, `import tensorflow, triton` is a segmentation fault. Nothing here needs it.
sys.modules["triton"] = None  # type: ignore[assignment]

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# A value that changes its type or grows a dimension by itself is a bug here; on a TPU it is also a slow one.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiled programs survive between runs. The folder carries the host's name because a program compiled for one
# processor must not run on another. Two workers may meet at one file; JAX then compiles again (see `filterwarnings`).
jax.config.update("jax_compilation_cache_dir", str(REPO / ".cache" / f"jax-{jax.__version__}-{platform.node()}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Linux gives a process 65,530 memory mappings (vm.max_map_count); compiled programs take about 16 each, and a process
# that has none left dies. Beyond this many, the next test file begins without compiled programs.
MOST_MAPPINGS = 20_000

# Signatures such as Float[Array, "B T D"] are checked at every call while tests run, and only then.
jaxtyping.install_import_hook("intttrain", "beartype.beartype")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files of tests/golden instead of comparing with them"
    )


class Golden:
    """Compares results with files under ``tests/golden``, or rewrites them with ``--update-golden``."""

    def __init__(self, folder: Path, *, update: bool) -> None:
        self.folder = folder
        self.update = update

    def check(self, name: str, value: Any) -> None:
        """Compares ``value`` with ``tests/golden/NAME``, exactly.

        A name that ends in ``.json`` takes anything JSON can hold, any other name takes text. Floats should be
        rounded by the caller to the digits that are meant to be stable.
        """
        text = json.dumps(value, indent=1) + "\n" if name.endswith(".json") else str(value)
        path = self.folder / name
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        refresh = "If the change is intended, run `make golden`, read the diff, and say in the commit why it is right."
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist yet. {refresh}", pytrace=False)
        wanted = path.read_text()
        if text != wanted:
            lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), "golden", "now", lineterm="", n=1)
            shown = "\n".join(list(lines)[:60])
            pytest.fail(f"tests/golden/{name} differs:\n{shown}\n{refresh}", pytrace=False)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Keeps a test process below the limit of memory mappings."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """``golden.check("name.json", value)`` pins a result; see ``Golden``."""
    return Golden(GOLDEN, update=request.config.getoption("--update-golden"))
