"""What `make soak` draws: every rule, every family, from the seed alone."""

from collections import Counter
from itertools import islice, takewhile

from ds_optforge.rules import rule_names
from tests.distributed.soaked import FAMILIES
from tests.soak import LAUNCHED, lanes


def test_a_pass_has_every_rule_and_family_and_five_passes_have_every_pair() -> None:
    families = {*FAMILIES, LAUNCHED}
    assert len(families) == 5
    drawn = list(takewhile(lambda lane: lane.passes < 5, lanes(seed=1)))
    for number in range(5):
        of_pass = [lane for lane in drawn if lane.passes == number]
        assert sorted(rule for lane in of_pass for rule in lane.rules) == sorted(rule_names())
        assert {lane.family for lane in of_pass} == families
    pairs = Counter((lane.family, rule) for lane in drawn for rule in lane.rules)
    assert pairs == Counter((family, rule) for family in families for rule in rule_names())


def test_the_seed_says_what_comes() -> None:
    assert list(islice(lanes(1), 50)) == list(islice(lanes(1), 50))
    assert list(islice(lanes(1), 50)) != list(islice(lanes(2), 50))


def test_schedule_free_which_wants_no_schedule_trains_alone() -> None:
    with_it = [lane.rules for lane in islice(lanes(1), 100) if "schedule_free_adamw" in lane.rules]
    assert set(with_it) == {("schedule_free_adamw",)}


def test_every_family_has_places_of_every_stage_that_it_can_have() -> None:
    """DeepSpeed has no pipeline on ZeRO-2 and 3: there the same layers are trained without one (share 0)."""
    for name, family in FAMILIES.items():
        assert {place.stage for place in family.places} == {0, 1, 2, 3}, name
        assert max(place.ranks for place in family.places) == 4
    assert {place.stage for place in FAMILIES["pipeline"].places if place.share} == {0, 1}
    assert (
        {place.share for place in FAMILIES["tensor"].places}
        == {place.share for place in FAMILIES["experts"].places}
        == {1, 2, 4}
    )
