"""A last word before ``abort()``, with which JAX's client ends a process when process 0 is gone."""

from __future__ import annotations

import contextlib
import ctypes
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def before_abort(action: Callable[[], None]) -> Iterator[None]:
    """Calls ``action`` in the thread that aborts; the process then ends as it would have, unless the action ends it.

    Python's own handlers run in the main thread, later: too late for this signal, hence the one of the C library.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: action())
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)
