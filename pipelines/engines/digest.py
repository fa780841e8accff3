"""The identity of an ONNX model: a hash of its bytes and of the weights kept in files beside it.

What was hashed is noted with the files' inodes, sizes and times, so that a worker that starts with
a warm cache reads none of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from pipelines.engines.manifest import Stamp, read_json, stamp_of, write_json
from schemas.errors import InvalidModel

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_SETTLED_NS = 2_000_000_000
"""A file changed so recently may change again unseen, within one tick of its clock."""


NOTES_KEPT = 1000
"""A model of which the note is gone is hashed once more."""


class Note(Struct, frozen=True):
    """stamps: of the model and its external files, by path within the model's folder."""

    stamps: dict[str, Stamp]
    digest: str


def model_digest(model: Path, notes: Path) -> str:
    """SHA-256 over the model's bytes and those of its external data, whatever its name and folder.

    notes: a folder for what was hashed before.
    Raises InvalidModel if a file is missing, is no ONNX, or refers outside the model's folder.
    """
    path = notes / f"{hashlib.sha256(str(model.absolute()).encode()).hexdigest()[:32]}.json"
    note = read_json(path, Note)
    if note and note.stamps and _stamps(model, note.stamps) == note.stamps:
        return note.digest
    started_ns = time.time_ns()
    try:
        data = model.read_bytes()
    except OSError as error:
        raise InvalidModel(
            "missing_model_file", f"Expected an ONNX file at {model}, got: {error}; check its path."
        ) from error
    names = external_files(model, data)
    lines = [f"{name} {sha256_of(model.parent / name)}" for name in names]
    digest = hashlib.sha256("\n".join([hashlib.sha256(data).hexdigest(), *lines]).encode())
    stamps = _stamps(model, [model.name, *names])
    if stamps and max(max(stamp[2:]) for stamp in stamps.values()) < started_ns - _SETTLED_NS:
        with contextlib.suppress(OSError):  # read-only or full: the next start hashes again
            notes.mkdir(parents=True, exist_ok=True)
            write_json(path, Note(stamps, digest.hexdigest()))
            _forget_oldest(notes)
    return digest.hexdigest()


def external_files(model: Path, data: bytes) -> list[str]:
    """The files that the model with these bytes keeps its weights in, relative to its folder, sorted.

    Raises InvalidModel if one is missing or outside the folder, or if this is no ONNX.
    """
    import onnx

    try:
        proto = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's own DecodeError, whichever implementation is in use
        raise InvalidModel(
            "unusable_onnx",
            f"Expected an ONNX model in {model.name}, got: {error}; export it anew.",
        ) from error
    nodes = (node for function in proto.functions for node in function.node)
    tensors = [*_of_graph(proto.graph), *_of_nodes(nodes)]
    names = {
        entry.value
        for tensor in tensors
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for name in names:
        _check_inside(model, name)
    return sorted(names)


def _check_inside(model: Path, name: str) -> None:
    path = (model.parent / name).resolve()
    if not path.is_relative_to(model.parent.resolve()):
        raise InvalidModel(
            "external_data_outside",
            f"Expected the weights of {model.name} inside its folder, it refers to {name!r}; "
            "save the model with its external data beside it.",
        )
    if not path.is_file():
        raise InvalidModel(
            "missing_external_data",
            f"Expected the weights of {model.name} in {name!r} beside it, there is no such file; "
            "add it to the folder.",
        )


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def _forget_oldest(notes: Path) -> None:
    """A model that is gone is never asked for again, and its note tells nobody."""
    by_age = sorted(notes.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in by_age[:-NOTES_KEPT]:
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamps(model: Path, names: Iterable[str]) -> dict[str, Stamp] | None:
    """None if a file is not there."""
    try:
        return {name: stamp_of((model.parent / name).resolve()) for name in names}
    except OSError:
        return None
