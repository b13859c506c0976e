"""Where compiled programs are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from etils import epath

from intttrain.layout.compiler import keep_programs
from intttrain.storage.files import Place


@pytest.fixture
def no_folder() -> Iterator[None]:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_folder")
@pytest.mark.parametrize(
    ("backend", "workdir", "folder"),
    [
        ("tpu", Path("/runs/a"), "/runs/a/programs"),
        ("tpu", epath.Path("gs://bucket/a"), "gs://bucket/a/programs"),
        ("gpu", Path("/runs/a"), "/runs/a/programs"),
        ("cpu", Path("/runs/a"), None),
    ],
)
def test_programs_are_kept_with_the_run(
    backend: str, workdir: Place, folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    keep_programs(str(workdir))
    assert jax.config.jax_compilation_cache_dir == folder


@pytest.mark.usefixtures("no_folder")
def test_a_folder_of_the_user_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.config.update("jax_compilation_cache_dir", "/mine")
    keep_programs("/runs/a")
    assert jax.config.jax_compilation_cache_dir == "/mine"


@pytest.mark.usefixtures("no_folder")
def test_the_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX does with the option, so that an upgrade that renames it is noticed."""
    from jax.experimental.compilation_cache import compilation_cache

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    threshold = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        keep_programs(str(tmp_path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x * 31.7 + 1.9)(1.0)
        assert list((tmp_path / "programs").iterdir())
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", threshold)
        compilation_cache.reset_cache()
