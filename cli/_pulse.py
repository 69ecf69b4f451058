"""What a command says of itself while it works: a line to whoever sends SIGUSR1 or SIGUSR2, a heartbeat for programs.

A thread of its own says it. A handler of signals would have to wait for the end of a long operation of torch, and would
be interrupted by the next question before it has answered the last one.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rbkit.cli import _log
from rbkit.cli._progress import Progress

ASKING = (signal.SIGUSR1, signal.SIGUSR2)
INTERVAL = 60.0  # seconds between heartbeats
BEGUN = time.monotonic()
OVER = b"\0"  # no signal has this number


class Pulse:
    """Answers the signals `asking` from now on, unless they were ignored at the start, and beats within its block.

    Questions that come at once get one answer. With RB_LOG=json there is an event every minute: of a job that hangs, its
    count stays.
    """

    def __init__(self, tool: str, *, asking: Sequence[signal.Signals]) -> None:
        self.tool = tool
        self.asking = [signum for signum in asking if signal.getsignal(signum) is not signal.SIG_IGN]
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.heard, told = os.pipe()
        os.set_blocking(told, False)
        self.told = told
        for signum in self.asking:
            signal.signal(signum, lambda *_: None)  # what counts is the number that the interpreter writes to the pipe
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)

    def __enter__(self) -> Pulse:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(-1)
        os.set_blocking(self.told, True)
        os.write(self.told, OVER)
        self.thread.join(1)  # what follows is the last event

    def _beat(self) -> None:
        pause = INTERVAL if _log.as_json() else None
        while True:
            ready, _, _ = select.select([self.heard], [], [], pause)
            heard = os.read(self.heard, 4096) if ready else b""
            if OVER in heard:
                return
            if not ready:
                _log.emit(self.tool, "heartbeat", **_state())
            elif any(signum in heard for signum in self.asking):
                self._answer()

    def _answer(self) -> None:
        found, work = _state(), Progress.current
        if _log.as_json():
            _log.emit(self.tool, "status", **found)
        elif work is None:
            _log.write(f"{self.tool}: at work for {found['seconds']:.1f} s")
        else:
            _log.write(f"{self.tool}: {work.count()} in {found['seconds']:.1f} s, {found['rate']:.1f} per second")


def _state() -> dict[str, Any]:
    if Progress.current is not None:
        return Progress.current.state()
    return {"seconds": round(time.monotonic() - BEGUN, 3)}
