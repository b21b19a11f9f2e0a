"""Ctrl-C and SIGTERM while a run goes on: the step is finished and saved before the process stops."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

#: Signals that stop a run, with the handler that each is expected to have: a handler of the user's own is left alone.
_STOPS: dict[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


#: A Ctrl-C stops at once when it comes so many seconds after the first signal. One that comes sooner is the same one
#: again: a terminal and torchrun, or Slurm and torchrun, each pass a signal on to every rank.
APART = 1.0


class Signals:
    """Notes the first signal to stop; a second Ctrl-C, a second or more later, stops at once. A context manager.

    A repeated SIGTERM changes nothing: whoever sends it (torchrun, Slurm) waits for the step to be saved, and ends the
    process by SIGKILL when it takes too long.

    Handlers are set in the main thread alone, where Python allows it, and only in place of Python's own; on leaving
    they are put back.

    Args:
        heard: said at once on standard error when the first signal comes, behind its name; empty: nothing is said.

    Attributes:
        received: the signal that came, or None.
    """

    def __init__(self, heard: str = "") -> None:
        self.received: signal.Signals | None = None
        self._heard, self._held = heard, False
        self._before: dict[signal.Signals, Any] = {}
        self._since: float | None = None

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number, usual in _STOPS.items():
                if signal.getsignal(number) is usual:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.received is not None and kind is None:
            self.stop("at its end, with all steps done and saved")

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now, came = time.monotonic(), signal.Signals(number)
        self._since = now if self._since is None else self._since
        if self.received is None:
            self.received = came
            self._say(came)
        elif came is signal.SIGINT and now - self._since >= APART and not self._held:
            self.received = came
            self._restore()
            self.stop("before the step was finished")

    def hold(self) -> None:
        """From now on a second Ctrl-C changes nothing: what the first one asked for is being saved."""
        self._held = True

    def _say(self, came: signal.Signals) -> None:
        """On the file itself: Python's buffered one may be in the middle of a line of the bar."""
        if self._heard:
            name = "Ctrl-C" if came is signal.SIGINT else came.name
            with suppress(OSError, ValueError):  # nobody listens
                os.write(sys.stderr.fileno(), f"\n{name}: {self._heard}\n".encode())

    def settle(self, agreed: signal.Signals | None) -> None:
        """End as the ranks agreed after their last step: on this signal, or as if none had come.

        A signal of this rank that the others were not told of any more is given to the handlers that were there
        before, as if it had come after the run.
        """
        self._restore()
        mine, self.received = self.received, agreed
        if agreed is None and mine is not None:
            signal.raise_signal(mine)

    def stop(self, where: str) -> NoReturn:
        """Leave as Python does on the signal that came.

        Args:
            where: what was done and what was kept, for the message.

        Raises:
            KeyboardInterrupt: after Ctrl-C, as without ``fit``, so that a script does not go on with a model that is
                half trained.
            SystemExit: after SIGTERM, with the status 143 that a shell gives for it; the message is a note of it.
        """
        if self.received is signal.SIGTERM:
            ended = SystemExit(128 + signal.SIGTERM)
            ended.add_note(f"Training was stopped {where}.")
            raise ended
        raise KeyboardInterrupt(f"Training was stopped {where}.")
