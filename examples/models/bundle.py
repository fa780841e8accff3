"""Puts a finished bundle in its place: a folder is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL_YAML = "model.yaml"


def is_built(folder: Path, model_yaml: str) -> bool:
    """Whether the bundle is there as this recipe makes it: same model.yaml, so same version."""
    try:
        return Path(folder, MODEL_YAML).read_text("utf-8") == model_yaml
    except FileNotFoundError:
        return False


@contextmanager
def new_bundle(folder: Path, model_yaml: str) -> Iterator[Path]:
    """An empty folder to fill. It becomes `folder`, with model.yaml, unless the block fails."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        made = Path(partial, "bundle")
        made.mkdir()
        yield made
        Path(made, MODEL_YAML).write_text(model_yaml, "utf-8")
        if folder.exists():
            shutil.move(folder, Path(partial, "replaced"))
        made.rename(folder)
