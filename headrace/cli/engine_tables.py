"""How `headrace engines` shows what it found to people."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from headrace.cli.engine_builds import Built, Warmed
from pipelines.engines.inventory import EngineInfo

SHORT = 16
"""So much of a key tells it from others."""


def listing(engines: Sequence[EngineInfo]) -> Table:
    table = Table(box=None, header_style="dim")
    for column in ("key", "engine", "backend", "state", "where", "size", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left")
    for info in engines:
        table.add_row(
            info.key[:SHORT],
            escape(info.label),
            escape(info.backend),
            "in use" if info.leased else info.state,
            " ".join(info.where),
            decimal(info.size_bytes),
            _when(info.used_at),
        )
    return table


def facts(info: EngineInfo) -> Table:
    table = Table(show_header=False, box=None)
    rows: dict[str, str] = {
        "key": info.key,
        "engine": info.label,
        "state": "in use" if info.leased else info.state,
        "where": " ".join(info.where),
        "size": decimal(info.size_bytes),
        "last used": _when(info.used_at),
    }
    if info.note:
        rows["note"] = info.note
    if info.manifest:
        built = info.manifest.build
        rows["built"] = f"{_when(built.at)} on {built.host} in {built.seconds:.3f} s"
        for name, part in info.manifest.key_parts.items():
            rows[name] = part if isinstance(part, str) else json.dumps(part)
        for name, file in info.manifest.files.items():
            rows[name] = decimal(file.size_bytes)
    for name, value in rows.items():
        table.add_row(f"[dim]{escape(name)}[/]", escape(value))
    return table


def outcome(built: Built) -> str:
    """One line of `build`."""
    if built.error:
        return f"{built.engine}: not built: {built.error}"
    how = {
        "local": "was here already",
        "store": f"fetched from the store in {built.fetch_s:.2f} s",
        "built": f"built in {built.build_s:.2f} s",
    }[built.origin]
    shared = ", copied to the store" if built.shared else ""
    fault = f" (the store could not be used: {built.store_fault})" if built.store_fault else ""
    return f"{built.engine}: {built.key[:SHORT]} {how}{shared}{fault}"


def warmth(warmed: Warmed) -> str:
    """One line of `prewarm`."""
    if warmed.error:
        return f"{warmed.model}: does not run: {warmed.error}"
    return f"{warmed.model}: loaded and warmed up in {warmed.warm_s:.2f} s"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
