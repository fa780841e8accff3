"""A worker's models: warmed up at its start, kept current beside the jobs, loaded when a job wants one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from infra.catalogue import Catalogue
from infra.logs import get_logger
from infra.settings import WorkerSettings
from pipelines.bundle import Bundle
from pipelines.engines import Engines
from pipelines.load import load_model
from pipelines.model import LoadedModel
from schemas.errors import DEVICE_FAILED, PipelineError, Transient
from schemas.models import ModelCard
from workers.inference.load_marks import LoadMarks
from workers.inference.residency import MEMORY_FULL, Residency, Wanted
from workers.inference.start import Steps

TOOK_DOWN = "its last load took the process down, so that is left to the jobs that want it"
LOOK_EVERY_S = 5.0
"""How often to look for newer versions of what is loaded."""

logger = get_logger("worker.models")


class Models:
    """resident: what is loaded now, and how jobs come by it. on_device_failed: called when a load that no job
    asked for finds the device gone."""

    def __init__(
        self,
        options: WorkerSettings,
        catalogue: Catalogue,
        engines: Engines,
        on_device_failed: Callable[[], None],
    ) -> None:
        self._options = options
        self._catalogue = catalogue
        self._engines = engines
        self._on_device_failed = on_device_failed
        self._start: Steps | None = None
        self._marks = LoadMarks(engines.cache.root / "loads")
        self._unloadable = self._marks.left()
        self._not_loaded: set[str] = set()
        self.resident = Residency(self._wanted, options.memory_bytes)

    def warm_up(self, start: Steps) -> None:
        """Load the models named in the settings, or the newest version of each that the budget has room for.

        start: gets the steps of each. Raises Transient("device_failed"), and if the catalogue cannot be read.
        """
        self._start = start
        names = self._options.models or self._by_worth()
        start.ended("catalogue")
        for name in names:
            try:
                card = self._catalogue.resolve(name, None)
                if (model := f"{card.name}/{card.version}") in self._unloadable:
                    logger.error("model_left_out", model=model, reason=TOOK_DOWN)
                    continue
                with self.resident.use(card.name, card.version, displace=False):
                    pass
            except Transient as error:
                if error.code == DEVICE_FAILED:
                    raise
                if error.code == MEMORY_FULL:
                    logger.warning("model_left_out", model=name, reason=error.message)
                    continue
                self._not_loaded.add(name)
                _log_failure(name, error)
                start.ended(f"{name} not loaded")
            except Exception as error:
                _log_failure(name, error)
                start.ended(f"{name} not loaded")
        self._start = None

    def keep_current_until(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_EVERY_S):
            self.keep_current()

    def keep_current(self) -> None:
        """Load newer versions of what is loaded beside it, and what was not to be had at the start, so that jobs
        for them find them warm. One that does not load, or that others would have to leave for, is left to the jobs
        that want it."""
        held = self.resident.names()
        for name in sorted({model.partition("/")[0] for model in held} | self._not_loaded):
            try:
                card = self._catalogue.resolve(name, None)
            except PipelineError:  # removed, or not to be had now
                continue
            model = f"{name}/{card.version}"
            if model in {*held, *self._unloadable} or self._load_beside(card, model):
                self._not_loaded.discard(name)

    def _load_beside(self, card: ModelCard, model: str) -> bool:
        """False if that may be tried again."""
        try:
            with self.resident.use(card.name, card.version, displace=False):
                logger.info("version_ready", model=model)
        except Transient as error:
            if error.code == DEVICE_FAILED:
                self._on_device_failed()
            return False
        except Exception as error:
            self._unloadable.add(model)
            _log_failure(model, error)
        return True

    def _by_worth(self) -> list[str]:
        """All that are installed, those of the premium tier first."""
        premium = {card.name: card.tier == "premium" for card in self._catalogue.cards()}
        return sorted(premium, key=lambda name: (not premium[name], name))

    def _wanted(self, name: str, version: int) -> Wanted:
        card = self._catalogue.resolve(name, version)
        expected_bytes = card.memory_bytes or card.size_bytes
        return Wanted(expected_bytes, card.tier == "premium", partial(self._load, card))

    def _load(self, card: ModelCard, make_room: Callable[[], None]) -> LoadedModel:
        """Fetch, load and warm one version. Raises PipelineError."""
        model = f"{card.name}/{card.version}"
        with self._marks.loading(model):
            return self._load_marked(card, Steps(model, quiet=self._start is None), make_room)

    def _load_marked(
        self, card: ModelCard, steps: Steps, make_room: Callable[[], None]
    ) -> LoadedModel:
        bundle = Bundle.open(self._catalogue.folder(card), check_graphs=False)
        steps.ended("fetch")
        model = load_model(
            bundle,
            self._engines,
            budget_bytes=self._options.memory_bytes,
            may_build=False,
            make_room=make_room,
            on_step=steps.ended,
        )
        try:
            model.warm(steps.ended)
        except BaseException:
            model.close()
            raise
        logger.info(
            "model_loaded",
            model=steps.model,
            seconds=steps.total_s,
            steps=list(steps.seconds.items()),
            memory_bytes=model.memory_bytes,
        )
        if self._start:
            self._start.include(steps)
        return model


def _log_failure(model: str, error: Exception) -> None:
    if isinstance(error, PipelineError):
        logger.error("model_not_loaded", model=model, code=error.code, error=error.message)
    else:  # a bug, perhaps in a step of the bundle's own
        logger.error("model_not_loaded", model=model, exc_info=error)
