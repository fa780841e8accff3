"""Puts models where workers find them: the registry's write side; `infra/catalogue.py` reads it.

A model is installed only after it has answered here, and is there when its card is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from infra.catalogue import Catalogue, card_key, files_folder, read_card, version_folder
from infra.objects import ObjectExists, ObjectStore, check_key
from pipelines.bundle import Bundle
from pipelines.engines import Engines
from pipelines.load import load_model
from pipelines.validate import check
from schemas.errors import InvalidJob, InvalidModel, PipelineError
from schemas.models import ModelCard

Stage = Literal["validate", "build", "check", "install"]


class Added(NamedTuple):
    """new: False if this very version was installed already, and nothing was done."""

    card: ModelCard
    new: bool


def add(
    folder: Path,
    objects: ObjectStore,
    engines: Engines,
    *,
    budget_bytes: int,
    on_stage: Callable[[Stage], None] = lambda stage: None,
) -> Added:
    """Validate a bundle, build its engines, let it answer its sample, install it.

    The engines stay in the cache, so a worker on this machine loads them without a build.
    budget_bytes: what a worker may hold in engines (`WorkerSettings.memory_bytes`).
    on_stage: called as each stage begins. Raises InvalidModel, and Transient (no room, no store).
    """
    on_stage("validate")
    bundle = Bundle.open(folder)
    _check_file_names(bundle)
    if card := _installed(bundle, objects):
        return Added(card, new=False)
    on_stage("build")
    # The user asks, so what failed to compile a moment ago is tried again.
    with closing(load_model(bundle, engines, budget_bytes=budget_bytes, force=True)) as model:
        on_stage("check")
        check(model)
        memory_bytes = model.memory_bytes
    on_stage("install")
    return _install(bundle, objects, memory_bytes)


def removable(
    name: str, version: int | None, objects: ObjectStore, *, force: bool = False
) -> ModelCard:
    """The card of the version that is meant; None stands for the only one.

    Raises InvalidJob if there is no such version, and InvalidModel if it has to be named, or is the
    last of its model and force is not given.
    """
    catalogue = Catalogue(objects)
    card = catalogue.resolve(name, version)
    versions = [other.version for other in catalogue.cards() if other.name == name]
    if version is None and len(versions) > 1:
        raise InvalidModel(
            "version_missing", f"Model {name} has the versions {versions}; say which one is meant."
        )
    if len(versions) == 1 and not force:
        raise InvalidModel(
            "version_last",
            f"Version {card.version} is the last of model {name}: every further job for it would be"
            " refused. Add another version first, or force it.",
        )
    return card


def remove(card: ModelCard, objects: ObjectStore) -> None:
    """Uninstall a version. Jobs that wait for it fail (version_unknown, model_removed), but for
    those that reach a worker which has it loaded."""
    objects.delete(card_key(card.name, card.version))
    _delete_folder(version_folder(card.name, card.version), objects)


def _check_file_names(bundle: Bundle) -> None:
    for name, key in _keys(bundle).items():
        try:
            check_key(key)
        except InvalidJob as error:
            raise InvalidModel(
                "model_file_name",
                f"{name!r} in {bundle.folder} cannot be stored by this name; rename it."
                f" {error.message}",
            ) from error


def _installed(bundle: Bundle, objects: ObjectStore) -> ModelCard | None:
    """The card of this version if it has this content. Raises InvalidModel if it has another."""
    config = bundle.config
    try:
        card = read_card(objects, card_key(config.name, config.version))
    except InvalidJob:
        return None
    if card.digest == bundle.digest:
        return card
    raise InvalidModel(
        "version_exists",
        f"{bundle.where('$.version')}: {config.name} version {config.version} is installed already"
        " with other content; raise `version`.",
    )


def _install(bundle: Bundle, objects: ObjectStore, memory_bytes: int) -> Added:
    card = _card(bundle, memory_bytes)
    try:
        _copy(card, bundle, objects)
        return _publish(card, bundle, objects)
    except BaseException:
        _discard(card, objects)
        raise


def _card(bundle: Bundle, memory_bytes: int) -> ModelCard:
    config = bundle.config
    return ModelCard(
        name=config.name,
        version=config.version,
        modality=config.modality,
        tier=config.tier,
        description=config.description,
        batch=config.batch,
        limits=config.limits,
        digest=bundle.digest,
        size_bytes=bundle.size_bytes,
        added_at=time.time(),
        memory_bytes=memory_bytes,
    )


def _copy(card: ModelCard, bundle: Bundle, objects: ObjectStore) -> None:
    """Raises InvalidModel if the copy is not what was checked."""
    for name, key in _keys(bundle).items():
        objects.put(key, bundle.path(name))
    copy = Bundle.open(Catalogue(objects).folder(card), check_graphs=False)
    if copy.digest != card.digest:
        raise InvalidModel(
            "model_changed", f"{bundle.folder}: changed while it was being added; add it again."
        )


def _publish(card: ModelCard, bundle: Bundle, objects: ObjectStore) -> Added:
    """Of several who add the same version one wins; others have added the same, or are refused."""
    try:
        objects.put(card_key(card.name, card.version), msgspec.json.encode(card), if_absent=True)
    except ObjectExists:
        return Added(_installed(bundle, objects) or card, new=False)
    return Added(card, new=True)


def _discard(card: ModelCard, objects: ObjectStore) -> None:
    """Delete what was copied, unless somebody else has installed the same content meanwhile."""
    with suppress(PipelineError):
        try:
            kept = read_card(objects, card_key(card.name, card.version)).digest
        except InvalidJob:
            kept = None
        if kept != card.digest:
            _delete_folder(files_folder(card.name, card.version, card.digest), objects)


def _keys(bundle: Bundle) -> dict[str, str]:
    """Where each file of the bundle goes, by its name."""
    folder = files_folder(bundle.config.name, bundle.config.version, bundle.digest)
    return {name: f"{folder}/{name}" for name in bundle.files()}


def _delete_folder(folder: str, objects: ObjectStore) -> None:
    for info in list(objects.list(folder)):
        objects.delete(info.key)
