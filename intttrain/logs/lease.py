"""One start at a time in a workdir: a second one is refused, or takes over from one that is gone.

    WORKDIR/lease/12.json    the twelfth start: its process, and a count that it raises every ``BEAT_S``

A start takes the workdir by creating the file of the next number, which file systems and buckets let only one of
several do, and then removes the lower ones. One that no longer finds its own file, or finds a higher one, has lost the
workdir: another one took it for dead. The last file stays when its start has ended, and says so; numbers only grow, so
that one who was suspended in between is never taken for the newest.

    the newest start                           what the next one does
    has ended                                  takes the workdir
    its process is gone (of this kernel)       takes it at once, with a line
    is about to end, and beats                 waits for its end
    lives here, or beats elsewhere             is refused
    is silent for ``SILENT_BEATS``             takes it, with a line

Clocks of two hosts are never compared: who waits looks for another count, by its own clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from time import monotonic, sleep
from typing import Any

from intttrain.config.errors import UserError, WaitedError
from intttrain.storage.files import Place, create_text, write_text
from intttrain.storage.processes import describe_self, is_gone, is_near

FOLDER = "lease"
BEAT_S = 10.0
SILENT_BEATS = 6  # in a row that are missing, until a start is taken for dead
SEEN_BEATS = 2  # until one elsewhere counts as alive: the second tells of an end that was asked for before
ENDING_S = 900.0  # for the last save of another start; GKE gives a pod 600 s


@dataclasses.dataclass(frozen=True)
class _Start:
    """What stands in the file of one start."""

    id: str
    who: Mapping[str, Any]
    since: str
    beat_s: float
    beats: int = 0
    ending: bool = False
    ended: bool = False

    def __str__(self) -> str:
        return f"process {self.who['process']} on host {self.who['host']}, which began at {self.since}"

    def to_text(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _parse(text: str) -> _Start | None:
    """Returns what a file says, ``None`` if it says nothing yet: its start was killed, or is just writing."""
    try:
        return _Start(**json.loads(text))
    except (ValueError, TypeError):
        return None


class Lease(contextlib.AbstractContextManager["Lease"]):
    """The right of one process to write into a workdir; ``claim`` takes it, leaving the block gives it back.

    While it is held a thread beats, and looks whether the workdir is still this start's. Beats that cannot be written
    end nothing: there is one warning.
    """

    def __init__(self, workdir: Place, report: Callable[[str], None], stop: Callable[[UserError], object]) -> None:
        """Takes nothing yet.

        Args:
          workdir: of a run.
          report: receives what people should know.
          stop: called in the thread, and by ``check``, with what to say when the workdir was lost; ends the program.
        """
        self._workdir, self._folder, self._report, self._stop = workdir, workdir / FOLDER, report, stop
        self._id = secrets.token_hex(8)
        self._number = 0
        self._start: _Start | None = None
        self._lost: UserError | None = None
        self._ending = self._warned = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._beat_regularly, name="lease", daemon=True)

    # --- taking it ---------------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Takes the workdir, or waits until that is possible.

        Raises:
          UserError: another start trains there.
          WaitedError: one that is about to end does not.
        """
        watch = _Watch(self._workdir, self._report)
        while self._start is None:  # a caller that tries again may have it already
            number = max(self._numbers(), default=0)
            text = self._read(number) if number else None
            own = self._is_own(text)  # left by an attempt that a failure cut off
            is_free = own or not number or (text is not None and watch.may_take(number, text))
            if is_free and self._take(number if own else number + 1):
                self._thread.start()
            else:
                sleep(watch.pause_s)  # also when its follower has just removed it, or was faster

    def _take(self, number: int) -> bool:
        """Creates the file of a start; tells whether no other one was faster."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        start = _Start(self._id, describe_self(), since, BEAT_S)
        try:
            create_text(self._file(number), start.to_text())
        except FileExistsError:
            if not self._is_own(self._read(number)):  # else an answer was lost
                return False
        others = self._numbers() - {number}
        if max(others, default=0) > number:
            self._remove(number)
            return False
        for other in others:
            self._remove(other)
        self._number, self._start = number, start
        return True

    def _is_own(self, text: str | None) -> bool:
        return (found := _parse(text or "")) is not None and found.id == self._id

    # --- having it ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Looks whether the workdir is still this start's, before something is written; ends the program if not."""
        if self._start is not None and (error := self._find_lost()):
            self._stop(error)
            raise error

    def say_ending(self) -> None:
        """Has the next beat say that this start is about to end, for which others wait; signal handlers may, too."""
        self._ending = True

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if self._start is None:
            return
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            error = self._find_lost()
            if error is None:
                self._write(dataclasses.replace(self._start, ended=True))
        except Exception as failure:
            self._warn(failure)
        else:
            if error is not None and exc is None:
                raise error
        self._start = None

    def _beat_regularly(self) -> None:
        while not self._left.wait(BEAT_S):
            if error := self._find_lost():
                self._stop(error)
                return
            try:
                self._beat()
            except Exception as failure:  # anything from a stale handle to credentials
                self._warn(failure)

    def _beat(self) -> None:
        assert self._start is not None
        self._start = dataclasses.replace(self._start, beats=self._start.beats + 1, ending=self._ending)
        self._write(self._start)

    def _find_lost(self) -> UserError | None:
        """Returns what to say if the workdir was lost; one that cannot be read is not."""
        assert self._start is not None
        if self._lost is None:
            try:
                text, newest = self._read(self._number), max(self._numbers(), default=0)
                own = text is not None and ((found := _parse(text)) is None or found.id == self._start.id)
                if own and newest <= self._number:
                    return None
                follower = _parse((self._read(newest) if newest >= self._number else None) or "")
            except Exception as failure:
                self._warn(failure)
                return None
            silence = f"did not beat for {SILENT_BEATS * BEAT_S:.0f} s (suspended, or without its storage)"
            why = f"was taken over by {follower}, since this start {silence}"
            if follower is None:
                why = f"is no longer this start's: {self._file(self._number)} was deleted"
            self._lost = UserError(f"--workdir={self._workdir} {why}; it writes nothing more and ends")
        return self._lost

    def _warn(self, failure: Exception) -> None:
        if not self._warned:
            reason = " ".join((str(failure).strip() or type(failure).__name__).split())[:200]
            self._report(
                f"warning: {self._folder} cannot be kept up ({reason}); training goes on and tries again. Until then a "
                f"start on another host would take over after {SILENT_BEATS * BEAT_S:.0f} s"
            )
        self._warned = True

    # --- files -------------------------------------------------------------------------------------------------------

    def _file(self, number: int) -> Place:
        return self._folder / f"{number}.json"

    def _numbers(self) -> set[int]:
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return set()
        return {int(found[1]) for name in names if (found := re.fullmatch(r"(\d+)\.json", name))}

    def _read(self, number: int) -> str | None:
        try:
            return self._file(number).read_text()
        except FileNotFoundError:
            return None

    def _write(self, start: _Start) -> None:
        write_text(self._file(self._number), start.to_text())

    def _remove(self, number: int) -> None:
        with contextlib.suppress(Exception):  # a lower number means nothing
            self._file(number).unlink(missing_ok=True)


