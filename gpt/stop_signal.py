"""
The signals that end a run with a checkpoint.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from gpt.world import World


class StopSignal:
    """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a checkpoint and the end; a second Ctrl-C ends at
    once. Signals that this process was started to ignore (nohup) stay ignored."""

    def __init__(self, world: World):
        self.world, self.received, self.since, self.before = world, False, 0.0, {}
        self.debounce_seconds = 2 if world.under_torchrun else 0    # it sends one Ctrl-C twice
        if threading.current_thread() is threading.main_thread():
            for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):
                number = getattr(signal, name, None)                # Windows lacks some
                if number and signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.receive)

    def receive(self, number: int, frame: Any) -> None:
        again = self.received and time.monotonic() - self.since > self.debounce_seconds
        if again and number == signal.SIGINT:
            self.say('ended, without a checkpoint')
            raise KeyboardInterrupt
        if not self.received:                                      # an update may take long
            hint = '; Ctrl-C again ends at once, without one' if number == signal.SIGINT else ''
            self.say(f'ending after this update, with a checkpoint{hint}')
        self.since = self.since or time.monotonic()
        self.received = True

    def say(self, text: str) -> None:
        if self.world.is_main:
            self.world.output.log(text)
            with suppress(OSError):                 # a terminal that is gone is why this came
                os.write(2, f'{text}\n'.encode())

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
