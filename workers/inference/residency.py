"""Models held in memory under a budget, the least recently used out first, never one in use.

Two kinds go only if that is not enough: those of the premium tier, which somebody pays to have at hand, and those
that came a moment ago, or two models that take turns would be loaded for every batch.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from infra.logs import get_logger
from pipelines.model import LoadedModel

Load = Callable[[str, int], LoadedModel]
"""Loads and warms a version of a model. Raises PipelineError."""

STAY_S = 10.0

logger = get_logger("worker.residency")


@dataclass(slots=True)
class _Place:
    loading: threading.Lock = field(default_factory=threading.Lock)
    model: LoadedModel | None = None
    users: int = 0
    loaded_at: float = 0.0


class Residency:
    """budget_bytes: most bytes of engine memory held at once. A model in use is never dropped, so the
    budget may be passed for as long as more models are in use at once than fit."""

    def __init__(
        self, load: Load, budget_bytes: int, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._load = load
        self._monotonic = monotonic
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._places: OrderedDict[tuple[str, int], _Place] = OrderedDict()

    @contextmanager
    def use(self, name: str, version: int) -> Iterator[LoadedModel]:
        """The model, loaded if it was not; it stays for the length of the block. Raises PipelineError."""
        place = self._enter(name, version)
        try:
            with place.loading:
                if place.model is None:
                    place.model = self._load(name, version)
                    place.loaded_at = self._monotonic()
                    self._make_room()
            yield place.model
        finally:
            self._leave((name, version), place)

    def names(self) -> list[str]:
        """`name/version` of every model held, the least recently used first."""
        with self._lock:
            return [f"{name}/{version}" for (name, version), p in self._places.items() if p.model]

    @property
    def memory_bytes(self) -> int:
        with self._lock:
            return sum(place.model.memory_bytes for place in self._places.values() if place.model)

    def close(self) -> None:
        with self._lock:
            places, self._places = list(self._places.values()), OrderedDict()
        for place in places:
            if place.model:
                place.model.close()

    def _enter(self, name: str, version: int) -> _Place:
        with self._lock:
            place = self._places.setdefault((name, version), _Place())
            self._places.move_to_end((name, version))
            place.users += 1
            return place

    def _leave(self, key: tuple[str, int], place: _Place) -> None:
        with self._lock:
            place.users -= 1
            if place.model is None and place.users == 0:
                self._places.pop(key, None)
        self._make_room()

    def _make_room(self) -> None:
        with self._lock:
            dropped = self._over_budget()
        for model in dropped:
            model.close()

    def _over_budget(self) -> list[LoadedModel]:
        """Take out idle models until the rest fit."""
        held = sum(place.model.memory_bytes for place in self._places.values() if place.model)
        idle = [
            (key, place) for key, place in self._places.items() if place.model and not place.users
        ]
        dropped: list[LoadedModel] = []
        for key, place in sorted(idle, key=lambda item: self._worth(item[1])):
            if held <= self._budget_bytes:
                break
            assert place.model is not None
            held -= place.model.memory_bytes
            dropped.append(place.model)
            del self._places[key]
            logger.info("model_dropped", model=key[0], version=key[1])
        return dropped

    def _worth(self, place: _Place) -> tuple[bool, bool]:
        assert place.model is not None
        return place.model.premium, self._monotonic() - place.loaded_at < STAY_S
