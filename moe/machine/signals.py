"""What a training is asked from outside while it runs."""

import signal
from typing import Any

SAVE = getattr(signal, "SIGUSR1", None)  # Windows has none


class Requests:
    """Ctrl-C and SIGTERM ask for a checkpoint and an end, and a second Ctrl-C does not wait; SIGUSR1 asks for a
    checkpoint alone."""

    def __init__(self) -> None:
        self.end = self.save = False
        self.before: dict[int, Any] = {}

    def listen(self) -> None:
        numbers = [signal.SIGINT, signal.SIGTERM] + ([SAVE] if SAVE else [])
        self.before = {number: signal.signal(number, self._hear) for number in numbers}

    def _hear(self, number: int, frame: object) -> None:
        if number == SAVE:
            self.save = True
        else:
            self.end = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def over(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
