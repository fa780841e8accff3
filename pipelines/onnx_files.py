"""Which files an ONNX graph reads its weights from. Asked before an engine may load the graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from schemas.errors import InvalidModel


def external_files(graph: Path) -> list[str]:
    """Names of the external weight files, relative to the graph's folder, sorted.

    Wherever in the file they are named: subgraphs, functions and attributes too.
    Raises InvalidModel("model_onnx_invalid") if it is no ONNX graph.
    """
    import onnx  # takes 80 ms and is needed only when a model is added

    try:
        model = onnx.load(graph, format="protobuf", load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise InvalidModel("model_onnx_invalid", f"{graph}: not an ONNX file: {error}") from error
    if not model.graph.node:
        raise InvalidModel("model_onnx_invalid", f"{graph}: not an ONNX file: it holds no graph")
    locations = {
        entry.value
        for tensor in _messages(model, onnx.TensorProto)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    if any("*" in location for location in locations):
        # ONNX Runtime takes `*/_ORT_MEM_ADDR_/*` for an address in its own memory.
        raise InvalidModel("model_file_outside", f"{graph}: names memory as the file of a weight")
    return sorted(locations)


def _messages(message: Message, kind: type[Message]) -> Iterator[Message]:
    if isinstance(message, kind):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for child in (value,) if isinstance(value, Message) else value:
            yield from _messages(child, kind)
