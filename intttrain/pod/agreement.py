"""What processes agree on before they go on. All of them make the same calls in the same order.

Letters: N numbers, P processes, B bytes of a message, D devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from intttrain.config.errors import RESTART_STATUS, PassingError, UserError, explain_exit, reason_of
from intttrain.pod.coordination import open_key_value_store
from intttrain.pod.distributed import process_count, process_index

_MESSAGE_BYTES = 4096
_ASK_AGAIN_S = 5.0


def on_first_process(action: Callable[[], None]) -> None:
    """Runs ``action`` on process 0 while the others wait.

    Raises:
      UserError: on every process, if ``action`` raised one or anything else that ``explain_exit`` explains; nobody is
        left waiting. ``PassingError`` if the failure passes by itself.
    """
    failure = _failure_of(action) if process_index() == 0 else ""
    if process_count() > 1:
        failure = _text(np.asarray(multihost_utils.broadcast_one_to_all(_padded(failure))))
    _raise(failure)


def wait_for_first_process(action: Callable[[], None]) -> None:
    """Does what ``on_first_process`` does where it may take minutes: collectives of CPUs give up earlier."""
    store = open_key_value_store()
    if store is None:
        _raise(_failure_of(action))
        return
    if store.index == 0:
        store.put("first process", {"failure": _failure_of(action)})
    while True:
        try:
            answer = store.get("first process", 0, _ASK_AGAIN_S)
            break
        except TimeoutError:
            continue  # the watchdog looks whether process 0 is still there
    _raise(answer["failure"])


def _failure_of(action: Callable[[], None]) -> str:
    """Returns what the action raised, as ``_raise`` reads it; ``""`` for nothing. What is a bug is raised."""
    try:
        action()
    except Exception as error:
        if (explained := explain_exit(error)) is None:
            raise
        return _with_status(*explained)
    return ""


def raise_together(failure: Exception | None) -> None:
    """Raises on all processes, which call it together, what the first one of them that has a failure brings.

    Raises:
      UserError: with the message and the kind that the failure has where it happened. There it is raised itself.
    """
    message, status = ("", 0) if failure is None else explain_exit(failure) or (reason_of(failure), UserError.status)
    found = first_message(_with_status(message, status) if failure is not None else "")
    if found and failure is not None:
        raise failure
    _raise(found)


def _with_status(message: str, status: int) -> str:
    return f"{status} {message}"


def _raise(failure: str) -> None:
    if failure:
        status, _, message = failure.partition(" ")
        raise (PassingError if status == str(RESTART_STATUS) else UserError)(message)


def _padded(text: str) -> np.ndarray:
    encoded = text.encode()[:_MESSAGE_BYTES]
    padded = np.zeros(_MESSAGE_BYTES, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return padded


def _text(padded: np.ndarray) -> str:
    return padded.tobytes().rstrip(b"\0").decode(errors="replace")


def decided_by_first(flags_N: np.ndarray) -> np.ndarray:
    """Returns the array that process 0 brings; every process brings one of the same shape and dtype."""
    return flags_N if process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(flags_N))


def largest(value: int) -> int:
    """Returns the largest of the values that the processes bring."""
    return ask_largest(value)()


def ask_largest(value: int) -> Callable[[], int]:
    """Asks for the largest of the values that the processes bring, without waiting: the result does that.

    The devices answer between the programs that they are given before and after.
    """
    if process_count() == 1:
        return lambda: value
    flags, largest_of = _flags()
    values_D = jax.make_array_from_callback(flags.mesh.devices.shape, flags, lambda _: np.full(1, value, np.int32))
    answer = largest_of(values_D)
    return lambda: int(answer)


@functools.cache
def _flags() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """Returns the sharding of one number for every device, and the program that finds the largest for all."""
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("device")), jax.jit(jnp.max, out_shardings=everywhere)


def first_message(message: str) -> str:
    """Returns what the first process with a message says, ``""`` if none has one."""
    if process_count() == 1:
        return message
    messages_PB = multihost_utils.process_allgather(_padded(message))
    return next(filter(None, map(_text, messages_PB)), "")
