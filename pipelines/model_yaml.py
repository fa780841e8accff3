"""Reads a bundle's `model.yaml`, before anything else of the bundle is looked at, so that each
mistake in it is named with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from schemas.errors import InvalidModel
from schemas.models import EngineConfig, ModelConfig

MAX_BYTES = 1024 * 1024
MAX_VALUES = 100_000
"""Values in the file with every alias written out: stops an alias bomb before it is built."""

_AT = re.compile(r" - at `(?:key in )?(\$[^`]*)`$")
_PART = re.compile(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])")
_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]+)`")
_UNQUOTED_TEXT = re.compile(r"Expected `str`, got `(bool|int|float|datetime|date)`")


class ModelYaml:
    """A parsed `model.yaml` that still knows its lines."""

    def __init__(self, path: Path) -> None:
        """Raises InvalidModel("model_yaml_invalid") with file and line."""
        self.path = path
        loader = _Loader(_read(path))
        try:
            self._root = self._compose(loader)
            raw = loader.construct_document(self._root)
        except yaml.MarkedYAMLError as error:
            raise self._error(error.problem_mark, str(error.problem)) from error
        except RecursionError:
            raise self._error(None, "nested too deeply to be read") from None
        self.config = self._convert(raw)

    def where(self, at: str) -> str:
        """`file:line` of a value. at: a path such as `$.preprocess[1]`."""
        return f"{self.path}:{_find(self._root, at).start_mark.line + 1}"

    def _compose(self, loader: yaml.SafeLoader) -> yaml.Node:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise self._error(None, "expected `name: ...`, `version: ...` and so on, found neither")
        for count, node in enumerate(_walk(root)):
            if count == MAX_VALUES:
                raise self._error(node.start_mark, f"aliases expand to over {MAX_VALUES} values")
            if isinstance(node, yaml.MappingNode):
                self._refuse_duplicates(node)
        return root

    def _refuse_duplicates(self, mapping: yaml.MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key.start_mark, "expected a name before the colon, came a list")
            if first := lines.get(key.value):
                raise self._error(key.start_mark, f"`{key.value}` is given in line {first} already")
            lines[key.value] = key.start_mark.line + 1

    def _convert(self, raw: dict[str, Any]) -> ModelConfig:
        try:
            return msgspec.convert(raw, ModelConfig)
        except msgspec.ValidationError as error:
            message = str(error)
        found = _AT.search(message)
        at = found[1] if found else "$"
        if at.startswith("$.engines[...]"):
            at = at.replace("[...]", f".{_first_wrong_engine(raw['engines'])}", 1)
        if unknown := _UNKNOWN_FIELD.search(message):
            at = f"{at}.{unknown[1]}"
        if _UNQUOTED_TEXT.search(message):
            message += "; put it in quotes"
        raise self._error(_find(self._root, at).start_mark, message)

    def _error(self, mark: yaml.Mark | None, message: str) -> InvalidModel:
        line = mark.line + 1 if mark else 1
        return InvalidModel("model_yaml_invalid", f"{self.path}:{line}: {message}")


class _Loader(yaml.SafeLoader):
    """The safe loader, with a line for what PyYAML lets fail without one (a date of month 13)."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, str(error), node.start_mark
            ) from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidModel(
            "model_yaml_missing",
            f"{path}: expected a file that describes the model, came: {error.strerror}",
        ) from error
    if len(data) > MAX_BYTES:
        raise InvalidModel("model_yaml_invalid", f"{path}:1: over {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidModel("model_yaml_invalid", f"{path}:{line}: not UTF-8 text") from error
    if bad := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise InvalidModel(
            "model_yaml_invalid", f"{path}:{line}: control character {bad[0]!r}; remove it"
        )
    return text


def _walk(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node under the root; one that has aliases comes once for each of them."""
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, yaml.MappingNode):
            stack.extend(child for pair in node.value for child in pair)
        elif isinstance(node, yaml.SequenceNode):
            stack.extend(node.value)


def _find(root: yaml.Node, at: str) -> yaml.Node:
    """The node at a path in msgspec's notation, or the last one on the way that exists.

    In a mapping it is the key, whose line is where a reader looks. `[...]` stands for "some key".
    """
    node = shown = root
    for name, index, some in _PART.findall(at):
        if isinstance(node, yaml.MappingNode):
            pairs = [(k, v) for k, v in node.value if some or k.value == name]
        elif isinstance(node, yaml.SequenceNode) and index and int(index) < len(node.value):
            pairs = [(node.value[int(index)],) * 2]
        else:
            break
        if len(pairs) != 1:
            break
        shown, node = pairs[0]
    return shown


def _first_wrong_engine(engines: dict[str, Any]) -> str:
    """msgspec does not say at which key of a mapping it stopped."""
    for name, engine in engines.items():
        try:
            msgspec.convert(engine, EngineConfig)
        except msgspec.ValidationError:
            return str(name)
    return "[...]"
