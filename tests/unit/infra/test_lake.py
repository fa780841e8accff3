"""The read side of the lake, where pyarrow is missing and where the lake is empty or harmed."""

from __future__ import annotations

import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from infra.lake import find_in_lake, lake_files, locate, read_rows, rows_key, tenant_of
from infra.lake_index import bucket_key, day_folder
from infra.objects.files import FileObjects
from schemas.errors import PipelineError

DAY = date(2026, 1, 1)


@pytest.fixture
def objects(tmp_path: Path) -> FileObjects:
    return FileObjects(tmp_path)


@pytest.fixture
def no_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.compute"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "infra.lake_rows", raising=False)


def test_a_client_that_never_asks_the_lake_imports_no_pyarrow() -> None:
    script = "import sys, producers.client, infra.lake, headrace.cli.lake; assert 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("no_pyarrow")
def test_without_a_lake_nobody_needs_pyarrow(objects: FileObjects) -> None:
    assert find_in_lake(objects, "a", 3) is None


@pytest.mark.usefixtures("no_pyarrow")
def test_with_a_lake_what_is_missing_is_named(objects: FileObjects) -> None:
    objects.put(bucket_key(f"{day_folder(DAY)}/run", 0, 0), b"")
    with pytest.raises(PipelineError, match=r"pip install 'headrace\[lake\]'") as caught:
        find_in_lake(objects, "a", 3)
    assert caught.value.code == "extra_missing"


def test_other_peoples_objects_in_the_lake_are_left_alone(objects: FileObjects) -> None:
    mine = rows_key("acme", "speech", DAY, "0-1-2-abcd")
    others = [
        "lake/README",
        "lake/tenant=acme/model=speech/notes.txt",
        "lake/tenant=acme/model=speech/date=2026-01-01/x.csv",
        "lake/_index/date=2026-01-01/x",
    ]
    for key in (mine, *others):
        objects.put(key, b"x")
    (found,) = lake_files(objects)
    assert (found.key, found.tenant, found.model, found.date) == (mine, "acme", "speech", DAY)
    assert [file.key for file in lake_files(objects, "acme")] == [mine]
    assert list(lake_files(objects, "acm")) == []
    assert tenant_of(mine) == "acme"
    assert locate(objects, "a") == set()


def test_what_is_no_parquet_is_named(objects: FileObjects) -> None:
    rows = rows_key("acme", "speech", DAY, "0-1-2-abcd")
    bucket = bucket_key(f"{day_folder(DAY)}/run", 0, 0)
    for harm in (b"", b"PAR1 harmed PAR1", b"x" * 100):
        for key in (rows, bucket):
            objects.put(key, harm)
        with pytest.raises(PipelineError, match=rows) as caught:
            read_rows(objects, rows)
        assert caught.value.code == "lake_corrupt"
        with pytest.raises(PipelineError, match=bucket):
            find_in_lake(objects, "a", 3)


def test_half_a_run_does_not_count(objects: FileObjects) -> None:
    objects.put(bucket_key(f"{day_folder(DAY)}/run", 1, 0), b"no Parquet")
    assert locate(objects, "a") == set()
