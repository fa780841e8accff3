"""What the processes that step until they are told to stop have in common: start, trouble on the way, exit codes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from infra.logs import configure_logs, get_logger
from infra.settings import Settings, load_settings
from schemas.errors import PipelineError, Transient

EXIT_FAILED = 1
EXIT_FENCED = 75

logger = get_logger("process")


def serve(name: str, run: Callable[[Settings, threading.Event], int]) -> int:
    """Run until SIGTERM or SIGINT sets the event; returns the exit code (see exit_code)."""
    settings = load_settings()
    configure_logs(name, settings.log_level)
    stop = threading.Event()

    def on_signal(signum: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return exit_code(lambda: run(settings, stop))


def exit_code(run: Callable[[], int]) -> int:
    """Of a process. An error that has a code is logged, not raised."""
    try:
        return run()
    except PipelineError as error:
        logger.error("failed", code=error.code, error=error.message)
        return EXIT_FAILED


class PatientProcess:
    """Goes on through what may go away by itself. trouble: the code of what it waits for, None if all is well."""

    trouble: str | None = None

    def patiently(self, step: Callable[[], None], pause_s: float) -> None:
        """One step; where it fails for now, a pause, and a line in the log when that begins and ends."""
        try:
            step()
        except Transient as error:
            if self.trouble != error.code:
                logger.warning("trouble", code=error.code, error=error.message)
            self.trouble = error.code
            time.sleep(pause_s)
        else:
            if self.trouble:
                logger.info("trouble_over", code=self.trouble)
            self.trouble = None
