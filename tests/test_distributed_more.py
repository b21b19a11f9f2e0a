"""Ranks that are not even: their shares, an update that fails on one, a signal at the end, another number of ranks.

What two ranks do is done in one go by ``tests/distributed_more.py``; the tests read what it found.
"""

import pytest

from tests.test_distributed import FORKS, run

pytestmark = FORKS


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run(tmp_path_factory.mktemp("more"), module="tests.distributed_more")


def test_buffers_move_by_the_mean_over_tasks(found):
    """Weighted by real tasks: the running sum of one rank that has them all."""
    first, second = found["buffers"]
    assert first == second
    assert len(first) == 2
    for two, one in first.values():
        assert two == pytest.approx(one, rel=1e-6)
        assert one > 1.0  # control: of losses, not of nothing


def test_a_run_keeps_its_tasks_through_other_numbers_of_ranks(found):
    """Also for a method that draws noise, whose noise is new in each part."""
    first, second = found["size_changes"]
    whole = [a + b for a, b in zip(first["whole"], second["whole"], strict=True)]
    alone = [*first["x"][1], *first["x"][2]]
    assert [len(part) for part in first["x"]] == [3] * 4
    assert [a + b for a, b in zip(first["x"][0], second["x"][0], strict=True)] == whole[:3]
    assert alone == whole[3:9]
    assert [a + b for a, b in zip(first["x"][3], second["x"][3], strict=True)] == whole[9:]
    noise = [value for each in (first, second) for part in each["noise"] for value in part]
    assert len(noise) == 3 * (2 + 1 + 1 + 2)
    assert len(set(noise)) == len(noise)
    assert first["noise"][0] == first["uninterrupted"][:3]  # control: noise begins with the run's own
    assert ["until step 3" in first["said"][0], "until step 9" in first["said"][1]] == [True, True]
    assert len(first["said"]) == 2
    assert not any("are others" in text for text in first["said"])


def test_a_run_of_one_rank_with_noise_gets_other_tasks_and_says_so(found):
    first, second = found["from_one"]
    for draws, same in (("False", True), ("True", False)):
        then = [a + b for a, b in zip(first[draws]["x"], second[draws]["x"], strict=True)]
        assert then[0] == first[draws]["whole"][3]  # the first batch is drawn before any noise
        assert (then[1:] == first[draws]["whole"][4:]) is same
        assert "for a method that has some, the tasks from here on are others" in first[draws]["said"][0]


@pytest.mark.parametrize("exchange", ["log", "step", "checkpoint", "end", "validation"])
def test_an_update_that_fails_on_one_rank_stops_both(exchange, found):
    (others, kept), (mine, _) = (each[exchange] for each in found["updates"])
    assert mine[0] == "DeviceMemoryError"
    assert mine[1].startswith("The optimizer's update at step 3 ran out of memory; fewer tasks at a time do not help")
    assert others == ["RankError", f"Rank 1 stopped, and so do all: DeviceMemoryError: {mine[1]}"]
    assert kept is None  # what rank 0 has alone is no step of the run


def test_other_errors_of_an_update_too_and_the_next_run_knows_nothing_of_them(found):
    others, mine = (each["other"][0] for each in found["updates"])
    assert mine == ["ValueError", "no such rate"]
    assert others == ["RankError", "Rank 1 stopped, and so do all: ValueError: no such rate"]
    assert [each["after"] for each in found["updates"]] == [None, None]


def test_a_signal_after_the_last_exchange_ends_both(found):
    assert found["last_step"] == [[["SystemExit", "143"], 5]] * 2


def test_sigterm_from_two_senders_is_one(found):
    assert found["repeated"] == [[["SystemExit", "143"], 4]] * 2
