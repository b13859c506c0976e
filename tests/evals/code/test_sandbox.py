"""What a program in the sandbox cannot do.

Every program here is harmless where the sandbox fails: it then takes little, for a short time, of what is the test's
own, and says so by ending without an exception.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from intttrain.config.errors import UserError
from intttrain.evals.code import Limits, Verdict, confine, run_programs, sandbox

LIMITS = Limits(seconds=10.0, memory_mib=256)  # of time, much more than anything but an endless loop takes


def run(program: str, limits: Limits = LIMITS) -> Verdict:
    return sandbox.run_program(program, limits)


def test_an_endless_loop_is_stopped():
    started = time.monotonic()
    verdict = run("import time\nend = time.time() + 30\nwhile time.time() < end: pass", Limits(0.5, 256))
    assert verdict == Verdict("timed_out", "0.5 s")
    assert time.monotonic() - started < 10


def test_sleeping_is_stopped_with_everything_that_the_program_caught():
    program = """
import signal, time
for caught in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(caught, signal.SIG_IGN)
time.sleep(30)
"""
    assert run(program, Limits(0.5, 256)).outcome == "timed_out"


def test_cpu_time_is_limited_by_itself():
    """The limit of the kernel, which binds when nobody keeps the time."""
    program = "import resource; assert resource.getrlimit(resource.RLIMIT_CPU) == (3, 3)"
    assert run(program, Limits(1.5, 256)).outcome == "passed"


def test_no_child_processes():
    program = """
import os, time
started = 0
for _ in range(200):
    if os.fork() == 0:
        time.sleep(1.0)
        os._exit(0)
    started += 1
"""
    verdict = run(program)
    assert verdict.outcome == "failed"
    assert verdict.detail.startswith("BlockingIOError")


def test_no_threads():
    verdict = run("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()")
    assert verdict == Verdict("failed", "RuntimeError: can't start new thread")


def test_memory_is_limited():
    program = "held = []\nfor _ in range(32): held.append(bytearray(64 << 20))"  # 2 GB in all
    assert run(program) == Verdict("killed", "memory limit of 256 MiB")


@pytest.mark.parametrize(
    "attempt", ["ctypes.CDLL(None).shmget(0, 4096, 0o1600)", "ctypes.CDLL(None).memfd_create(b'x', 0)"]
)
def test_no_memory_that_the_limit_does_not_count(attempt):
    assert run(f"import ctypes\nassert {attempt} == -1").outcome == "passed"


def test_files_are_small():
    """One file by its size, many by what all of them take; 48 MB at most."""
    one = "with open('a', 'wb') as file: file.write(bytes(24 << 20))"
    assert run(one) == Verdict("failed", "OSError: [Errno 27] File too large")
    many = "for i in range(3):\n  with open(str(i), 'wb') as file: file.write(bytes(8 << 20))"
    assert run(many) == Verdict("failed", "OSError: [Errno 28] No space left on device")


# Name of a system call, its number on x86_64 and aarch64, and arguments for which a kernel that does not forbid it says
# something else than EPERM to a user without privileges.
FORBIDDEN = {
    "shmget": (29, 194, "0, 4096, 0o1600"),
    "semget": (64, 190, "0, 1, 0o1600"),
    "msgget": (68, 186, "0, 0o1600"),
    "memfd_create": (319, 279, "b'x', 0"),
    "ptrace": (101, 117, "0, 0, 0, 0"),
    "mount": (165, 40, "1, 1, 1, 0, 0"),
    "add_key": (248, 217, "1, 1, 0, 0, 0"),
    "request_key": (249, 218, "1, 1, 1, 0"),
    "keyctl": (250, 219, "9999"),
    "unshare": (272, 97, "0"),
    "setns": (308, 268, "-1, 0"),
    "perf_event_open": (298, 241, "0, 0, -1, -1, -1"),
    "bpf": (321, 280, "0, 1, 1 << 20"),
    "userfaultfd": (323, 282, "1 | 1 << 20"),  # 1: for user mode only, which needs no privilege
    "io_uring_setup": (425, 425, "0, 0"),
}
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2}
LARGEST_FAMILY = 45  # of the kernel's header


def errors_of(calls: list[str]) -> list[str]:
    """Returns how each system call ends in the sandbox: ``EPERM``, another error, or nothing."""
    program = f"""
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
said = []
for arguments in [{", ".join(f"({each},)" for each in calls)}]:
    ctypes.set_errno(0)
    failed = libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)) == -1
    said.append(ctypes.get_errno() if failed else 0)
