"""Options that several commands share, and the settings they amount to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from infra.settings import Settings

Data = Annotated[
    Path | None, typer.Option("--data", envvar="HEADRACE_DATA_DIR", help="The stack's folder.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def settings_for(data: Path | None, **sections: Mapping[str, object]) -> Settings:
    """Settings from the environment with the command line's on top.

    Raises PipelineError (settings_invalid).
    """
    from infra.settings import load_settings

    overrides: dict[str, object] = {**sections}
    if data is not None:
        overrides["data_dir"] = data
    return load_settings(**overrides)
