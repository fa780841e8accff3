"""Which models are installed: the registry's read side. The dispatcher resolves each job's model
here when it admits it, a worker finds the bundle's files here when it loads it.

    models/<name>/<version>/card.json      written last: with it the version exists
    models/<name>/<version>/<digest>/...   the bundle's files; under one digest they never change
"""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from infra.logs import get_logger
from infra.objects import ObjectInfo, ObjectStore
from schemas.errors import InferenceFailed, InvalidJob, InvalidModel, PipelineError, Transient
from schemas.models import ModelCard

MODELS = "models"
CARD_LIMIT_BYTES = 1024 * 1024

REFRESH_S = 1.0
"""How long a change to a known model may go unseen."""

REFRESH_UNKNOWN_S = 0.05
"""How long a new model may go unseen: jobs for it are refused for good, so almost not at all."""

_CARD = re.compile(rf"{MODELS}/[^/]+/[0-9]+/card\.json")
_LISTED = 20
_decode = msgspec.json.Decoder(ModelCard).decode

log = get_logger("catalogue")


def version_folder(name: str, version: int) -> str:
    return f"{MODELS}/{name}/{version}"


def card_key(name: str, version: int) -> str:
    return f"{version_folder(name, version)}/card.json"


def files_folder(name: str, version: int, digest: str) -> str:
    return f"{version_folder(name, version)}/{digest}"


def read_card(objects: ObjectStore, key: str) -> ModelCard:
    """Raises InvalidJob (object_missing), InvalidModel (card_unreadable) and Transient."""
    try:
        return _decode(objects.get(key, max_bytes=CARD_LIMIT_BYTES))
    except msgspec.MsgspecError as error:
        raise InvalidModel(
            "card_unreadable",
            f"Object {key}: expected a model's card, found otherwise: {error};"
            " delete it from the object store and add the model again.",
        ) from error


class Catalogue:
    """A view of the installed models that is at most REFRESH_S old.

    When the store is unavailable the models known so far go on being served.
    """

    def __init__(self, objects: ObjectStore, clock: Callable[[], float] = time.monotonic) -> None:
        self._objects = objects
        self._clock = clock
        self._checked_at = float("-inf")
        self._unavailable: Transient | None = None
        self._cards: dict[ObjectInfo, ModelCard | None] = {}
        self._index: dict[tuple[str, int | None], ModelCard] = {}

    def cards(self) -> list[ModelCard]:
        """All installed versions, by name and version. Raises Transient."""
        self._refresh(REFRESH_S)
        if self._unavailable:
            raise self._unavailable
        installed = [card for (_, version), card in self._index.items() if version is not None]
        return sorted(installed, key=lambda card: (card.name, card.version))

    def resolve(self, name: str, version: int | None = None) -> ModelCard:
        """The card of this version, or of the highest one. Called once per job: a dict look-up.

        Raises InvalidJob (model_unknown, version_unknown) saying what there is, and Transient if
        the store cannot be asked about a model that is not known yet.
        """
        card = self._look_up(name, version, REFRESH_S)
        card = card or self._look_up(name, version, REFRESH_UNKNOWN_S)
        if card is None:
            raise self._unavailable or self._unknown(name, version)
        return card

    def folder(self, card: ModelCard) -> Path:
        """A local folder with the bundle's files, complete. Read-only.

        Raises InferenceFailed (model_removed) and Transient.
        """
        folder = files_folder(card.name, card.version, card.digest)
        try:
            for info in self._objects.list(folder):
                self._objects.local(info.key)
            return self._objects.local(f"{folder}/model.yaml").parent
        except InvalidJob as error:
            raise InferenceFailed(
                "model_removed",
                f"Model {card.name} version {card.version} was removed while jobs for it were"
                " waiting; add it again, or submit them to an installed version.",
            ) from error

    def _look_up(self, name: str, version: int | None, max_age_s: float) -> ModelCard | None:
        self._refresh(max_age_s)
        return self._index.get((name, version))

    def _refresh(self, max_age_s: float) -> None:
        if self._clock() - self._checked_at < max_age_s:
            return
        try:
            self._cards = dict(self._read())
            self._index = _index(self._cards.values())
            self._unavailable = None
        except Transient as error:
            self._unavailable = error
        # Counted from the end: a store that answers slowly is not asked all the time.
        self._checked_at = self._clock()

    def _read(self) -> Iterator[tuple[ObjectInfo, ModelCard | None]]:
        """Every card that is listed; those seen before are not read again."""
        for info in self._objects.list(MODELS):
            if info in self._cards:
                yield info, self._cards[info]
            elif _CARD.fullmatch(info.key):
                # A version may be removed between listing and reading.
                with suppress(InvalidJob):
                    yield info, self._card(info.key)

    def _card(self, key: str) -> ModelCard | None:
        """None if it is damaged: one bad card must not hide the other models."""
        try:
            return read_card(self._objects, key)
        except InvalidModel as error:
            log.warning("card_unreadable", key=key, error=error.message)
            return None

    def _unknown(self, name: str, version: int | None) -> PipelineError:
        versions = sorted(v for n, v in self._index if n == name and v is not None)
        if versions:
            return InvalidJob(
                "version_unknown",
                f"Model {name}: no version {version} is installed; there are"
                f" {_some(versions)}. Name one of them, or none for the newest.",
            )
        names = sorted({n for n, _ in self._index})
        close = difflib.get_close_matches(name[:80], names)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        return InvalidJob(
            "model_unknown",
            f"No model {name[:80]!r} is installed.{hint} Installed: {_some(names) or 'none'};"
            " `headrace models add` installs another.",
        )


def _index(cards: Iterable[ModelCard | None]) -> dict[tuple[str, int | None], ModelCard]:
    """Cards by name and version; by name and None the highest version."""
    index: dict[tuple[str, int | None], ModelCard] = {}
    for card in sorted(filter(None, cards), key=lambda card: card.version):
        index[card.name, card.version] = index[card.name, None] = card
    return index


def _some(values: Sequence[object]) -> str:
    more = [f"and {len(values) - _LISTED} more"] if len(values) > _LISTED else []
    return ", ".join([*map(str, values[:_LISTED]), *more])