raise SystemExit(" ".join(map(str, said)))
"""
    verdict = run(program)
    assert verdict.detail.startswith("SystemExit: "), verdict
    return [errno.errorcode.get(int(each), "") for each in verdict.detail.removeprefix("SystemExit: ").split()]


def number_of(column_x86: int, column_aarch64: int) -> int:
    return {"x86_64": column_x86, "aarch64": column_aarch64}[os.uname().machine]


@pytest.fixture(scope="module")
def errors():
    calls = [f"{number_of(*numbers)}, {arguments}" for *numbers, arguments in FORBIDDEN.values()]
    return dict(zip(FORBIDDEN, errors_of(calls), strict=True))


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_forbidden_system_call(errors, name):
    assert errors[name] == "EPERM"


def test_every_forbidden_system_call_is_tested():
    assert {name: numbers[:2] for name, numbers in FORBIDDEN.items()} == confine._FORBIDDEN
    assert confine._SOCKET_FAMILIES == FAMILIES


@pytest.fixture(scope="module")
def errors_of_families():
    """By call, what the kernel says to each family of sockets."""
    families = range(LARGEST_FAMILY + 1)
    pair, single = number_of(53, 199), number_of(41, 198)
    return {
        "socket": errors_of([f"{single}, {family}, 2, 0" for family in families]),
        "socketpair": errors_of([f"{pair}, {family}, 2, 0, (ctypes.c_int * 2)()" for family in families]),
        "socket, sign extended": errors_of([f"{single}, {family} | 1 << 32, 2, 0" for family in families]),
    }


@pytest.mark.parametrize("family", range(LARGEST_FAMILY + 1))
def test_a_socket_of_another_family_is_refused(errors_of_families, family):
    refused = {name: errors[family] == "EPERM" for name, errors in errors_of_families.items()}
    assert set(refused.values()) == {family not in FAMILIES.values()}, refused


def test_an_event_loop_runs():
    assert run("import asyncio\nassert asyncio.run(asyncio.sleep(0, 5)) == 5") == Verdict("passed")


@pytest.mark.parametrize("family", ["AF_INET", "AF_UNIX"])
def test_no_connection_to_the_parents_machine(family):
    """A port of the loopback interface, and an abstract name, which needs no file."""
    address = ("127.0.0.1", 0) if family == "AF_INET" else f"\0intttrain-test-{os.getpid()}"
    with socket.socket(getattr(socket, family)) as listener:
        listener.bind(address)
        listener.listen()
        listener.settimeout(0.0)
        program = f"import socket\ns = socket.socket(socket.{family})\ns.connect({listener.getsockname()!r})"
        verdict = run(program)
        assert verdict.outcome == "failed"
        assert "Error" in verdict.detail
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture
def public_folder():
    """A folder that any user may read and write, so that permissions are not what keeps the program out."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def test_no_file_of_the_parents_is_read(public_folder):
    path = public_folder / "secret"
    path.write_text("secret")
    path.chmod(0o644)
    assert run(f"open({str(path)!r}).read()").detail.startswith("FileNotFoundError")


def test_no_file_is_written_outside(public_folder):
    path = public_folder / "written"
    verdict = run(f"import os\nos.makedirs({str(path.parent)!r}, exist_ok=True)\nopen({str(path)!r}, 'w').write('x')")
    assert verdict.outcome == "failed"
    assert not path.exists()
    assert run("open('/program.py', 'a')").outcome == "failed"


