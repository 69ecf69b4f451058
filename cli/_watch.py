"""What rb-train looks at after each step: a signal that asks it to stop, and whether a checkpoint is due."""

from __future__ import annotations

import re
import signal
import time
from typing import TYPE_CHECKING

from rbkit.cli._errors import Stopped, Terminated, Usage
from rbkit.cli._log import note

if TYPE_CHECKING:
    from rbkit.cli._checkpoint import Job
    from rbkit.tools.ranks import Ranks
    from rbkit.tools.train import State

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
SECONDS = {"s": 1, "m": 60, "h": 3600}


def pace(text: str | None) -> tuple[int, float]:
    """(steps, seconds) between two checkpoints, 0 for none: 500 is steps; 90s, 10m and 2h are times."""
    if text is None:
        return 0, 0.0
    found = re.fullmatch(r"(\d+)([smh]?)", text)
    if found is None or not int(found[1]):
        raise Usage(f"--checkpoint-every: got {text!r}, expected steps such as 500, or a time such as 90s, 10m or 2h")
    return (0, float(found[1]) * SECONDS[found[2]]) if found[2] else (int(found[1]), 0.0)


class Watch:
    """Handlers that only remember their signal, and the clock of the last checkpoint.

    A signal to one process of several stops all of them after the same step.
    """

    def __init__(self, job: Job, *, every: tuple[int, float], ranks: Ranks) -> None:
        self.job, self.ranks = job, ranks
        self.steps, self.seconds = every
        self.caught: list[int] = []
        self.saved_at = time.monotonic()

    def listen(self) -> None:
        """Take over the signals that ask for a stop, apart from those that were ignored at the start (nohup)."""
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, lambda number, _: self._catch(number))

    def _catch(self, number: int) -> None:
        if self.caught and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.caught.append(number)
        if number == signal.SIGINT and self.ranks.index == 0:
            note("rb-train", "stopping after this step; Ctrl-C again to quit now")

    def after_step(self, state: State) -> None:
        """Stop if a signal came, else save if it is time. Raises: Stopped, or Terminated after Ctrl-C."""
        stop = self.ranks.largest(self.caught[0] if self.caught else 0)
        if stop:
            self._stop(stop, state)
        steps_due = self.steps and state.step % self.steps == 0
        if steps_due or (self.seconds and time.monotonic() - self.saved_at >= self.seconds):
            self.save(state)

    def save(self, state: State) -> bool:
        """Write the checkpoint; False where there is no place for one."""
        self.saved_at = time.monotonic()
        return self.job.save(state)

    def _stop(self, number: int, state: State) -> None:
        saved = self.save(state)
        if number == signal.SIGINT:
            raise Terminated(number)
        what = (
            f"saved at step {state.step}; run the same command with --resume"
            if saved
            else "standard output keeps no checkpoint"
        )
        raise Stopped(f"stopped by {signal.Signals(number).name}: {what}")
