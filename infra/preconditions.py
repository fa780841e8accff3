"""What each process makes sure of before it starts: that no setting, and no server, would lose what it is given.

`headrace doctor` shows the same findings, and what is only worth knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from infra.checks import Finding
from infra.redis_checks import redis_findings
from infra.settings import Settings
from schemas.errors import PipelineError, Transient
from schemas.topics import JOB_TOPICS, RETRY, TOPIC_BY_NAME

Ask = Callable[[Settings], list[Finding]]


def log_findings(settings: Settings) -> list[Finding]:
    if settings.log_address.startswith("kafka:"):
        try:
            from infra.eventlog.kafka_checks import kafka_findings
        except ImportError as error:
            raise _extra_missing("kafka", error) from error
        return kafka_findings(settings)
    return [declared_retention(settings.dispatcher.max_deadline_s)]


def object_findings(settings: Settings) -> list[Finding]:
    """A folder needs none: it is by its code as it must be."""
    if not settings.objects_address.startswith("s3:"):
        return []
    try:
        from infra.objects.s3_checks import s3_findings
    except ImportError as error:
        raise _extra_missing("s3", error) from error
    return s3_findings(settings)


def declared_retention(deadline_s: float) -> Finding:
    """The embedded log keeps jobs as they are declared."""
    kept_s = min(TOPIC_BY_NAME[name].retention_s for name in (*JOB_TOPICS, RETRY))
    found = f"jobs are kept {kept_s / 86400:g} days, deadlines reach {deadline_s / 86400:g} days"
    if kept_s < deadline_s:
        remedy = f"Set HEADRACE_DISPATCHER__MAX_DEADLINE_S to {kept_s:.0f} at most."
        return Finding("retention", "fail", found, remedy)
    return Finding("retention", "ok", found)


DISPATCHER: Sequence[Ask] = (log_findings, redis_findings, object_findings)
WORKER: Sequence[Ask] = (redis_findings, object_findings)


def preconditions(settings: Settings, of: Sequence[Ask] = DISPATCHER) -> None:
    """Raises PipelineError (precondition_failed): the process must not start; the message says what to do.

    A server that does not answer now is not judged: whoever needs it waits for it.
    """
    failed: list[str] = []
    for ask in of:
        try:
            findings = ask(settings)
        except PipelineError as error:
            if not isinstance(error, Transient) or error.code == "redis_forbidden":
                failed.append(error.message)
            continue
        failed += [
            f"{finding.check}: {finding.detail.rstrip('.')}. {finding.remedy}"
            for finding in findings
            if finding.level == "fail"
        ]
    if failed:
        raise PipelineError("precondition_failed", f"Not started. {' '.join(failed)}")


def _extra_missing(name: str, error: ImportError) -> PipelineError:
    return PipelineError(
        "extra_missing", f"The {name}:// address needs `pip install 'headrace[{name}]'` ({error})."
    )
