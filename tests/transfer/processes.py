"""A process of a test that is stopped, continued and killed."""

from __future__ import annotations

import os
import signal
from multiprocessing.process import BaseProcess


class Killable:
    process: BaseProcess

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join(5)

    def close(self) -> None:
        if self.process.is_alive():
            self.kill()
