"""Which model version's engines to see to next. It keeps no record: what is there, the cache tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infra.logs import get_logger
from schemas.errors import PipelineError, Transient
from schemas.models import ModelCard

TROUBLE_S = 30.0
"""How long to leave a version alone that something kept from being built which may pass."""

SHARE_EVERY_S = 60.0
"""So often the object store is asked whether it still has a version's engines, by one small request for each."""

SeeBuilt = Callable[[ModelCard], Sequence[str]]
"""Sees that the cache has a version's engines, which may take long. Returns their keys. Raises PipelineError."""

logger = get_logger("builder")


@dataclass(slots=True)
class _Seen:
    """What came of a version the last time. not_before: to see to it again, share_at: to look whether its engines
    are still shared; on the monotonic clock. code: how it failed."""

    keys: Sequence[str] = ()
    not_before: float = 0.0
    share_at: float = 0.0
    code: str | None = None


class Builder:
    """cards: what is installed; may raise Transient. holds: whether the cache still has an engine, whole.
    share: copies an engine of this machine to the object store, if that lacks it; may raise PipelineError.
    again_s: how long to leave a version alone that failed, or was built a second time: in a cache too small
    for all engines, each would put another out without end. TROUBLE_S at least."""

    def __init__(
        self,
        cards: Callable[[], Sequence[ModelCard]],
        see_built: SeeBuilt,
        holds: Callable[[str], bool],
        share: Callable[[str], object],
        again_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cards = cards
        self._see_built = see_built
        self._holds = holds
        self._share = share
        self._again_s = max(again_s, TROUBLE_S)
        self._monotonic = monotonic
        self._seen: dict[tuple[str, int, str], _Seen] = {}

    def step(self) -> bool:
        """See to one version, that which was added last first. False if all are as well as they can be now."""
        cards = sorted(self._cards(), key=lambda card: card.added_at, reverse=True)
        seen = {(card.name, card.version, card.digest): card for card in cards}
        self._seen = {which: self._seen.get(which, _Seen()) for which in seen}
        for known in self._seen.values():
            self._keep_shared(known)
        for which, card in seen.items():
            if self._is_due(self._seen[which]):
                self._seen[which] = self._see_to(card, self._seen[which])
                return True
        return False

    def _is_due(self, seen: _Seen) -> bool:
        if self._monotonic() < seen.not_before:
            return False
        return not seen.keys or not all(map(self._holds, seen.keys))

    def _see_to(self, card: ModelCard, last: _Seen) -> _Seen:
        """A version that cannot be built must not keep the others from it, so no error gets out of here."""
        model = f"{card.name}/{card.version}"
        began = self._monotonic()
        try:
            keys = self._see_built(card)
        except PipelineError as error:
            pause_s = TROUBLE_S if isinstance(error, Transient) else self._again_s
            code = error.code
            if code != last.code:
                logger.error("build_failed", model=model, code=code, error=error.message)
        except Exception:
            pause_s, code = self._again_s, "bug"
            if code != last.code:
                logger.exception("build_failed", model=model, code=code)
        else:
            logger.info("version_ready", model=model, seconds=round(self._monotonic() - began, 3))
            now = self._monotonic()
            return _Seen(keys, now + self._again_s if last.keys else 0.0, now + SHARE_EVERY_S)
        return _Seen(not_before=self._monotonic() + pause_s, code=code)

    def _keep_shared(self, seen: _Seen) -> None:
        """The object store may have lost what was there: pruned too early, or withdrawn as damaged."""
        if not seen.keys or self._monotonic() < seen.share_at:
            return
        seen.share_at = self._monotonic() + SHARE_EVERY_S
        try:
            for key in seen.keys:
                self._share(key)
        except PipelineError as error:
            logger.warning("not_shared", code=error.code, error=error.message)
