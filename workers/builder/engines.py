"""The engines of installed models, in this machine's cache."""

from __future__ import annotations

from collections.abc import Callable

from infra.catalogue import Catalogue
from infra.logs import get_logger
from infra.objects import ObjectStore
from infra.settings import Settings
from pipelines.build import engines_of, see_built
from pipelines.bundle import Bundle
from pipelines.engines import open_engines
from pipelines.engines.manifest import Rejected, check
from pipelines.engines.reach import StoreUnavailable
from schemas.models import ModelCard

logger = get_logger("builder")


class InstalledEngines:
    """progress: called before each engine. Raises PipelineError (settings_invalid) if the keys to sign with
    are not as they should be."""

    def __init__(
        self,
        settings: Settings,
        objects: ObjectStore,
        catalogue: Catalogue,
        progress: Callable[[], None],
    ) -> None:
        self._catalogue = catalogue
        self._progress = progress
        self._engines = open_engines(settings, objects)

    def see_built(self, card: ModelCard) -> list[str]:
        """See that they are here, and in the object store if they are shared. Returns their keys.

        Raises InvalidModel, PipelineError, and Transient from cache and store.
        """
        bundle = Bundle.open(self._catalogue.folder(card), check_graphs=False)
        cached = []
        for engine in engines_of(bundle):
            self._progress()
            cached.append(see_built(engine, self._engines))
        if fault := next(filter(None, (one.store_fault for one in cached)), None):
            raise StoreUnavailable(
                "engine_store_unavailable",
                f"Expected to share the engines of {card.name}/{card.version} through the object store,"
                f" they are on this machine alone: {fault}",
            )
        return [one.trace.key for one in cached]

    def share(self, key: str) -> None:
        """Copy it to the object store, if engines are shared and that lacks it. Raises Transient."""
        self._progress()
        if self._engines.cache.share(key):
            logger.info("engine_shared", key=key)

    def holds(self, key: str) -> bool:
        """Whether a worker on this machine would be served the engine. It does not count as a use."""
        cache = self._engines.cache
        try:
            check(cache.disk.entry(key), key, cache.keyring)
        except Rejected:
            return False
        return True
