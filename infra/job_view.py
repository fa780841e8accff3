"""The job view: what makes status and wait fast. Built from the results topic, and rebuilt from it.

A key per job holds its outcome as the results topic has it; clients are told of what ended on a channel each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from infra.redis_client import Redis, as_any, redis_errors
from schemas.results import Outcome, decode_outcome

_MARKS = "headrace:view:marks"

LEFT = -1
"""In a writer's place: the mark of the one that signed off last."""

_SET_ALL = """
for i, key in ipairs(KEYS) do redis.call('SET', key, ARGV[i + 1], 'EX', ARGV[1]) end
"""


class Ended(NamedTuple):
    """One ended job for the view. value: its outcome as encoded for the results topic."""

    job_id: str
    value: bytes
    reply_to: str | None


# Only while it is as it was last seen: after a loss of memory, all of it or the latest part, the view must not
# seem complete.
_MOVE_MARK = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
return 1
"""


# The mark must not hold back those who stay, and where nobody does, the view must not seem to have lost its memory.
_SIGN_OFF = """
local mark = redis.call('HGET', KEYS[1], ARGV[1])
if not mark then return end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[2], mark)
"""


class JobView:
    """Every method raises Transient (redis_unavailable) when Redis does not answer.

    writer: the slot of the dispatcher that writes through this. Each has a mark: the time up to which the
    view holds every outcome of its. A view without marks has lost its memory.
    """

    def __init__(self, redis: Redis, writer: int = 0) -> None:
        self._redis = redis
        self.writer = writer
        self._seen: dict[int, str] = {}

    def show(self, outcomes: Sequence[tuple[str, bytes]], ttl_s: int) -> None:
        """Show jobs for ttl_s, over what was shown of them. outcomes: job id and encoded outcome."""
        if outcomes:
            with redis_errors():
                pipe = self._redis.pipeline(transaction=False)
                _set_all(pipe, outcomes, ttl_s)
                pipe.execute()

    def ended(self, jobs: Sequence[Ended], ttl_s: int, complete_to: float | None) -> bool:
        """Show outcomes for ttl_s, tell the clients that wait.

        complete_to: moves the writer's mark there; None leaves it.
        Returns False, and does not say so, if the view has lost its memory: rebuild it.
        """
        notices: dict[str, list[str]] = defaultdict(list)
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            if jobs:
                _set_all(pipe, [(job.job_id, job.value) for job in jobs], ttl_s)
            for job in jobs:
                if job.reply_to:
                    notices[job.reply_to].append(job.job_id)
            for client, job_ids in notices.items():
                pipe.publish(_channel(client), "\n".join(job_ids))
            if complete_to is not None:
                self._move(pipe, self.writer, complete_to)
            answers = as_any(pipe.execute())
        if complete_to is None:
            return True
        self._seen[self.writer] = repr(complete_to)
        return bool(answers[-1])

    def rebuild_from(self, since: float) -> None:
        """Set the writer's mark, unless it has one."""
        with redis_errors():
            self._redis.hsetnx(_MARKS, str(self.writer), repr(since))
        self._seen[self.writer] = repr(since)

    def marks(self) -> dict[int, float]:
        """By writer; LEFT alone where all have signed off. Empty if the view lost its memory."""
        with redis_errors():
            marks = as_any(self._redis.hgetall(_MARKS))
        self._seen = {int(writer): mark.decode() for writer, mark in marks.items()}
        standing = {writer: float(mark) for writer, mark in self._seen.items()}
        left = standing.pop(LEFT, None)
        return {LEFT: left} if left is not None and not standing else standing

    def move_marks(self, writers: Iterable[int], complete_to: float) -> bool:
        """Every outcome up to a time is shown, whoever wrote it; a mark that its own writer has moved since it
        was read stays. False if this writer's was lost meanwhile."""
        with redis_errors():
            pipe = self._redis.pipeline(transaction=False)
            for writer in sorted(writers, key=lambda writer: writer == self.writer):
                self._move(pipe, writer, complete_to)
            moved = as_any(pipe.execute())
        self._seen[self.writer] = repr(complete_to)
        return bool(moved[-1])

    def _move(self, pipe: Redis, writer: int, complete_to: float) -> None:
        pipe.eval(_MOVE_MARK, 1, _MARKS, writer, self._seen.get(writer, ""), repr(complete_to))

    def sign_off(self) -> None:
        """This writer writes no more, and everything it wrote is shown."""
        with redis_errors():
            self._redis.eval(_SIGN_OFF, 1, _MARKS, self.writer, LEFT)

    def get(self, job_ids: Sequence[str]) -> list[Outcome | None]:
        """The jobs as the view knows them; None where it knows nothing."""
        if not job_ids:
            return []
        with redis_errors():
            found = as_any(self._redis.mget([_key(job_id) for job_id in job_ids]))
        return [decode_outcome(value) if value else None for value in found]

    def notices(self, client: str) -> Notices:
        return Notices(self._redis, client)


class Notices:
    """A client's channel. A notice may be missed (Redis gone, slow reader): look at the view now and then too."""

    def __init__(self, redis: Redis, client: str) -> None:
        self._pubsub = as_any(redis).pubsub(ignore_subscribe_messages=True)
        with redis_errors():
            self._pubsub.subscribe(_channel(client))

    def wait(self, timeout_s: float) -> list[str]:
        """Ids of jobs that ended, at most timeout_s later; empty if none was told."""
        with redis_errors():
            message = self._pubsub.get_message(timeout=timeout_s)
            ids: list[str] = []
            while message:
                ids += _ids(message["data"])
                message = self._pubsub.get_message(timeout=0)
            return ids

    def close(self) -> None:
        self._pubsub.close()


def _set_all(pipe: Redis, outcomes: Sequence[tuple[str, bytes]], ttl_s: int) -> None:
    """As one command: a SET each costs the dispatcher about as much as all the rest it does for a job."""
    keys = [_key(job_id) for job_id, _ in outcomes]
    pipe.eval(_SET_ALL, len(keys), *keys, ttl_s, *(value for _, value in outcomes))


def _ids(data: object) -> Iterator[str]:
    if isinstance(data, bytes):
        yield from data.decode().split("\n")


def _key(job_id: str) -> str:
    return f"headrace:job:{job_id}"


def _channel(client: str) -> str:
    return f"headrace:done:{client}"