def test_the_working_folder_is_empty_and_writable_and_does_not_last():
    program = "import os\nassert os.listdir() == []\nopen('a', 'w').write('x')\nassert open('a').read() == 'x'"
    assert run(program) == Verdict("passed")
    assert run(program) == Verdict("passed")


def test_nothing_of_the_parents_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os, sys\nassert 'SECRET' not in os.environ\nassert sys.argv == ['-c']").outcome == "passed"


def test_no_open_file_of_the_parents():
    program = """
import os
found = []
for number in range(4, 32):
    try:
        found.append(os.fstat(number))
    except OSError:
        pass
assert not found, found
"""
    reader, writer = os.pipe()
    try:
        os.set_inheritable(writer, True)
        assert run(program) == Verdict("passed")
    finally:
        os.close(reader)
        os.close(writer)


def test_no_process_outside_is_seen_and_no_privileges_are_left():
    program = """
import ctypes, os
assert os.getppid() == 1 and os.getpid() == 2
assert 0 not in os.getresuid() + os.getresgid()
libc = ctypes.CDLL(None)
for attempt in (lambda: os.kill(-1, 0), lambda: os.chroot("/"), lambda: os.setuid(0)):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit("allowed")
assert libc.unshare(0x10000000) == -1
assert libc.prctl(39, 0, 0, 0, 0) == 1  # no new privileges
"""
    assert run(program) == Verdict("passed")


