"""Links that delay, break, swallow, or hold back, and answers that get lost."""

from __future__ import annotations

import time

from tests.faults.real.keeper import until
from tests.faults.real.servers import LINKS, Role
from tests.faults.real.suite import STUCK_S, Run, Scale, fault
from tests.servers.proxy import Mode

DELAY_S = 0.1
"""Each way: an answer takes 200 ms longer."""

RESETS_PER_S = 0.05
"""In every second, 5 % of the connections break."""


@fault(
    12,
    "object store accepts, answer lost",
    long=Scale(50, 3_000),
    short=Scale(3, 300),
    proxied=True,
)
def answer_lost(run: Run) -> None:
    roles: tuple[Role, ...] = ("worker", "client")
    with run.load(large=0.2):
        for number in range(run.scale.repeats):
            proxy = run.servers.links[roles[number % 2], "objects"]
            lost = proxy.lost_answers
            proxy.lose_answer_to = (b"PUT ",)
            until(lambda p=proxy, n=lost: p.lost_answers > n, STUCK_S, "an answer is lost")  # type: ignore[misc]
            run.recovered(time.monotonic())


@fault(
    18,
    "5 % resets a second, 200 ms of delay",
    long=Scale(1, 20_000, 600),
    short=Scale(1, 500, 15),
    proxied=True,
    lease_s=10.0,
)
def slow_and_lossy(run: Run) -> None:
    """With the usual lease: one of 2 s is over before a batch has made its way over such a link."""
    with run.load(rate=50):
        for proxy in run.servers.links.values():
            proxy.delay_s, proxy.resets_per_s = DELAY_S, RESETS_PER_S
        end = time.monotonic() + run.scale.seconds
        while time.monotonic() < end:
            time.sleep(1)
            run.recovered(time.monotonic(), note=False)
        run.servers.heal()
        run.recovered(time.monotonic())


@fault(
    19,
    "each link silent for a while",
    long=Scale(2, 30_000, 60),
    short=Scale(1, 500, 5),
    proxied=True,
)
def links_silent(run: Run) -> None:
    """The first time, what was sent meanwhile is lost with its connection; the second time, it comes late."""
    modes: list[Mode] = ["blackhole", "hold"]
    links = list(LINKS)
    if run.scale.seconds < 60:
        links = run.chance.sample(links, 2)
    # Of a quarter of an hour: the large ones have to fit the object store.
    with run.load(large=0.02, rate=100):
        for mode in modes[: run.scale.repeats]:
            for link in links:
                proxy = run.servers.links[link]
                proxy.mode = mode
                time.sleep(run.scale.seconds)
                proxy.mode = "pass"
                run.recovered(time.monotonic())
