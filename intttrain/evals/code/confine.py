"""Stand-alone script: runs the Python program on standard input where it can do no harm (docs/code_evaluation.md).

Three processes. *Outer* (this script) enters new namespaces. *First*, process 1 of the new process namespace, builds
the file system, keeps the time and reports. *Program* has no privileges left and runs the text. The kernel kills first
when outer ends, and everything else in the namespace when first ends.

Standard output: ``ready`` when the caller should write the maps of user ids and then the program; after that one JSON
line, either ``missing`` and ``reason`` (a layer that is not to be had) or ``timed_out``, ``status`` and ``said``.
Imports nothing outside the standard library, because it runs without ``site``.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

READY = b"ready\n"
NOBODY = 65534  # user and group of the program, inside the namespace
PROGRAM_BYTES = 1 << 20  # of the program's text
FILE_BYTES = 16 << 20  # of one file, and of all files together
OPEN_FILES = 32
SAID_BYTES = 4096
_SAID_FD = 3
_PROGRAM = "/program.py"
_WRITABLE = "/sandbox"  # not /tmp, where an interpreter may lie

# Runs the program as the paper's harness does, in empty globals. Nothing is said when the program ends the process.
_RUNNER = f"""
import json, os
write, leave, dumps = os.write, os._exit, json.dumps
with open({_PROGRAM!r}, encoding="utf-8") as file:
    source = file.read()
try:
    exec(compile(source, "<program>", "exec"), {{}})
    said = b'{{"error": null}}'
except MemoryError:
    said = b'{{"error": "MemoryError"}}'
except BaseException as error:
    text = f"{{type(error).__name__}}: {{error}}" if str(error) else type(error).__name__
    said = dumps({{"error": " ".join(text.split())[:200]}}).encode()
write({_SAID_FD}, said)
leave(0)
"""

# From the kernel's headers: sched.h, mount.h, prctl.h, seccomp.h, unistd.h.
_CLONE_NEW = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 442, -100, 0x8000, 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_PIDFD_OPEN = 434  # not every build of Python has os.pidfd_open
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Memory that RLIMIT_AS does not count, and parts of the kernel that no solution of a programming problem needs.
_FORBIDDEN = {  # name: (x86_64, aarch64)
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "ptrace": (101, 117),
    "mount": (165, 40),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "unshare": (272, 97),
    "setns": (308, 268),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}

_SOCKET_CALLS = {"socket": (41, 198), "socketpair": (53, 199)}
# The only kinds of sockets: every other one is a part of the kernel more, and not all stay inside the namespaces.
_SOCKET_FAMILIES = {
    "AF_UNIX": 1,  # the event loop of asyncio wakes itself by a pair
    "AF_INET": 2,  # goes nowhere in an empty network namespace, which the probe shows by it
}

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: Any, *arguments: Any) -> int:
    """Returns the result of a function of libc; raises ``OSError`` where it is negative."""
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = function(*converted)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(result)


def require(layer: str, step: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``step(*arguments)``; reports that ``layer`` is missing and ends the process if it fails."""
    try:
        return step(*arguments)
    except OSError as error:
        report(missing=layer, reason=error.strerror or str(error))
        os._exit(1)


def report(**facts: Any) -> None:
    """Writes one JSON line to standard output."""
    os.write(1, json.dumps(facts).encode() + b"\n")


def outer(options: dict[str, Any]) -> None:
    """Enters the namespaces, waits for the program's text, starts ``first`` and waits for its end."""
    if os.geteuid() == 0:
        require("no supplementary groups", os.setgroups, [])
    # Together, because a user without privileges may have the others only inside a user namespace of its own.
    require(f"namespaces ({', '.join(_CLONE_NEW)})", call, _libc.unshare, sum(_CLONE_NEW.values()))
    call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.write(1, READY)
    program = sys.stdin.buffer.read()
    pid = os.fork()
    if pid == 0:
        first(program, options)
    os.waitpid(pid, 0)


