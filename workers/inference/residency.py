"""Models held in memory under a budget.

Room for a newcomer is made when its engines are at hand, before they are loaded, by the least recently used that may
go: none of the premium tier but for another of it, which somebody pays to have at hand; and none that came a moment
ago, or two models that take turns would be loaded for every batch. One that is in use goes when its runs end, and
takes no new ones until then. Where that makes no room, the newcomer is refused for now, and its jobs wait or find
another worker.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from infra.logs import get_logger
from pipelines.engines import DeviceOutOfMemory
from pipelines.model import LoadedModel
from schemas.errors import Transient

STAY_LOADS = 10
STAY_MOST_S = 60.0
"""A model stays so many times as long as it took to load, times the number of those that are held: so at most a
tenth of a worker's time goes into loads, but where these take so long that the limit applies."""

CLAIM_S = 60.0
"""How long it counts that a model was refused; its jobs ask more often than that."""

MEMORY_FULL = "engine_memory_full"

Key = tuple[str, int]

logger = get_logger("worker.residency")


class Wanted(NamedTuple):
    """A model that is to be loaded. memory_bytes: what it is expected to take. load: loads and warms it, and calls
    what it is given as soon as nothing can keep it from that but a lack of room; raises PipelineError."""

    memory_bytes: int
    premium: bool
    load: Callable[[Callable[[], None]], LoadedModel]


