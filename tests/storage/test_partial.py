"""Unfinished output: whose it is, and what becomes of it when its writer is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from intttrain.storage import partial
from intttrain.storage.files import create_text, write_text
from intttrain.storage.partial import partial_folder, remove_leftovers
from tests.processes import REPO

WRITER = """
import sys
from pathlib import Path
from intttrain.storage.publish import publish_directory
with publish_directory(Path(sys.argv[1])) as fresh:
    (fresh / "rows").write_text("some")
    print(fresh, flush=True)
    sys.stdin.readline()
"""


def hidden(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


def test_what_a_living_process_writes_stays_and_what_a_killed_one_wrote_goes(tmp_path: Path) -> None:
    target, lines = tmp_path / "data", list[str]()
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, cwd=REPO, stdin=pipe, stdout=pipe, text=True) as writer:
        assert writer.stdout is not None
        fresh = Path(writer.stdout.readline().strip())
        with partial_folder(target) as own:
            remove_leftovers(target, lines.append)
            assert hidden(tmp_path) == sorted([fresh, own]) and (fresh / "rows").read_text() == "some"
        assert len(lines) == 2 and all("another process is writing" in line for line in lines)
        writer.send_signal(signal.SIGKILL)
    lines.clear()
    remove_leftovers(target, lines.append)
    assert lines == [f"note: {fresh}, left unfinished by a process that was killed, was removed"]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_judged_stays_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [".hf.partial-1", ".hf.partial-00000000-ab12cd34", f".hf.partial-{partial._boot()}-ab12cd34"]
    for name in (*names, ".hf2.partial-1"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(partial, "_lock", lambda _: None)  # a file system without locks
    lines: list[str] = []
    remove_leftovers(tmp_path / "hf", lines.append)
    assert len(lines) == 3 and all(sum(f"{tmp_path / name} " in line for line in lines) == 1 for name in names), lines
    assert len(hidden(tmp_path)) == 4


def test_one_who_removes_leftovers_is_faster_than_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open, calls = os.open, []

    def open_late(path: Path, *arguments: int, **more: int) -> int:
        if ".partial-" in str(path) and not calls:
            calls.append(path)
            remove_leftovers(tmp_path / "data", print)
        return real_open(path, *arguments, **more)

    monkeypatch.setattr(os, "open", open_late)
    with partial_folder(tmp_path / "data") as path:
        assert calls and path.is_dir() and path != calls[0] and not calls[0].exists()


def test_several_write_the_same_file_at_the_same_moment(tmp_path: Path) -> None:
    texts, made, failures = [str(number) * 1000 for number in range(4)], list[str](), list[BaseException]()

    def write(text: str) -> None:
        try:
            for _ in range(30):
                write_text(tmp_path / "result.json", text)
                assert (tmp_path / "result.json").read_text() in texts
            create_text(tmp_path / "one.json", text)
            made.append(text)
        except FileExistsError:
            pass
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(made) == 1 and (tmp_path / "one.json").read_text() == made[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "result.json"]


def test_a_file_is_created_once_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    create_text(tmp_path / "a", "1")
    with pytest.raises(FileExistsError):
        create_text(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1" and not hidden(tmp_path)
