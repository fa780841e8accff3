from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from infra.catalogue import (
    REFRESH_S,
    REFRESH_UNKNOWN_S,
    Catalogue,
    card_key,
    files_folder,
)
from infra.objects import ObjectInfo
from infra.objects.files import FileObjects
from schemas.errors import InferenceFailed, InvalidJob, Transient
from schemas.models import BatchConfig, Limits, ModelCard


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class WatchedObjects(FileObjects):
    """Counts what is asked of it; may be down."""

    lists = gets = 0
    down = False

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        self.lists += 1
        if self.down:
            raise Transient("storage_unavailable", "down")
        return super().list(folder)

    def get(self, key: str, *, max_bytes: int) -> bytes:
        self.gets += 1
        return super().get(key, max_bytes=max_bytes)


@pytest.fixture
def objects(tmp_path: Path) -> WatchedObjects:
    return WatchedObjects(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def catalogue(objects: WatchedObjects, clock: Clock) -> Catalogue:
    return Catalogue(objects, clock)


def install(objects: FileObjects, name: str, version: int, digest: str = "d1g35t") -> ModelCard:
    card = ModelCard(
        name=name,
        version=version,
        modality="text",
        tier="standard",
        description="",
        batch=BatchConfig(),
        limits=Limits(),
        digest=digest,
        size_bytes=1,
        added_at=0.0,
    )
    objects.put(f"{files_folder(name, version, digest)}/model.yaml", b"name: x")
    objects.put(card_key(name, version), msgspec.json.encode(card))
    return card


def code_of(error: pytest.ExceptionInfo[InvalidJob]) -> str:
    return error.value.code


def test_resolves_a_version_or_the_highest(objects: WatchedObjects, catalogue: Catalogue) -> None:
    cards = {version: install(objects, "cats", version) for version in (2, 10, 9)}
    install(objects, "cats-and-dogs", 11)
    assert catalogue.resolve("cats", 9) == cards[9]
    assert catalogue.resolve("cats") == catalogue.resolve("cats", 10) == cards[10]
    assert [(card.name, card.version) for card in catalogue.cards()] == [
        ("cats", 2),
        ("cats", 9),
        ("cats", 10),
        ("cats-and-dogs", 11),
    ]


def test_an_unknown_name_is_refused_with_what_there_is(
    objects: WatchedObjects, catalogue: Catalogue
) -> None:
    install(objects, "efficientnet-lite0", 1)
    install(objects, "whisper", 1)
    with pytest.raises(InvalidJob, match="Did you mean efficientnet-lite0") as caught:
        catalogue.resolve("eficientnet-lite0")
    assert code_of(caught) == "model_unknown"
    assert "Installed: efficientnet-lite0, whisper;" in caught.value.message


def test_an_empty_catalogue_says_so(catalogue: Catalogue) -> None:
    assert catalogue.cards() == []
    with pytest.raises(InvalidJob, match="Installed: none; `headrace models add`"):
        catalogue.resolve("cats")


@pytest.mark.parametrize("name", ["", "../../etc", "cats/1", "c\0", "\ud800", "x" * 1_000_000])
def test_hostile_names_are_unknown(
    objects: WatchedObjects, catalogue: Catalogue, name: str
) -> None:
    install(objects, "cats", 1)
    with pytest.raises(InvalidJob) as caught:
        catalogue.resolve(name)
    assert code_of(caught) == "model_unknown"
    assert len(caught.value.message) < 1000
    caught.value.message.encode()


def test_a_long_list_is_cut(objects: WatchedObjects, catalogue: Catalogue) -> None:
    for number in range(25):
        install(objects, f"model-{number:02}", 1)
    with pytest.raises(InvalidJob, match="model-19, and 5 more;"):
        catalogue.resolve("zebra")


def test_an_unknown_version_is_refused_with_those_installed(
    objects: WatchedObjects, catalogue: Catalogue
) -> None:
    for version in (1, 10, 2):
        install(objects, "cats", version)
    with pytest.raises(InvalidJob, match="no version 3 is installed; there are 1, 2, 10") as caught:
        catalogue.resolve("cats", 3)
    assert code_of(caught) == "version_unknown"


def test_the_store_is_asked_once_in_a_while(
    objects: WatchedObjects, catalogue: Catalogue, clock: Clock
) -> None:
    old = install(objects, "cats", 1)
    catalogue.resolve("cats")
    new = install(objects, "cats", 2)
    clock.now += REFRESH_S / 2
    assert [catalogue.resolve("cats") for _ in range(100)] == [old] * 100
    assert (objects.lists, objects.gets) == (1, 1)
    clock.now += REFRESH_S / 2
    assert [catalogue.resolve("cats") for _ in range(100)] == [new] * 100
    assert (objects.lists, objects.gets) == (2, 2)


def test_a_new_name_is_seen_at_once_and_a_flood_of_wrong_names_does_not_flood_the_store(
    objects: WatchedObjects, catalogue: Catalogue, clock: Clock
) -> None:
    install(objects, "cats", 1)
    catalogue.resolve("cats")
    clock.now += REFRESH_UNKNOWN_S
    dogs = install(objects, "dogs", 1)
    assert catalogue.resolve("dogs") == dogs
    for _ in range(100):
        with pytest.raises(InvalidJob):
            catalogue.resolve("birds")
    assert objects.lists == 2


def test_a_version_removed_and_added_anew_is_read_anew(
    objects: WatchedObjects, catalogue: Catalogue, clock: Clock
) -> None:
    install(objects, "cats", 1, digest="old")
    catalogue.resolve("cats")
    objects.delete(card_key("cats", 1))
    clock.now += REFRESH_S
    with pytest.raises(InvalidJob):
        catalogue.resolve("cats")
    install(objects, "cats", 1, digest="new")
    clock.now += REFRESH_S
    assert catalogue.resolve("cats").digest == "new"


def test_known_models_are_served_while_the_store_is_down_and_unknown_ones_may_come_back(
    objects: WatchedObjects, catalogue: Catalogue, clock: Clock
) -> None:
    card = install(objects, "cats", 1)
    catalogue.resolve("cats")
    objects.down = True
    clock.now += REFRESH_S
    assert catalogue.resolve("cats") == card
    with pytest.raises(Transient):
        catalogue.resolve("dogs")
    with pytest.raises(Transient):
        catalogue.cards()
    objects.down = False
    clock.now += REFRESH_S
    with pytest.raises(InvalidJob):
        catalogue.resolve("dogs")


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "bad"}', b"\xff", bytes(2_000_000)])
def test_a_damaged_card_hides_no_other_model(
    objects: WatchedObjects, catalogue: Catalogue, content: bytes
) -> None:
    card = install(objects, "cats", 1)
    objects.put(card_key("bad", 1), content)
    assert catalogue.cards() == [card]


def test_files_without_a_card_are_no_model(objects: WatchedObjects, catalogue: Catalogue) -> None:
    folder = files_folder("cats", 1, "d1g35t")
    objects.put(f"{folder}/model.yaml", b"name: cats")
    objects.put(f"{folder}/card.json", b"{}")
    objects.put("models/card.json", b"{}")
    assert catalogue.cards() == []


def test_the_folder_of_a_card_holds_its_files(
    objects: WatchedObjects, catalogue: Catalogue
) -> None:
    card = install(objects, "cats", 1)
    objects.put(f"{files_folder('cats', 1, card.digest)}/weights/0.bin", b"weights")
    folder = catalogue.folder(card)
    assert (folder / "model.yaml").read_bytes() == b"name: x"
    assert (folder / "weights" / "0.bin").read_bytes() == b"weights"


def test_the_folder_of_a_removed_version(objects: WatchedObjects, catalogue: Catalogue) -> None:
    card = install(objects, "cats", 1)
    for info in list(objects.list()):
        objects.delete(info.key)
    with pytest.raises(InferenceFailed, match="cats version 1 was removed") as caught:
        catalogue.folder(card)
    assert caught.value.code == "model_removed"
