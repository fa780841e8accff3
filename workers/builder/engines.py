"""The engines of installed models, in this machine's cache."""

from __future__ import annotations

from infra.catalogue import Catalogue
from infra.objects import ObjectStore
from infra.settings import Settings
from pipelines.build import engines_of, see_built
from pipelines.bundle import Bundle
from pipelines.engines import open_engines
from pipelines.engines.manifest import Rejected, check
from pipelines.engines.reach import StoreUnavailable
from schemas.models import ModelCard


class InstalledEngines:
    """Raises PipelineError (settings_invalid) if the keys to sign with are not as they should be."""

    def __init__(self, settings: Settings, objects: ObjectStore, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._engines = open_engines(settings, objects)

    def see_built(self, card: ModelCard) -> list[str]:
        """See that they are here, and in the object store if they are shared. Returns their keys.

        Raises InvalidModel, PipelineError, and Transient from cache and store.
        """
        bundle = Bundle.open(self._catalogue.folder(card), check_graphs=False)
        cached = [see_built(engine, self._engines) for engine in engines_of(bundle)]
        if fault := next(filter(None, (one.store_fault for one in cached)), None):
            raise StoreUnavailable(
                "engine_store_unavailable",
                f"Expected to share the engines of {card.name}/{card.version} through the object store,"
                f" they are on this machine alone: {fault}",
            )
        return [one.trace.key for one in cached]

    def holds(self, key: str) -> bool:
        """Whether a worker on this machine would be served the engine. It does not count as a use."""
        cache = self._engines.cache
        try:
            check(cache.disk.entry(key), key, cache.keyring)
        except Rejected:
            return False
        return True
