"""Lets process 0 decide for all processes who is lost or failed, and with which line and status the run ends.

One process decides, by its own clock and by what it has seen: clocks of different hosts are never compared, and all
processes report the same cause.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from intttrain.config.errors import FINAL_STATUSES, RESTART_STATUS
from intttrain.pod.coordination import KeyValueStore
from intttrain.pod.preflight import describe_processes

TRAINING, FINISHED = "training", "finished"  # of the phases in beats, those that the rules know; others are only shown
AGAIN = "start the same command on all hosts again: it goes on from the newest checkpoint"

Documents = Mapping[int, Mapping[str, Any]]  # by number of the process that wrote them


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The end of a run, as process 0 sees it.

    Attributes:
      together: whether every process reported a failure of its own; each may then end as it would alone.
      lost: numbers of processes that ended without a word, or whose beats stopped.
      failed: numbers of processes that reported a failure.
      line: the cause, for people.
      status: exit status of the processes that did not fail by themselves.
    """

    together: bool
    lost: list[int]
    failed: list[int]
    line: str
    status: int


class Judge:
    """Reaches the verdict from what processes write into the store.

    They write two kinds of document: ``beat`` (host, step, phase, count) all the time, and ``failure`` (step, kind,
    line, status) once, when an error or a hang ends them.

    - No failure: a process is lost when its beats stop for ``silence_s``, whatever it was doing. Beats come from a
      thread of their own that needs nothing but Python's lock, so a long compilation does not stop them.
    - A failure: the verdict waits for ``settle_s``. The first error to arrive is often not the cause: when a process is
      killed, the collectives of all others fail. After that time they have reported it, and the process that neither
      reports nor beats is the one that is lost.
    """

    def __init__(
        self, store: KeyValueStore, *, settle_s: float, silence_s: float, clock: Callable[[], float]
    ) -> None:  # fmt: skip
        self._store, self._settle_s, self._silence_s, self._clock = store, settle_s, silence_s, clock
        self._changed: dict[int, tuple[Mapping[str, Any], float]] = {}  # last beat, and when this process first saw it
        self._first_failure: float | None = None  # when one was first seen

    def decide(self) -> Verdict | None:
        """Returns the verdict, ``None`` while the run goes on or its cause is not certain; called at every beat."""
        now, failures, beats = self._clock(), self._store.all("failure"), self._store.all("beat")
        for index, beat in beats.items():
            if index not in self._changed or self._changed[index][0] != beat:
                self._changed[index] = (beat, now)
        quiet = {index: now - since for index, (_, since) in self._changed.items()}
        if not failures:
            running = [index for index in quiet if beats[index]["phase"] != FINISHED]
            lost = [index for index in running if quiet[index] > self._silence_s]
            return self._verdict(lost, {}, beats) if lost else None
        if self._first_failure is None:
            self._first_failure = now
        if len(failures) == self._store.count:
            return self._verdict([], failures, beats)
        if now - self._first_failure < self._settle_s:
            return None
        others = [index for index in range(self._store.count) if index not in failures]
        lost = [
            index for index in others
            if index not in beats or (beats[index]["phase"] != FINISHED and quiet[index] >= self._settle_s)
        ]  # fmt: skip
        return self._verdict(lost, failures, beats)

    def _verdict(self, lost: list[int], failures: Documents, beats: Documents) -> Verdict:
        """Names the cause: a lost process before a hanging one, a hanging one before an error.

        A loss explains hangs and errors of the others, and a hang explains their errors.
        """
        hosts = {index: beat["host"] for index, beat in beats.items()}
        status = RESTART_STATUS
        if lost:
            step = max(beat["step"] for beat in beats.values())
            line = f"{describe_processes(lost, hosts)} {'was' if len(lost) == 1 else 'were'} lost after step {step}"
        elif hanging := [index for index, failure in failures.items() if failure["kind"] == "hang"]:
            line = f"{failures[min(hanging)]['line']}; {_standing(beats, hosts)}"
        else:
            # Of several errors, one that a restart cannot mend is the cause: the others may be what it did to them.
            index = min(failures, key=lambda index: (failures[index]["status"] not in FINAL_STATUSES, index))
            if failures[index]["status"] in FINAL_STATUSES:
                status = failures[index]["status"]
            line = (
                f"{describe_processes([index], hosts)} failed after step {failures[index]['step']}: "
                f"{failures[index]['line']}"
            )
        together = len(failures) == self._store.count
        advice = f"; {AGAIN}" if status == RESTART_STATUS else ""
        return Verdict(together, lost, sorted(failures), f"{line}{advice}", status)


def _standing(beats: Documents, hosts: Mapping[int, str]) -> str:
    """Returns where every process is: ``process 0 (host a) training after step 7, process 1 (host b) ...``."""
    places: dict[tuple[int, str], list[int]] = {}
    for index, beat in beats.items():
        places.setdefault((beat["step"], beat["phase"]), []).append(index)
    return ", ".join(
        f"{describe_processes(indices, hosts)} {phase} after step {step}"
        for (step, phase), indices in sorted(places.items())
    )
