"""One engine on its way into this machine's cache: out of the object store, or built, by one at a time.

The order is always: this disk, the store, a build. It happens under the machine's lock of the key, and
a build under the fleet's lease too. Where the store is away all goes on as if there were none.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from msgspec.structs import replace

from infra.logs import get_logger
from pipelines.engines.disk import Disk
from pipelines.engines.failures import Failure
from pipelines.engines.locks import Lease
from pipelines.engines.manifest import ARTEFACT, BuildNote, Rejected, finish, seal
from pipelines.engines.order import Order, Policy, Trace
from pipelines.engines.reach import StoreUnavailable
from pipelines.engines.signing import Keyring
from pipelines.engines.store import EngineStore
from schemas.errors import InvalidModel, Transient

_POLL_SHARE, _POLL_MIN_S, _POLL_MAX_S = 0.05, 0.05, 2.0
"""Who waits for another machine asks again after this share of the time it has waited already: so it
waits little longer than it must, and asks seldom."""

FETCH_WAIT_S = 30.0
"""How long one who may not build waits for somebody on this machine who fetches. For a build, not at all."""

_log = get_logger("engines")


class Flight:
    """Made for one order, run once. store: None where there is none."""

    def __init__(
        self, order: Order, disk: Disk, store: EngineStore | None, keyring: Keyring, policy: Policy
    ) -> None:
        self._order = order
        self._disk = disk
        self._store = store
        self._keyring = keyring
        self._policy = policy
        self._wait_s = policy.wait_s if order.may_build else min(policy.wait_s, FETCH_WAIT_S)
        self._began = time.monotonic()
        self._rejected: bytes | None = None
        self.trace = Trace(key=order.key)

    def run(self) -> Lease:
        """A lease on the entry, which is on this disk then.

        Raises what the build raises, InvalidModel if it failed a moment ago, Transient
        (engine_build_busy, engine_not_built) and OSError.
        """
        with ExitStack() as turn:  # outlasts the lock, so that nobody here waits for the upload
            with self._disk.lock(self._order.key, self._wait_s, self._on_wait):
                self._note(wait_s=round(time.monotonic() - self._began, 6))
                lease = self._find() or self._obtain(turn)
            if self.trace.origin == "built":
                self._publish(lease)
        return lease

    def _find(self) -> Lease | None:
        return None if self._order.rebuild else self._disk.find(self._order.key)

    def _obtain(self, turn: ExitStack) -> Lease:
        try:
            lease = self._fetch_or_take_turn(turn)
        except StoreUnavailable as error:
            self._go_on_without_store(error)
            lease = None
        return lease or self._build()

    def _fetch_or_take_turn(self, turn: ExitStack) -> Lease | None:
        """None: it is not in the store, and this machine is to build it."""
        if self._store is None:
            return None
        mine = self._store.lease(self._order.key, self._host())
        for _ in self._polls():
            lease = self._fetch(self._store)
            if lease or not self._order.may_build:
                return lease
            if mine.take():
                turn.callback(mine.release)
                return self._fetch(self._store)  # the last holder may have published just before
        raise Transient(
            "engine_build_busy",
            f"Expected another machine to build the engine within {self._wait_s:g} s, it has not;"
            " try later.",
        )

    def _polls(self) -> Iterator[None]:
        """One at once, then one whenever it is time to ask again, until the patience is over."""
        yield
        self._disk.say_building(self._order.key)  # another machine does
        self._on_wait()
        began = time.monotonic()
        while (now := time.monotonic()) < self._began + self._wait_s:
            with self._timed("wait_s"):
                time.sleep(min(max((now - began) * _POLL_SHARE, _POLL_MIN_S), _POLL_MAX_S))
            yield

    def _fetch(self, store: EngineStore) -> Lease | None:
        if self._order.rebuild:
            return None
        key = self._order.key
        signed = store.manifest(key)
        if signed is None or signed == self._rejected:
            return None
        try:
            with self._timed("fetch_s"), self._disk.workspace(key) as folder:
                store.download(signed, key, folder)
                finish(folder, signed, durable=False)  # it can be fetched again
                lease = self._disk.put(folder, key)
        except Rejected as reason:
            _log.warning("engine_store_entry_rejected", key=key, reason=str(reason))
            self._rejected = signed
            return None
        self._note(origin="store")
        return lease

    def _on_wait(self) -> None:
        """Somebody else is at it. Who may not build waits for a download, and not for a build."""
        if not self._order.may_build and self._disk.is_building(self._order.key):
            self._refuse()
        if self._order.on_wait:
            self._order.on_wait()

    def _build(self) -> Lease:
        self._refuse()
        self._disk.say_building(self._order.key)
        order, clock = self._order, self._policy.clock
        from pipelines.engines.build_log import recorded  # not at the top: see cache.py

        with recorded() as log, self._disk.workspace(order.key) as folder:
            try:
                with self._timed("build_s"):
                    order.build(folder / ARTEFACT)
            except InvalidModel as error:
                self._remember(Failure(error.code, error.message, clock(), order.label, log()))
                raise
            note = BuildNote(clock(), self.trace.build_s, platform.node(), log())
            seal(folder, order.key_parts, self._keyring, order.label, note)
            lease = self._disk.put(folder, order.key)
        self._disk.forget(order.key)
        self._note(origin="built")
        return lease

    def _publish(self, lease: Lease) -> None:
        if self._store is None:
            return
        key = self._order.key
        try:
            with self._timed("publish_s"):
                replace_it = self._order.rebuild or self._rejected is not None
                self._store.publish(key, self._disk.entry(key), replace=replace_it)
                self._store.forget(key)
        except StoreUnavailable as error:
            self._go_on_without_store(error)
        except Rejected as reason:
            lease.release()
            self._disk.verify(key, self._wait_s)
            raise Transient(
                "engine_rejected",
                f"Expected the engine {key} as it was just built: {reason}. It is removed, and built anew when it"
                " is next asked for.",
            ) from reason
        except BaseException:
            lease.release()
            raise

    def _refuse(self) -> None:
        """Raises unless it may be built now."""
        if not self._order.force:
            self._refuse_remembered()
        if not self._order.may_build:
            fault = self.trace.store_fault
            found = (
                f"the object store cannot be used: {fault}" if fault else "nobody has built it yet"
            )
            raise Transient(
                "engine_not_built",
                f"Expected a compiled engine for {self._order.label or self._order.key} and this"
                f" machine, {found}; it is built in the build lane, or by `headrace engines build`.",
            )

    def _refuse_remembered(self) -> None:
        failures = [self._disk.failure(self._order.key)]
        with suppress(StoreUnavailable):
            if self._store:
                failures.append(self._store.failure(self._order.key))
        for failure in filter(None, failures):
            left_s = failure.left_s(self._policy.clock(), self._policy.failure_memory_s)
            if left_s > 0:
                raise failure.again(left_s)

    def _remember(self, failure: Failure) -> None:
        self._disk.remember(self._order.key, failure)
        with suppress(StoreUnavailable):
            if self._store:
                self._store.remember(self._order.key, failure)

    def _go_on_without_store(self, error: StoreUnavailable) -> None:
        _log.warning("engine_store_unavailable", key=self._order.key, reason=str(error))
        self._note(store_fault=str(error))
        self._store = None

    def _host(self) -> str:
        """Names this cache folder among those of the fleet: whoever has its lock is alone in it."""
        root = self._disk.root.resolve()
        return f"{platform.node()}:{root}:{root.stat().st_ino}"

    @contextmanager
    def _timed(self, field: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            spent_s = getattr(self.trace, field) + time.monotonic() - began
            self._note(**{field: round(spent_s, 6)})

    def _note(self, **facts: object) -> None:
        self.trace = replace(self.trace, **facts)
