"""The slots a worker offers and the batches it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.fleet import SlotToken
from schemas.batches import Batch
from workers.inference.hand import MISSED_BEATS, Hand

MakeBatch = Callable[..., Batch]


@pytest.fixture
def hand() -> Hand:
    return Hand("w", slots=2)


def seats(tokens: list[SlotToken]) -> Counter[str]:
    return Counter(token.seat for token in tokens)


def miss(hand: Hand, beats: int) -> None:
    for _ in range(beats):
        tokens = hand.offers()
        hand.missing(tokens, [False] * len(tokens))


def test_an_empty_hand_offers_its_slots_and_one_for_live_lanes(hand: Hand) -> None:
    fresh = hand.new_offers()

    assert seats(fresh) == {"any": 2, "live": 1}
    assert hand.capacity == 3
    assert {(token.worker, token.life) for token in fresh} == {("w", hand.life)}
    assert hand.new_offers() == []


def test_a_slot_that_was_used_is_offered_again_when_its_batch_is_done(
    hand: Hand, make_batch: MakeBatch
) -> None:
    token = hand.new_offers()[0]
    batch = make_batch()
    hand.hold(batch, token.seat)
    hand.used(token)
    assert hand.new_offers() == []

    hand.drop(batch.id)
    (fresh,) = hand.new_offers()

    assert fresh.seat == token.seat
    assert fresh != token


def test_tokens_are_never_the_same_again(hand: Hand) -> None:
    seen = set()
    for _ in range(50):
        for token in hand.new_offers():
            assert token not in seen
            seen.add(token)
            hand.used(token)


def test_two_lives_of_a_worker_do_not_share_tokens() -> None:
    assert not set(Hand("w", 2).new_offers()) & set(Hand("w", 2).new_offers())


def test_an_offer_that_is_gone_for_some_beats_counts_as_lost_and_is_made_anew(hand: Hand) -> None:
    lost = hand.new_offers()

    miss(hand, MISSED_BEATS)
    assert hand.new_offers() == []
    miss(hand, 1)
    fresh = hand.new_offers()

    assert seats(fresh) == {"any": 2, "live": 1}
    assert not set(fresh) & set(lost)


def test_an_offer_that_shows_up_again_starts_anew(hand: Hand) -> None:
    hand.new_offers()
    miss(hand, MISSED_BEATS)
    tokens = hand.offers()
    hand.missing(tokens, [True] * len(tokens))
    miss(hand, MISSED_BEATS)

    assert hand.new_offers() == []


def test_a_batch_that_comes_for_a_lost_offer_is_held_all_the_same(
    hand: Hand, make_batch: MakeBatch
) -> None:
    token = hand.new_offers()[0]
    miss(hand, MISSED_BEATS + 1)
    hand.new_offers()
    batch = make_batch()

    hand.hold(batch, token.seat)
    hand.used(token)
    assert hand.new_offers() == []
    hand.drop(batch.id)

    assert hand.new_offers() == []


def test_a_closed_hand_offers_nothing(hand: Hand, make_batch: MakeBatch) -> None:
    token = hand.new_offers()[0]
    batch = make_batch()
    hand.hold(batch, token.seat)
    hand.used(token)
    hand.close()
    hand.drop(batch.id)

    assert hand.closed
    assert hand.new_offers() == []


def test_what_is_in_hand_is_told_and_what_has_begun(hand: Hand, make_batch: MakeBatch) -> None:
    one, other = make_batch(), make_batch()
    hand.hold(one, "any")
    hand.hold(other, "live").began_at = 5.0

    assert [held.batch for held in hand.held()] == [one, other]
    assert [held.batch for held in hand.begun()] == [other]
    hand.drop(one.id)
    hand.drop("unknown")
    assert [held.batch for held in hand.held()] == [other]


STEPS = st.lists(st.sampled_from(["offer", "batch", "done", "lose", "beat"]), max_size=80)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS, st.randoms(use_true_random=False))
def test_offers_and_batches_together_never_pass_the_hands_capacity_nor_stay_below(
    make_batch: MakeBatch, steps: list[str], random: Any
) -> None:
    hand = Hand("w", 2)
    there: list[SlotToken] = []
    held: dict[str, Batch] = {}
    for step in steps:
        match step:
            case "offer":
                there += hand.new_offers()
            case "batch" if there:
                token = there.pop(random.randrange(len(there)))
                batch = make_batch()
                held[batch.id] = batch
                hand.hold(batch, token.seat)
                hand.used(token)
            case "done" if held:
                hand.drop(held.popitem()[0])
            case "lose" if there:
                there.pop(random.randrange(len(there)))
            case "beat":
                tokens = hand.offers()
                hand.missing(tokens, [token in there for token in tokens])
        assert len(hand.offers()) + len(held) <= hand.capacity
        assert set(there) <= set(hand.offers())

    for _ in range(MISSED_BEATS + 1):
        tokens = hand.offers()
        hand.missing(tokens, [token in there for token in tokens])
    there += hand.new_offers()
    assert len(there) + len(held) == hand.capacity
