"""`headrace objects`: the object store's bucket."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import typer

from headrace.cli.options import Data, settings_for
from headrace.cli.output import console, handle_errors

if TYPE_CHECKING:
    from infra.settings import Settings

app = typer.Typer(no_args_is_help=True)

DAY_S = 86400


@app.callback()
def group() -> None:
    """Create the object store's bucket on S3."""


@app.command()
@handle_errors
def apply(data: Data = None) -> None:
    """Create the bucket, and set what its server deletes by itself. Deletes nothing."""
    settings = settings_for(data)
    if not settings.objects_address.startswith("s3:"):
        console.print("The embedded object store makes its folder itself: there is nothing to do.")
        return
    days = _ensure_bucket(settings)
    console.print(f"The bucket is there; what tenants put is deleted after {days} days.")


def _ensure_bucket(settings: Settings) -> int:
    """Returns after how many days: a day more than any record is kept."""
    from infra.objects.s3 import S3Objects
    from schemas.topics import TOPICS

    days = math.ceil(max(topic.retention_s for topic in TOPICS) / DAY_S) + 1
    S3Objects(settings.objects_address, settings.s3).ensure_bucket(days)
    return days
