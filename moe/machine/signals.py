"""What a training is asked from outside while it runs."""

import signal
from typing import Any

SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none


class Requests:
    """Ctrl-C and SIGTERM ask for a checkpoint and an end, and a second Ctrl-C does not wait for the step to end;
    SIGUSR1 asks for a checkpoint alone."""

    def __init__(self) -> None:
        self.end = self.save = False
        self.before: dict[int, Any] = {}
        if SAVE:
            self._take(SAVE)  # at once, lest it end a run that is still being prepared

    def listen(self) -> None:
        self._take(signal.SIGINT)
        self._take(signal.SIGTERM)

    def _take(self, number: int) -> None:
        self.before[number] = signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        if number == SAVE:
            self.save = True
        else:
            self.end = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def over(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
