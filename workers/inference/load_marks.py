"""Which models' loads never ended: their process crashed, hung or was killed.

A mark is a file, locked for as long as the load goes on, by whichever worker of the machine. One that nobody has locked
is of a load that took its process down, and would take down the next one too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from pipelines.engines.locks import exclusive, is_held
from schemas.errors import Transient


class LoadMarks:
    """Models are `name/version`. A disk that takes no marks keeps no model from being loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def left(self) -> set[str]:
        left = set()
        with suppress(OSError):
            for path in self._folder.iterdir():
                if not is_held(path):
                    left.add(path.name.replace("@", "/"))
        return left

    @contextmanager
    def loading(self, model: str) -> Iterator[None]:
        with ExitStack() as mark:
            with suppress(OSError, Transient):  # Transient: another worker loads it too
                self._folder.mkdir(parents=True, exist_ok=True)
                mark.enter_context(exclusive(self._folder / model.replace("/", "@"), wait_s=0))
            yield
