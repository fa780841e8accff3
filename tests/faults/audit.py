"""Reads a log as anybody could and says what it holds of the jobs whose ids come in on stdin."""

import json
import sys
from collections import Counter

from infra.eventlog.open import open_log
from schemas.results import decode_outcome
from schemas.topics import CONTROL, JOB_TOPICS, RESULTS, RETRY, dead_letter_topic


def main() -> None:
    wanted = set(json.load(sys.stdin))
    log = open_log(sys.argv[1])
    submitted = Counter(r.key for r in log.read(JOB_TOPICS, 0.0) if r.key in wanted)
    outcomes = [decode_outcome(r.value) for r in log.read([RESULTS], 0.0) if r.key in wanted]
    dlq = [dead_letter_topic(topic) for topic in (*JOB_TOPICS, RETRY)]
    written = Counter(outcome.job_id for outcome in outcomes)
    found = {
        "missing": sorted(wanted - written.keys()),
        "never_submitted": sorted(wanted - submitted.keys()),
        "twice": sorted(job_id for job_id, count in written.items() if count > 1),
        "statuses": Counter(outcome.status for outcome in outcomes),
        "codes": Counter(outcome.code for outcome in outcomes if outcome.code),
        "attempts": {outcome.job_id: outcome.attempts for outcome in outcomes},
        "dead_letters": Counter(r.key for r in log.read(dlq, 0.0) if r.key in wanted),
        "open": sum(
            lag.open for lag in log.lag("dispatcher", [*JOB_TOPICS, RETRY, CONTROL]).values()
        ),
    }
    log.close()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
