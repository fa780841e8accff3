"""Out-of-order completion of one partition: which offsets are open, and what to store so that a restart knows.

Pure and without I/O. The log's consumers keep one tracker per topic and partition, and write
`encode()` in the same transaction as the outcomes it accounts for.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

METADATA_LIMIT = 4096
"""Most characters Kafka keeps with a committed offset."""

SPAN = METADATA_LIMIT * 6
"""Offsets that fit in the bitmap: base64 holds six in a character."""


class Tracker:
    """Offsets are received in ascending order, with gaps, and completed in any order.

    The completions are one integer, so that a copy is cheap: a transaction completes on a copy,
    and the copy takes the tracker's place once it has been committed.
    """

    __slots__ = ("_bits", "_end", "_next", "_open")

    def __init__(self, next: int = 0, bits: int = 0) -> None:
        """next: the lowest incomplete offset. Bit i of bits: offset next + i is complete."""
        self._next = next
        self._bits = bits
        self._end = next
        self._open = 0
        self._advance()

    @classmethod
    def decode(cls, next: int, metadata: str) -> Tracker:
        """The tracker that `encode()` described. Raises ValueError if the metadata is malformed."""
        if len(metadata) > METADATA_LIMIT:
            raise ValueError(
                f"expected at most {METADATA_LIMIT} characters of completions, got {len(metadata)}"
            )
        padded = metadata + "=" * (-len(metadata) % 4)
        try:
            bits = base64.b64decode(padded, validate=True)
        except ValueError as error:
            raise ValueError(
                f"expected completions in base64, got {metadata[:40]!r}: {error}"
            ) from None
        return cls(next, int.from_bytes(bits, "little"))

    def encode(self) -> tuple[int, str]:
        """(next, the completions above it as at most 4,096 characters of ASCII)."""
        size = (self._bits.bit_length() + 7) // 8
        bitmap = base64.b64encode(self._bits.to_bytes(size, "little"))
        return self._next, bitmap.decode("ascii").rstrip("=")

    def copy(self) -> Tracker:
        twin = Tracker.__new__(Tracker)
        twin._next, twin._bits = self._next, self._bits
        twin._end, twin._open = self._end, self._open
        return twin

    @property
    def next(self) -> int:
        """The lowest incomplete offset. With nothing open, one above the highest known."""
        return self._next

    @property
    def end(self) -> int:
        """Where to read on: one above the highest received."""
        return self._end

    @property
    def open(self) -> int:
        """How many are received and not complete."""
        return self._open

    @property
    def complete_above_next(self) -> int:
        """How many completions the bitmap holds."""
        return self._bits.bit_count()

    def open_offsets(self) -> Iterator[int]:
        """Received and not complete, ascending."""
        missing = ~self._bits & ((1 << (self._end - self._next)) - 1)
        while missing:
            lowest = missing & -missing
            yield self._next + lowest.bit_length() - 1
            missing ^= lowest

    def accepts(self, offset: int) -> bool:
        """False where the bitmap cannot reach this offset before lower ones complete."""
        return not self._open or offset - self._next < SPAN

    def received(self, offset: int) -> bool:
        """Open this offset; True if it was complete already, so that the caller skips it.

        Offsets left out are gaps and count as complete. Raises ValueError if it was received before.
        """
        if offset < self._next:
            return True
        if offset < self._end:
            raise ValueError(f"offset {offset} was received before: the next one is {self._end}")
        self._skip_to(offset)
        self._end = offset + 1
        if self._bits >> (offset - self._next) & 1:
            self._advance()
            return True
        self._open += 1
        return False

    def complete(self, offset: int) -> bool:
        """Mark it complete; False if it was already. Raises ValueError if it was never received."""
        place = offset - self._next
        if place < 0 or self._bits >> place & 1:
            return False
        if offset >= self._end:
            raise ValueError(f"offset {offset} was never received: the next one is {self._end}")
        self._bits |= 1 << place
        self._open -= 1
        if not place:
            self._advance()
        return True

    def rewound(self, offset: int) -> Tracker:
        """A tracker with nothing received, for which nothing from this offset on is complete."""
        if offset <= self._next:
            return Tracker(offset)
        return Tracker(self._next, self._bits & ((1 << (offset - self._next)) - 1))

    def _skip_to(self, offset: int) -> None:
        """Offsets between the last received and this one do not exist."""
        if not self._open:
            self._bits >>= offset - self._next
            self._next = offset
        elif gap := offset - self._end:
            self._bits |= ((1 << gap) - 1) << (self._end - self._next)

    def _advance(self) -> None:
        """Drop the run of completions at the bottom, so that bit 0 is an incomplete offset."""
        run = (~self._bits & (self._bits + 1)).bit_length() - 1
        if run:
            self._bits >>= run
            self._next += run
            self._end = max(self._end, self._next)