def first(program: bytes, options: dict[str, Any]) -> NoReturn:
    """Process 1: builds the file system, runs the program in a process of its own and reports how that ended."""
    call(_libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the program may have our user id
    nothing = os.open(os.devnull, os.O_RDWR)
    require("file system", make_view, program, options["executable"], options["libraries"])
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        run_program(options, nothing, writer)
    os.close(writer)
    ended, _, _ = select.select([call(_libc.syscall, _PIDFD_OPEN, pid, 0)], [], [], options["seconds"])
    if not ended:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    said = os.read(reader, SAID_BYTES).decode(errors="replace")
    report(timed_out=not ended, status=os.waitstatus_to_exitcode(status), said=said)
    os._exit(0)


def make_view(program: bytes, executable: str, libraries: list[str]) -> None:
    """Makes ``/view`` of a new root all that a process confined to it can see; nothing of the old root stays mounted.

    Read-only: the interpreter, the folders of libraries, the program. ``/sandbox`` is empty, writable and in memory.
    """
    call(_libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    data = f"mode=755,size={2 * PROGRAM_BYTES}".encode()
    call(_libc.mount, b"tmpfs", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV, data)
    os.makedirs("/tmp/old")
    call(_libc.syscall, _PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/old")
    os.chdir("/")
    os.makedirs(f"/view{_WRITABLE}")
    for path in [*libraries, executable]:
        show(path)
    with open(f"/view{_PROGRAM}", "wb") as file:
        file.write(program)
    call(_libc.umount2, b"/old", _MNT_DETACH)
    attributes = struct.pack("QQQQ", _ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    call(_libc.syscall, _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes))
    data = f"mode=700,uid={NOBODY},gid={NOBODY},size={FILE_BYTES},nr_inodes=1024".encode()
    call(_libc.mount, b"tmpfs", f"/view{_WRITABLE}".encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, data)


def show(path: str) -> None:
    """Gives a file, folder or link of the old root the same place in the view; one that does not exist is left out."""
    source, target = f"/old{path}", f"/view{path}"
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif os.path.exists(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "wb").close()
    else:
        return
    call(_libc.mount, source.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)


def run_program(options: dict[str, Any], nothing: int, writer: int) -> NoReturn:
    """Gives up everything that is left and becomes the interpreter that runs the program."""
    require("file system", os.chroot, "/view")  # after which the kernel refuses new user namespaces
    require("file system", os.chdir, _WRITABLE)
    require(f"user {NOBODY}", os.setresgid, NOBODY, NOBODY, NOBODY)
    require(f"user {NOBODY}", os.setresuid, NOBODY, NOBODY, NOBODY)
    limit_resources(options["seconds"], options["memory_mib"])
    require("no new privileges", call, _libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    require("system call filter", forbid_system_calls)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.dup2(writer, _SAID_FD)  # the one descriptor beside these three that survives what follows
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    # A user other than root loses all capabilities here.
    os.execve(options["executable"], [options["executable"], "-I", "-S", "-B", "-c", _RUNNER], {})


def limit_resources(seconds: float, memory_mib: int) -> None:
    """Sets the limits of this process; it may have no children and no threads."""
    limits = {
        resource.RLIMIT_AS: memory_mib << 20,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_NPROC: 1,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        require("resource limits", resource.setrlimit, kind, (most, most))


def forbid_system_calls() -> None:
    """Installs a filter after which the calls of ``_FORBIDDEN``, and sockets of other families, fail with EPERM."""
    machine = os.uname().machine
    column = list(AUDIT_ARCH).index(machine)
    forbidden, sockets = ([both[column] for both in calls.values()] for calls in (_FORBIDDEN, _SOCKET_CALLS))
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050001
    number, architecture, argument = 0, 4, 16  # where the kernel shows them; of the argument the half that counts
    code = [(load, 0, 0, architecture), (equal, 1, 0, AUDIT_ARCH[machine]), (leave, 0, 0, kill), (load, 0, 0, number)]
    # Jumps are counted from the next line on. The x32 calls of x86_64 have numbers from 0x40000000 on.
    allowed_at = len(code) + 1 + len(forbidden) + len(sockets)
    refused_at = allowed_at + 2 + len(_SOCKET_FAMILIES)
    for test, value, target in [
        (at_least, 0x40000000, refused_at),
        *((equal, each, refused_at) for each in forbidden),
        *((equal, each, allowed_at + 1) for each in sockets),
    ]:
        code.append((test, target - len(code) - 1, 0, value))
    code += [(leave, 0, 0, allow), (load, 0, 0, argument)]
    code += [(equal, refused_at - len(code) - i, 0, family) for i, family in enumerate(_SOCKET_FAMILIES.values())]
    code += [(leave, 0, 0, refuse), (leave, 0, 0, allow)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    call(_libc.prctl, _PR_SET_SECCOMP, 2, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(instructions)), 0, 0)


if __name__ == "__main__":
    outer(json.loads(sys.argv[1]))
