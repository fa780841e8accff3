"""The object store may be away at any moment; the engine cache goes on without it, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import InvalidJob, PipelineError, Transient


class StoreUnavailable(Transient):
    """The object store did not answer as it should. Code: engine_store_unavailable."""


@contextmanager
def reached() -> Iterator[None]:
    """Around each use of the store. InvalidJob passes: it has answered, and speaks of the object."""
    try:
        yield
    except InvalidJob:
        raise
    except PipelineError as error:
        raise StoreUnavailable("engine_store_unavailable", error.message) from error