@dataclass(slots=True)
class _Place:
    """Of one model, from the first wish for it until it is closed. memory_bytes: expected, once it is loaded real.
    leaving: for those who came after it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    model: LoadedModel | None = None
    premium: bool = False
    memory_bytes: int = 0
    users: int = 0
    loading_since: float | None = None
    stays_until: float = 0.0
    leaving: bool = False


@dataclass(slots=True)
class _Claim:
    """Of a model that was refused. since, asked_at: for the first time and the last, on the monotonic clock."""

    premium: bool
    since: float
    asked_at: float = 0.0


class Residency:
    """want: looks a version up; raises PipelineError. budget_bytes: most bytes of engine memory of models that stay;
    those that leave may be held beside them until their runs end."""

    def __init__(
        self,
        want: Callable[[str, int], Wanted],
        budget_bytes: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._want = want
        self._budget_bytes = budget_bytes
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._places: OrderedDict[Key, _Place] = OrderedDict()
        self._claims: dict[Key, _Claim] = {}

    @contextmanager
    def use(self, name: str, version: int, *, displace: bool = True) -> Iterator[LoadedModel]:
        """The model, loaded if it was not; it stays for the length of the block. displace: others may leave for it.

        Raises PipelineError, and Transient("engine_memory_full") if models that have to stay leave it no room.
        """
        key = (name, version)
        place = self._enter(key)
        try:
            with place.lock:
                if place.model is None:
                    self._load(key, place, displace)
                model = place.model
            assert model is not None
            yield model
        finally:
            self._leave(key, place)

    def names(self) -> list[str]:
        """`name/version` of every model held that stays, the least recently used first."""
        with self._lock:
            return [
                _name(key)
                for key, place in self._places.items()
                if place.model and not place.leaving
            ]

    def loading(self) -> dict[str, float]:
        """`name/version` of what is being loaded, and since when, on the monotonic clock."""
        with self._lock:
            return {
                _name(key): place.loading_since
                for key, place in self._places.items()
                if place.loading_since is not None
            }

    @property
    def memory_bytes(self) -> int:
        with self._lock:
            return sum(place.memory_bytes for place in self._places.values() if place.model)

    def close(self) -> None:
        with self._lock:
            places, self._places = list(self._places.values()), OrderedDict()
        for place in places:
            _close(place)

    def _enter(self, key: Key) -> _Place:
        with self._lock:
            place = self._places.setdefault(key, _Place())
            if place.leaving:
                raise _no_room(key, "it is just leaving for another")
            self._places.move_to_end(key)
            place.users += 1
            return place

    def _leave(self, key: Key, place: _Place) -> None:
        with self._lock:
            place.users -= 1
            if place.model is None and place.users == 0:
                self._places.pop(key, None)
        self._close_idle()

    def _load(self, key: Key, place: _Place, displace: bool) -> None:
        began = self._monotonic()
        with self._lock:
            place.loading_since = began
        try:
            model = self._loaded(key, place, self._want(*key), displace)
        except BaseException:
            with self._lock:
                place.loading_since, place.memory_bytes = None, 0
            raise
        took_s = self._monotonic() - began
        with self._lock:
            self._claims.pop(key, None)
            place.loading_since = None
            place.model, place.memory_bytes = model, model.memory_bytes
            staying = sum(not other.leaving for other in self._places.values())
            stay_s = min(STAY_MOST_S, STAY_LOADS * took_s * staying)
            place.stays_until = began + took_s + stay_s
            self._displace(place, -self._room())  # where it is larger than expected
            over_bytes = -self._room()
        if over_bytes > 0:
            logger.warning("engine_memory_over_budget", model=_name(key), bytes=over_bytes)
        self._close_idle()

    def _loaded(self, key: Key, place: _Place, wanted: Wanted, displace: bool) -> LoadedModel:
        with self._lock:
            place.premium = wanted.premium
            self._expect_room(key, place, wanted, displace)  # before anything is fetched for it
        try:
            return wanted.load(partial(self._make_room, key, place, wanted, displace))
        except DeviceOutOfMemory:
            if wanted.memory_bytes > self._budget_bytes or self._is_alone(place):
                raise
            if displace:
                with self._lock:
                    self._displace(place, wanted.memory_bytes)
                self._close_idle()
            raise _no_room(key, "others fill the device") from None

    def _make_room(self, key: Key, place: _Place, wanted: Wanted, displace: bool) -> None:
        with self._lock:
            self._displace(place, self._expect_room(key, place, wanted, displace))
            if wanted.memory_bytes <= self._budget_bytes:
                place.memory_bytes = wanted.memory_bytes
        self._close_idle()

    def _expect_room(self, key: Key, place: _Place, wanted: Wanted, displace: bool) -> int:
        """How many bytes others have to leave."""
        short_bytes = wanted.memory_bytes - self._room()
        if wanted.memory_bytes > self._budget_bytes or short_bytes <= 0:
            return 0  # if it is too large, to load it says so
        if not displace:
            raise _no_room(key, "the budget is used up")
        if short_bytes > sum(other.memory_bytes for other in self._displaceable(place)):
            why = "those that are loaded are premium, or came a moment ago"
        elif self._is_claimed(key, place):
            why = "another model waits for longer"
        else:
            return short_bytes
        self._claim(key, place, wanted.memory_bytes)
        raise _no_room(key, why)

    def _claim(self, key: Key, place: _Place, memory_bytes: int) -> None:
        """Note that it was refused, if there can be room for it one day."""
        pinned = (other.memory_bytes for other in self._places.values() if other.premium)
        if place.premium or memory_bytes <= self._budget_bytes - sum(pinned):
            now = self._monotonic()
            claim = self._claims.setdefault(key, _Claim(place.premium, now))
            claim.asked_at = now

    def _is_claimed(self, key: Key, newcomer: _Place) -> bool:
        """Whether what can leave is kept for a model that has been refused for long, and for longer than this one:
        it may need more to leave at once than ever does while smaller ones take turns."""
        now = self._monotonic()
        self._claims = {
            who: claim for who, claim in self._claims.items() if now - claim.asked_at <= CLAIM_S
        }
        own = self._claims.get(key)
        before = min(own.since if own else now, now - STAY_MOST_S)
        return any(
            claim.since < before
            for claim in self._claims.values()
            if claim.premium or not newcomer.premium
        )

    def _is_alone(self, place: _Place) -> bool:
        """On the device, as far as this worker knows."""
        with self._lock:
            others = (other for other in self._places.values() if other is not place)
            return not any(other.model or other.loading_since is not None for other in others)

    def _room(self) -> int:
        """Bytes of the budget that nobody has who stays."""
        return self._budget_bytes - sum(
            place.memory_bytes for place in self._places.values() if not place.leaving
        )

    def _displaceable(self, newcomer: _Place) -> list[_Place]:
        """The first is to leave first."""
        places = [place for place in self._places.values() if self._gives_way(place, newcomer)]
        return sorted(places, key=lambda place: place.premium)

    def _gives_way(self, place: _Place, newcomer: _Place) -> bool:
        if place.model is None or place.leaving or place is newcomer:
            return False
        if place.premium != newcomer.premium:
            return newcomer.premium
        return place.stays_until <= self._monotonic()

    def _displace(self, newcomer: _Place, short_bytes: int) -> None:
        """Have so many bytes leave, or all that may."""
        for place in self._displaceable(newcomer):
            if short_bytes <= 0:
                break
            place.leaving = True
            short_bytes -= place.memory_bytes

    def _close_idle(self) -> None:
        """Close what leaves and is not in use."""
        with self._lock:
            idle = {
                k: place for k, place in self._places.items() if place.leaving and not place.users
            }
            for key in idle:
                del self._places[key]
        for key, place in idle.items():
            logger.info("model_dropped", model=_name(key))
            _close(place)


def _close(place: _Place) -> None:
    """Whatever comes of it is no matter of the batch that happens to be the last."""
    try:
        if place.model:
            place.model.close()
    except Exception as error:
        logger.error("model_not_closed", exc_info=error)


def _name(key: Key) -> str:
    return f"{key[0]}/{key[1]}"


def _no_room(key: Key, why: str) -> Transient:
    return Transient(
        MEMORY_FULL,
        f"Expected room for the engines of {_name(key)}, there is none now: {why}; where it stays so,"
        " raise HEADRACE_WORKER__MEMORY_BYTES, or add a worker.",
    )
