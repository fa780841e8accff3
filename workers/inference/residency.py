"""Models held in memory under a budget, the least recently used out first, never one in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from infra.logs import get_logger
from pipelines.model import LoadedModel

Load = Callable[[str, int], LoadedModel]
"""Loads and warms a version of a model. Raises PipelineError."""

logger = get_logger("worker.residency")


@dataclass(slots=True)
class _Place:
    loading: threading.Lock = field(default_factory=threading.Lock)
    model: LoadedModel | None = None
    users: int = 0


class Residency:
    """budget_bytes: most bytes of engine memory held at once. A model in use is never dropped, so the
    budget may be passed for as long as more models are in use at once than fit."""

    def __init__(self, load: Load, budget_bytes: int) -> None:
        self._load = load
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
        """Take out idle models, least recently used first, until the rest fit."""
        held = sum(place.model.memory_bytes for place in self._places.values() if place.model)
        dropped: list[LoadedModel] = []
        for key, place in list(self._places.items()):
            if held <= self._budget_bytes:
                break
            if place.users == 0 and place.model is not None:
                held -= place.model.memory_bytes
                dropped.append(place.model)
                del self._places[key]
                logger.info("model_dropped", model=key[0], version=key[1])
        return dropped
