"""Celery as a mailbox: one queue per worker, one task per batch, no authority.

No retries, no result backend, no priorities: the dispatcher decides, the event log remembers.
"""

from __future__ import annotations

from celery import Celery
from kombu.exceptions import OperationalError

from infra.fleet import MAILBOXES, mailbox
from infra.redis_client import ANSWER_S, is_tls, tls_options
from infra.settings import Settings
from schemas.batches import RUN_BATCH
from schemas.errors import Transient

# A batch is acknowledged after it ran; its lease, not Celery, brings it back. The visibility timeout
# only has to be longer than any lease, so that Celery never hands the same message out by itself.
VISIBILITY_TIMEOUT_S = 7 * 24 * 3600


def make_app(settings: Settings) -> Celery:
    url = settings.redis_address
    app = Celery("headrace", broker=_broker_url(url), set_as_current=False)
    app.conf.update(
        broker_use_ssl=tls_options(settings.redis) if is_tls(url) else None,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_heartbeat=None,
        broker_transport_options={
            "visibility_timeout": VISIBILITY_TIMEOUT_S,
            # Without this one failed acknowledgement stops the worker for good (celery#8030).
            "retry_on_timeout": True,
            "socket_timeout": ANSWER_S,
            "socket_connect_timeout": ANSWER_S,
            "health_check_interval": 10,
            "global_keyprefix": MAILBOXES,
        },
    )
    return app


class Mailboxes:
    """The dispatcher's way to the workers."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._producer = app.amqp.Producer(app.connection_for_write(), auto_declare=False)

    def send(self, worker: str, batch_id: str, slot: str) -> None:
        """slot: the token that the worker offered for this batch. Raises Transient (redis_unavailable)."""
        try:
            self._app.send_task(
                RUN_BATCH,
                args=(batch_id, slot),
                queue=mailbox(worker),
                task_id=batch_id,
                retry=False,
                ignore_result=True,
                producer=self._producer,
            )
        except (OperationalError, OSError) as error:
            self._producer.connection.close()
            self._producer = self._app.amqp.Producer(
                self._app.connection_for_write(), auto_declare=False
            )
            raise Transient(
                "redis_unavailable", f"The broker did not take a task ({error})."
            ) from error


def _broker_url(address: str) -> str:
    """Celery's spelling of a Redis address."""
    if address.startswith("unix://"):
        path = address.removeprefix("unix://").replace("?db=", "?virtual_host=")
        return f"redis+socket://{path}"
    return address