def processes(word: bytes) -> Iterator[Path]:
    """Yields the folders of processes with ``word`` in their command lines."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word in (folder / "cmdline").read_bytes():
                yield folder


@pytest.fixture
def sleeping():
    """A program that sleeps, seen from outside: (what confines it, the program)."""
    mark = f"{9 + os.getpid() / 1e8:.8f}"  # seconds that no other run of this test has

    def sleep():
        with contextlib.suppress(RuntimeError):  # what confines it was killed
            run("import time; time.sleep(8)", Limits(float(mark), 256))

    thread = threading.Thread(target=sleep)
    thread.start()
    program = None
    while thread.is_alive() and program is None:
        confining = list(processes(mark.encode()))
        program = next(
            (p for p in processes(b"<program>") if stat(p, "PPid") in {int(c.name) for c in confining}), None
        )
    outer = min(confining, key=lambda folder: int(folder.name))
    yield outer, program
    with contextlib.suppress(OSError):
        os.kill(int(outer.name), signal.SIGKILL)
    thread.join()


def stat(folder: Path, name: str) -> int:
    lines = (folder / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_the_program_is_not_root_outside(sleeping):
    _, program = sleeping
    assert stat(program, "Uid") == (os.geteuid() or confine.NOBODY)
    assert stat(program, "Gid") == (os.getegid() if os.geteuid() else confine.NOBODY)
    assert stat(program, "NoNewPrivs") == 1
    status = (program / "status").read_text()
    assert "CapEff:\t0000000000000000" in status


def test_nothing_outlives_what_confines_it(sleeping):
    outer, program = sleeping
    os.kill(int(outer.name), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while program.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not program.exists()


def test_endings_that_are_no_verdict_do_not_pass():
    assert run("import os; os._exit(0)") == Verdict("failed", "ended by itself with status 0")
    assert run("raise SystemExit(0)") == Verdict("failed", "SystemExit: 0")
    assert run("import ctypes; ctypes.string_at(0)") == Verdict("killed", "SIGSEGV")
    assert run("x = ") == Verdict("failed", "SyntaxError: invalid syntax (<program>, line 1)")
    assert run("assert 1 == 2") == Verdict("failed", "AssertionError")
    assert run("raise ValueError('x' * 10_000)").detail == "ValueError: " + "x" * 188


# What is wrong with one program, and a part of the reason.
UNUSUAL = {
    "too large": ("x = 0" + " " * (1 << 20), "a program of 1,048,581 bytes, more than 1,048,576"),
    "not to be encoded": ("x = '\ud800'", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\\\ud800'"),
    "a zero byte": ("x = 0\0", "null bytes"),
    "nested": ("(" * 5000 + ")" * 5000, "nested|overflow|Recursion"),
    "an error without a text": (
        "class Mute(Exception):\n  def __str__(self): raise SystemExit(0)\nraise Mute", "ended by itself",
    ),
    "a signal without a name": ("import os; os.kill(os.getpid(), 40)", "signal 40"),
    "a verdict of its own": ("import os; os.write(3, b'[' * 4000); os._exit(0)", "ended by itself with status 0"),
    "a verdict of another kind": ("import os; os.write(3, b'{\"error\": [1]}'); os._exit(0)", "ended by itself"),
}  # fmt: skip


def test_an_unusual_program_fails_alone():
    programs = [*(program for program, _ in UNUSUAL.values()), "x = 1"]
    verdicts = dict(run_programs(programs, LIMITS))
    for number, (name, (_, reason)) in enumerate(UNUSUAL.items()):
        assert verdicts[number].outcome in ("failed", "killed"), name
        assert re.search(reason, verdicts[number].detail), (name, verdicts[number])
    assert verdicts[len(UNUSUAL)] == Verdict("passed")


def test_the_largest_program_runs():
    text = "x = 1  # ✓"
    assert run(text + "#" * (confine.PROGRAM_BYTES - len(text.encode()))) == Verdict("passed")


def test_output_goes_nowhere():
    assert run("import sys\nfor _ in range(100): print('x' * 10**6); sys.stderr.write('y' * 10**6)") == Verdict(
        "passed"
    )


# A line of the script, what it is changed to, and the layer that the probe then misses.
HOLES = {
    "namespaces": ("sum(_CLONE_NEW.values())", "-1", "namespaces"),
    "processes": ('    "pid": 0x20000000,\n', "", "process namespace"),
    "network": ('    "net": 0x40000000,\n', "", "network namespace"),
    "view": ("[*libraries, executable]", '[*libraries, executable, "/var"]', "file system of its own"),
    "read-only": ("_ATTR_READ_ONLY | _ATTR_NOSUID", "_ATTR_NOSUID", "read-only file system"),
    "children": ("resource.RLIMIT_NPROC: 1,", "", "limit of processes"),
    "memory": ("resource.RLIMIT_AS: memory_mib << 20,", "", "limit of memory"),
    "privileges": (
        "_libc.prctl, _PR_SET_NO_NEW_PRIVS, 1",
        "_libc.prctl, 3, 0",
        "bar to new privileges|system call filter",
    ),
    "calls": ('require("system call filter", forbid_system_calls)', "pass", "system call filter"),
    "families": ("(equal, each, allowed_at + 1) for", "(equal, each, allowed_at) for", "filter of socket families"),
}


@pytest.mark.parametrize("hole", HOLES)
def test_a_layer_that_is_missing_is_named_before_anything_runs(hole, tmp_path, monkeypatch):
    line, changed, layer = HOLES[hole]
    source = Path(confine.__file__).read_text()
    assert source.count(line) == 1
    script = tmp_path / "confine.py"
    script.write_text(source.replace(line, changed))
    monkeypatch.setattr(confine, "__file__", str(script))
    with pytest.raises(UserError, match=f"cannot be executed here: the sandbox has no ({layer})") as caught:
        list(run_programs(["x = 1"], LIMITS))
    assert "\n" not in str(caught.value)


def test_programs_run_several_at_a_time_and_keep_their_numbers():
    programs = ["x = 1", "1 / 0", "import time; time.sleep(0.3)"]
    outcomes = {i: verdict.outcome for i, verdict in run_programs(programs, LIMITS)}
    assert outcomes == {0: "passed", 1: "failed", 2: "passed"}
