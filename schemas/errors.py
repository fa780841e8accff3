"""The error tree. Codes are part of the wire contract; vendor errors are translated once, at the edge.

Every message says what was expected, what came, and what to do.
"""

from __future__ import annotations

DEVICE_FAILED = "device_failed"
"""Code of a Transient: whatever this process tries on the device fails from now on, another process may succeed."""


class PipelineError(Exception):
    """Base of every error that headrace raises on purpose; anything else is a bug.

    code: stable snake_case word, part of the wire contract.
    """

    code: str

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[type[PipelineError], tuple[str, str]]:
        """As pools of processes hand it on."""
        return type(self), (self.code, self.message)


class InvalidJob(PipelineError):
    """The job itself is wrong. Never retried: refused at submit, or a dead letter."""


class InvalidModel(PipelineError):
    """A model bundle is wrong: its YAML, a file, a shape. Raised when it is added or loaded."""


class Transient(PipelineError):
    """May go away by itself (broker, store or device busy). Retried with backoff, a bounded number of times."""


class InferenceFailed(PipelineError):
    """The job is well formed, the model failed on it for good (bad output, crash, lost model)."""


class DeliveryFailed(PipelineError):
    """A callback could not be delivered."""


class JobFailed(PipelineError):
    """What a client raises when it asks for the result of a job that ended without one."""


class Backpressure(Exception):
    """No room now. Outside the tree: the caller pauses and tries again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
