"""A model bundle: a folder with `model.yaml` and its files, opened and checked.

Opened when a model is added to the catalogue, and again by each worker that loads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pipelines.engines.precision import refuse_unsupported
from pipelines.model_yaml import ModelYaml
from pipelines.onnx_files import external_files
from schemas.errors import InvalidModel
from schemas.models import ModelConfig

MODEL_YAML = "model.yaml"


class Bundle:
    """An opened bundle. Immutable: what it says is what was on disk when it was opened."""

    def __init__(self, folder: Path, model_yaml: ModelYaml) -> None:
        self.folder = folder
        self.config: ModelConfig = model_yaml.config
        self._yaml = model_yaml

    @classmethod
    def open(cls, folder: Path, *, check_graphs: bool = True) -> Bundle:
        """Parse model.yaml and see that every file it names lies inside the folder.

        check_graphs: parse the ONNX files too, to see that their weights lie inside. It reads all
        of them, so a worker leaves it out for a bundle that the catalogue took in.
        Raises InvalidModel.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InvalidModel(
                "model_yaml_missing", f"{folder}: expected a folder with a {MODEL_YAML} in it"
            )
        folder = folder.resolve()
        bundle = cls(folder, ModelYaml(folder / MODEL_YAML))
        bundle._check_names(check_graphs)
        return bundle

    def path(self, name: str) -> Path:
        """The file of this name in the bundle. Raises InvalidModel if it is missing or outside."""
        try:
            found = (self.folder / name).resolve()
            is_file = found.is_file()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL, too long
            raise InvalidModel("model_file_missing", f"{name!r}: not a file: {error}") from error
        if Path(name).is_absolute() or not found.is_relative_to(self.folder):
            raise InvalidModel(
                "model_file_outside",
                f"{name!r}: lies outside the bundle {self.folder}; copy it in, name it from there",
            )
        if not is_file:
            raise InvalidModel(
                "model_file_missing", f"{name!r}: no such file in the bundle {self.folder}"
            )
        return found

    def where(self, at: str) -> str:
        """`file:line` of a value of model.yaml. at: a path such as `$.preprocess[1]`."""
        return self._yaml.where(at)

    def files(self) -> list[str]:
        """Names of all files in the folder, relative, with `/`, sorted. Raises InvalidModel."""
        found = []
        for folder, subfolders, names in os.walk(self.folder):
            for name in (*names, *(s for s in subfolders if Path(folder, s).is_symlink())):
                relative = Path(folder, name).relative_to(self.folder).as_posix()
                self.path(relative)
                found.append(relative)
        return sorted(found)

    @cached_property
    def labels(self) -> list[str]:
        """The model's labels in the order of its output; empty if it names none."""
        labels = self.config.labels
        if not isinstance(labels, str):
            return labels or []
        try:
            text = self.path(labels).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidModel(
                "model_labels_invalid", f"{labels}: expected UTF-8, one label a line: {error}"
            ) from error
        return [line.strip() for line in text.rstrip().splitlines()]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the names and contents of all files: the version's identity."""
        digest = hashlib.sha256()
        for name in self.files():
            with self.path(name).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content} {name}\n".encode())
        return digest.hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(self.path(name).stat().st_size for name in self.files())

    def _check_names(self, check_graphs: bool) -> None:
        for engine, config in self.config.engines.items():
            at = f"$.engines.{engine}.file"
            graph = self._named(at, config.file)
            if check_graphs:
                self._check_weights(at, graph)
            with self._blaming(f"$.engines.{engine}.precision"):
                refuse_unsupported(config)
            if config.accuracy:
                samples = os.path.join(os.path.dirname(config.file), config.accuracy.samples)
                self._named(f"$.engines.{engine}.accuracy.samples", samples)
        for field in ("labels", "tokenizer", "sample"):
            name = getattr(self.config, field)
            if isinstance(name, str):
                self._named(f"$.{field}", name)

    def _named(self, at: str, name: str) -> Path:
        with self._blaming(at):
            return self.path(name)

    def _check_weights(self, at: str, graph: Path) -> None:
        with self._blaming(at):
            for weights in external_files(graph):
                self.path(os.path.join(graph.parent.relative_to(self.folder), weights))

    @contextmanager
    def _blaming(self, at: str) -> Iterator[None]:
        try:
            yield
        except InvalidModel as error:
            raise InvalidModel(error.code, f"{self.where(at)}: {error.message}") from error
