"""Which nodes of a graph a backend has no operator for, in the words of every backend that says so."""

from __future__ import annotations

import re
from pathlib import Path

from schemas.errors import InvalidModel


def unsupported_operators(model: Path, library: str, operators: str) -> InvalidModel:
    """operators: what the library says of them, their names among it."""
    import onnx

    nodes = [
        f"{node.op_type} {node.name or node.output[0]!r}"
        for node in onnx.load(str(model), load_external_data=False).graph.node
        if re.search(rf"\b{re.escape(node.op_type)}\b", operators)
    ]
    return InvalidModel(
        "unsupported_operator",
        f"Expected operators that {library} has, of {', '.join(nodes) or 'a subgraph'} in {model.name}"
        f" it says: {operators}; export the graph with others, or use another backend.",
    )