class _Watch:
    """What one who waits has seen of the newest start."""

    def __init__(self, workdir: Place, report: Callable[[str], None], clock: Callable[[], float] = monotonic) -> None:
        self._workdir, self._report, self._clock = workdir, report, clock
        self._number, self._text, self._beats = 0, "", 0
        self._changed = self._arrived = clock()
        self._silent_s = SILENT_BEATS * BEAT_S
        self._said = ""

    @property
    def pause_s(self) -> float:
        """Until the next look."""
        return min(1.0, self._silent_s / 50)

    def may_take(self, number: int, text: str) -> bool:
        """Tells whether the workdir is free, from what stands in the file of the newest start.

        Raises:
          UserError, WaitedError: as ``Lease.claim``.
        """
        self._note(number, text)
        holder = _parse(text)
        if holder is None:
            return self._is_silent("a start that has not said who it is")
        if holder.ended:
            return True
        if is_gone(holder.who):
            self._report(f"{self._workdir}: {holder}, is gone without an end; going on in its place")
            return True
        if holder.ending:
            return self._is_ending_or_silent(holder)
        near = is_near(holder.who)
        if near or self._beats >= SEEN_BEATS:
            raise UserError(self._refusal(holder, near))
        return self._is_silent(str(holder))

    def _note(self, number: int, text: str) -> None:
        if (number, text) == (self._number, self._text):
            return
        self._beats = self._beats + 1 if number == self._number else 0
        self._number, self._text, self._changed = number, text, self._clock()
        if holder := _parse(text):
            self._silent_s = SILENT_BEATS * holder.beat_s

    def _is_silent(self, who: str) -> bool:
        if self._clock() - self._changed >= self._silent_s:
            self._report(f"{self._workdir}: {who}, was silent for {self._silent_s:.0f} s; going on in its place")
            return True
        self._say(f"{self._workdir}: waiting up to {self._silent_s:.0f} s for a sign of {who}")
        return False

    def _is_ending_or_silent(self, holder: _Start) -> bool:
        if not is_near(holder.who) and self._clock() - self._changed >= self._silent_s:
            return self._is_silent(str(holder))
        if self._clock() - self._arrived >= ENDING_S:
            raise WaitedError(f"--workdir={self._workdir}: {holder}, does not come to its end in {ENDING_S:.0f} s")
        self._say(f"{self._workdir}: waiting for the end of {holder}")
        return False

    def _say(self, line: str) -> None:
        if line != self._said:
            self._report(line)
        self._said = line

    def _refusal(self, holder: _Start, near: bool) -> str:
        number, host = holder.who["process"], holder.who["host"]
        copied = f" (delete {self._workdir / FOLDER} if the folder is a copy of that run's)" if near else ""
        return (
            f"--workdir={self._workdir} is in use by {holder}; one start trains in a workdir at a time: wait for its "
            f"end, stop it with `kill {number}` on {host}, or name another --workdir{copied}"
        )
