"""Process 0 decides for all who is lost and whether the run goes on. Only its own clock counts, and what it sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from intttrain.config.errors import FINAL_STATUSES, RESTART_STATUS
from intttrain.pod.coordination import KeyValueStore
from intttrain.pod.preflight import describe_processes

TRAINING, FINISHED = "training", "finished"  # phases that mean something here
AGAIN = "start the same command on all hosts again: it goes on from the newest checkpoint"

Documents = Mapping[int, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why the run ends.

    Attributes:
      together: every process failed by itself and may end as it would alone.
      lost: processes that ended without a word or stand still.
      failed: processes that said so.
      line: for people.
      status: with which the processes end that did not fail by themselves.
    """

    together: bool
    lost: list[int]
    failed: list[int]
    line: str
    status: int


class Judge:
    """Looks at what processes publish: ``beat`` (host, step, phase, count), ``failure`` (step, kind, line, status).

    A failure waits ``settle_s``: what one process did to all shows within that time, and the beats of a process that
    is gone have stopped for as long. Without a failure, a process is lost when its beats stop for ``silence_s``,
    whatever it does: they come from a thread of their own, which needs nothing but Python's lock.
    """

    def __init__(
        self, store: KeyValueStore, *, settle_s: float, silence_s: float, clock: Callable[[], float]
    ) -> None:  # fmt: skip
        self._store, self._settle_s, self._silence_s, self._clock = store, settle_s, silence_s, clock
        self._changed: dict[int, tuple[Mapping[str, Any], float]] = {}  # the last beat and when it was new
        self._first_failure: float | None = None

    def decide(self) -> Verdict | None:
        """Returns the verdict, ``None`` while the run goes on or nothing is certain; to be called at every beat."""
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
        hosts = {index: beat["host"] for index, beat in beats.items()}
        status = RESTART_STATUS
        if lost:
            step = max(beat["step"] for beat in beats.values())
            line = f"{describe_processes(lost, hosts)} {'was' if len(lost) == 1 else 'were'} lost after step {step}"
        elif hanging := [index for index, failure in failures.items() if failure["kind"] == "hang"]:
            line = f"{failures[min(hanging)]['line']}; {_standing(beats, hosts)}"
        else:
            # What starting again cannot mend comes first: an error of the others may be what it did to them.
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
    """Returns where everybody is: ``process 0 (host a) training after step 7, process 1 (host b) ...``."""
    places: dict[tuple[int, str], list[int]] = {}
    for index, beat in beats.items():
        places.setdefault((beat["step"], beat["phase"]), []).append(index)
    return ", ".join(
        f"{describe_processes(indices, hosts)} {phase} after step {step}"
        for (step, phase), indices in sorted(places.items())
    )
