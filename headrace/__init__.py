"""The front door: `from headrace import Client`, and the command line in `headrace/cli`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producers.async_client import AsyncClient as AsyncClient
    from producers.client import Client as Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__"]

_HOMES = {"AsyncClient": "producers.async_client", "Client": "producers.client"}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import headrace` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
