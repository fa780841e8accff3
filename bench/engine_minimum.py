"""What a person would write by hand to answer once with a compiled model, and no more: the floor of a cold start.

A process of its own, started by `engine_load.py`. Reads from stdin where the files are and what to run them on.
"""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime as ort  # noqa: E402

sessions = []
for engine in json.load(sys.stdin)["engines"]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = f"{engine['artefact']}/model.onnx"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    sessions.append((session, engine["inputs"]))
load_ms = (time.perf_counter() - BEGAN) * 1000
for session, inputs in sessions:
    session.run(
        None, {name: np.ones((1, *shape), dtype) for name, (dtype, shape) in inputs.items()}
    )
answered_at, cpu_ms = time.monotonic(), time.process_time() * 1000
print(json.dumps({"load_ms": load_ms, "answered_at": answered_at, "cpu_ms": cpu_ms}))
