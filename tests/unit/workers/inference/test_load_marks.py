"""Loads that took their process down are known to the next one, those that go on or ended are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.inference.load_marks import LoadMarks

DIES = """
import os, sys
from pathlib import Path
from workers.inference.load_marks import LoadMarks
with LoadMarks(Path(sys.argv[1])).loading("bad/2"):
    os._exit(11)
"""


def test_a_load_that_took_its_process_down_is_known_until_one_ends_well(tmp_path: Path) -> None:
    folder = tmp_path / "loads"
    assert subprocess.run([sys.executable, "-c", DIES, str(folder)]).returncode == 11

    assert LoadMarks(folder).left() == {"bad/2"}
    with LoadMarks(folder).loading("bad/2"):
        pass
    assert LoadMarks(folder).left() == set()


def test_a_load_that_goes_on_or_failed_is_none(tmp_path: Path) -> None:
    marks = LoadMarks(tmp_path)
    with marks.loading("slow/1"), LoadMarks(tmp_path).loading("slow/1"):  # by two workers at once
        assert LoadMarks(tmp_path).left() == set()
    with pytest.raises(ZeroDivisionError), marks.loading("broken/1"):
        raise ZeroDivisionError

    assert LoadMarks(tmp_path).left() == set()


def test_a_disk_that_takes_no_marks_keeps_nothing_from_being_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    marks = LoadMarks(tmp_path / "file" / "loads")
    with marks.loading("a/1"):
        assert marks.left() == set()
