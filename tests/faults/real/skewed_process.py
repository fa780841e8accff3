"""A dispatcher or worker whose wall clock is wrong: by as many seconds as a file says, at any time.

skewed_process.py dispatcher|worker CLOCK
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path

LOOK_S = 0.1
MODULES = {"dispatcher": "workers.dispatcher.main", "worker": "workers.inference.main"}


class Clock:
    def __init__(self, file: Path) -> None:
        self._file = file
        self._true_time, self._true_time_ns = time.time, time.time_ns
        self._offset_s = 0.0
        self.look()

    def set_wrong(self) -> None:
        time.time = lambda: self._true_time() + self._offset_s
        time.time_ns = lambda: self._true_time_ns() + int(self._offset_s * 1e9)
        threading.Thread(target=self._follow, name="clock", daemon=True).start()

    def look(self) -> None:
        """A file that is just being written is looked at again soon."""
        if text := self._file.read_text():
            self._offset_s = float(text)

    def _follow(self) -> None:
        while True:
            time.sleep(LOOK_S)
            self.look()


if __name__ == "__main__":
    Clock(Path(sys.argv[2])).set_wrong()
    module = MODULES[sys.argv[1]]
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
