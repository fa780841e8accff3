"""A custom step, as a user would write one: it does as its payload says, so that tests can make a
worker hang, fail or die on a certain job."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def obey(bundle: Any) -> Callable[[bytes], dict[str, Any]]:
    """Orders, JSON: mark (a file that gets a line), name (that line), wait_for (a file), sleep_s,
    fail (a message), exit (a code), number (the answer)."""

    def step(data: bytes) -> dict[str, Any]:
        order = json.loads(data)
        if mark := order.get("mark"):
            with open(mark, "a") as file:
                file.write(f"{order.get('name', '')}\n")
        if gate := order.get("wait_for"):
            while not Path(gate).exists():
                time.sleep(0.002)
        time.sleep(order.get("sleep_s", 0))
        if "fail" in order:
            raise RuntimeError(order["fail"])
        if "exit" in order:
            os._exit(order["exit"])
        return {"x": np.array([order.get("number", 0)], np.float32)}

    return step
