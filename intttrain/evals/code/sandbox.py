"""Runs programs that a model wrote, several at a time, each confined by ``confine.py``."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from intttrain.config.errors import UserError
from intttrain.evals.code import confine

Outcome = Literal["passed", "failed", "timed_out", "killed"]
_GRACE_S = 20.0  # for starting and stopping on a busy machine

# Tries what must be impossible, and looks at the reason why it is; names the layer that is missing.
_PROBE = """
import ctypes, errno, os, socket
def must_hold(layer, fact):
    if not fact:
        raise SystemExit(layer)
def must_fail(layer, reason, attempt, *arguments):
    try:
        attempt(*arguments)
    except MemoryError:
        return
    except OSError as error:
        must_hold(layer, error.errno == reason)
    else:
        raise SystemExit(layer)
must_hold("process namespace", os.getppid() == 1)
must_hold("unprivileged user", 0 not in os.getresuid() + os.getresgid())
must_hold("file system of its own", set(os.listdir("/")) <= {names})
must_hold("bar to new privileges", ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1)
must_fail("unprivileged user", errno.EPERM, os.chroot, "/")
must_fail("read-only file system", errno.EROFS, open, "/written", "w")
must_fail("network namespace", errno.ENETUNREACH, socket.create_connection, ("127.0.0.1", 1), 1)
must_fail("limit of processes", errno.EAGAIN, lambda: os.fork() or os._exit(0))
must_fail("limit of memory", errno.ENOMEM, bytearray, {memory})
must_fail("system call filter", errno.EPERM, os.memfd_create, "probe")
must_fail("filter of socket families", errno.EPERM, socket.socket, socket.AF_NETLINK, socket.SOCK_RAW)
"""


class Limits(NamedTuple):
    """What a program may use; processes, files and open files are bounded in ``confine.py``."""

    seconds: float
    memory_mib: int


class Verdict(NamedTuple):
    """How a program ended.

    Attributes:
      outcome: ``passed`` if it ran to its end without an exception.
      detail: the exception, the limit or the signal in a few words; empty for ``passed``.
    """

    outcome: Outcome
    detail: str = ""


def run_programs(programs: Sequence[str], limits: Limits) -> Iterator[tuple[int, Verdict]]:
    """Yields the number of a program and its verdict, in the order in which they end; one program per CPU at a time.

    Raises:
      UserError: this machine lacks a layer of the sandbox; nothing of ``programs`` has run.
    """
    check_sandbox(limits)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        numbers = {pool.submit(run_program, program, limits): i for i, program in enumerate(programs)}
        try:
            for future in concurrent.futures.as_completed(numbers):
                yield numbers[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def check_sandbox(limits: Limits) -> None:
    """Raises ``UserError`` that names the first layer of the sandbox that does not work on this machine."""
    system, machine = os.uname().sysname, os.uname().machine
    if system != "Linux" or machine not in confine.AUDIT_ARCH:
        _refuse(f"support for {system} on {machine}", f"Linux on {' or '.join(confine.AUDIT_ARCH)} only")
    names = {"sandbox", "program.py", *(path.split("/")[1] for path in _visible_paths())}
    verdict = run_program(_PROBE.format(names=names, memory=limits.memory_mib << 20), limits)
    if verdict.detail.startswith("SystemExit: "):
        _refuse(verdict.detail.removeprefix("SystemExit: "), "a harmless probe got past it")
    if verdict.outcome != "passed":
        _refuse("interpreter that starts", f"{verdict.outcome}: {verdict.detail}")


def run_program(program: str, limits: Limits) -> Verdict:
    """Runs Python source in a new sandbox.

    Raises:
      UserError: a layer of the sandbox is not to be had.
    """
    try:
        source = program.encode()
    except UnicodeEncodeError as error:  # a text that no file can hold
        return Verdict("failed", f"UnicodeEncodeError: {error}"[:200])
    if len(source) > confine.PROGRAM_BYTES:
        return Verdict("failed", f"a program of {len(source):,} bytes, more than {confine.PROGRAM_BYTES:,}")
    facts = _facts(source, limits)
    status, said = facts["status"], _parsed(facts["said"])
    if facts["timed_out"]:
        return Verdict("timed_out", f"{limits.seconds:g} s")
    if status == -signal.SIGKILL:
        return Verdict("killed", "CPU time")
    if status < 0:
        return Verdict("killed", _signal_name(-status))
    match said:
        case {"error": None}:
            return Verdict("passed")
        case {"error": "MemoryError"}:
            return Verdict("killed", f"memory limit of {limits.memory_mib} MiB")
        case {"error": str(text)}:
            return Verdict("failed", text[:200])
    return Verdict("failed", f"ended by itself with status {status}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal in the middle of their range
        return f"signal {number}"


def _facts(program: bytes, limits: Limits) -> dict[str, Any]:
    """Returns what ``confine.py`` reports about ``program``."""
    executable, *libraries = _visible_paths()
    options = limits._asdict() | {"executable": executable, "libraries": libraries}
    command = [executable, "-I", "-S", "-B", str(Path(confine.__file__)), json.dumps(options)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, env={}, cwd="/", start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        watch = threading.Timer(limits.seconds + _GRACE_S, process.kill)
        watch.start()
        try:
            answer = process.stdout.readline()
            if answer == confine.READY:
                _map_ids(process.pid)
                process.stdin.write(program)
                process.stdin.close()
                answer = process.stdout.readline()
        finally:
            watch.cancel()
            process.kill()
        if not answer.startswith(b"{"):
            raise RuntimeError(f"the sandbox broke: {(answer + process.stdout.read()).decode(errors='replace')}")
    facts = json.loads(answer)
    if "missing" in facts:
        _refuse(facts["missing"], facts["reason"])
    return facts


def _visible_paths() -> list[str]:
    """Returns the interpreter and the folders that hold its libraries and those of the system."""
    executable = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]  # the one behind a venv
    folders = [os.path.realpath(f"{sys.base_prefix}/lib"), "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    return [executable, *dict.fromkeys(folders), "/etc/ld.so.cache"]


def _map_ids(pid: int) -> None:
    """Gives the user namespace of a process its ids: the program's is an unprivileged one outside, too."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if os.geteuid() == 0:
            lines = f"0 {own} 1\n{confine.NOBODY} {confine.NOBODY} 1"
        else:
            lines = f"{confine.NOBODY} {own} 1"
        try:
            if kind == "gid":
                Path(f"/proc/{pid}/setgroups").write_text("deny")
            Path(f"/proc/{pid}/{kind}_map").write_text(lines)
        except OSError as error:
            _refuse(f"user {confine.NOBODY}", str(error.strerror))


def _parsed(said: str) -> Any:
    try:
        return json.loads(said)
    except (ValueError, RecursionError):  # programs can write there themselves
        return None


def _refuse(layer: str, reason: str) -> None:
    raise UserError(
        f"model output cannot be executed here: the sandbox has no {layer} ({reason}); docs/code_evaluation.md names "
        "what it needs"
    )
