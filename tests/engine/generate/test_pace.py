"""How far to guess: the published figures, and what measured times and guesses lead to."""

import pytest

from engine.generate.pace import EVERY, PAUSES, STEPS, TRIES, Pace, speed_up


@pytest.mark.parametrize(
    "right, count, cost, expected",
    [
        (0.8, 4, 0, 3.3616),  # Leviathan et al. 2023, equation 1
        (0.6, 3, 0, 2.176),
        (0.9, 8, 0, 6.1258),
        (0.8, 4, 0.1, 2.4011),  # and theorem 3.8
        (0.0, 5, 0.2, 0.5),
        (1.0, 5, 0.0, 6.0),
        (0.5, 0, 9.0, 1.0),
    ],
)
def test_the_published_formula(right, count, cost, expected):
    assert speed_up(right, count, cost) == pytest.approx(expected, abs=1e-4)


def played(pace: Pace, right, cost: float, passes: int) -> list[int]:
    """Let `right(count)` of the guesses be right, each costing `cost` plain steps of a second."""
    counts = []
    for _ in range(passes):
        counts.append(pace.length(1000))
        pace.note(counts[-1], right(counts[-1]), 1 + cost * counts[-1])
    return counts


def test_it_begins_with_plain_steps_and_takes_another_now_and_then():
    counts = played(Pace(8), lambda count: count, 0.01, 200)
    assert counts[:STEPS] == [0] * STEPS
    assert all(counts[STEPS : STEPS + EVERY])
    assert counts[STEPS + EVERY] == 0
    assert 2 <= counts[STEPS:].count(0) <= 200 / EVERY


def test_right_guesses_make_it_longer_and_wrong_ones_shorter():
    pace = Pace(16)
    first = played(pace, lambda count: count, 0.05, STEPS + 1)[-1]
    grown = played(pace, lambda count: count, 0.05, 20)[-1]
    assert 1 < first < grown == 16
    shrunk = played(pace, lambda count: min(1, count), 0.05, 12)
    assert shrunk[-1] < first
    assert shrunk == sorted(shrunk, reverse=True)


def test_it_pauses_when_it_loses_tries_again_and_gives_up():
    pace = Pace(8)
    counts = played(pace, lambda count: 0, 0.5, 3000)
    assert counts[STEPS : STEPS + TRIES] != [0] * TRIES
    tried = [place for place, count in enumerate(counts) if count]
    ends = [tried[(turn + 1) * TRIES - 1] for turn in range(len(PAUSES) + 1)]
    assert [later - sooner for sooner, later in zip(ends, ends[1:], strict=False)] == [
        pause + TRIES for pause in PAUSES
    ]
    assert len(tried) == TRIES * (len(PAUSES) + 1)  # and never again
    report = pace.report("lookup")
    assert report.off.startswith("given up: ") and report.off.endswith("0.50 of a token's time")
    assert report.real == pytest.approx(report.expected, rel=0.1)
    assert 0.9 < report.real < 1
    pace.begin()
    assert pace.report("lookup").off == "" and any(played(pace, lambda count: 0, 0.5, 9))


def test_only_losses_in_a_row_end_it():
    """Each time that guesses pay for a while, it is as patient as at first."""
    pace = Pace(8)
    for _ in range(5):
        played(pace, lambda count: 0, 0.5, 20)
        assert pace.report("x").off.startswith("paused")
        assert all(played(pace, lambda count: count, 0.05, PAUSES[-1] + 60)[-10:])


def test_it_comes_back_when_guesses_become_right():
    pace = Pace(8)
    played(pace, lambda count: 0, 0.3, 40)
    assert all(played(pace, lambda count: count, 0.1, PAUSES[0] + 60)[-20:])


def test_costly_guesses_are_few():
    """Right eight times of ten, but each as dear as most of a token: one at a time, or none."""
    dear, cheap = Pace(16), Pace(16)
    for pace, cost in ((dear, 0.45), (cheap, 0.02)):
        played(pace, lambda count: int(0.8 * count), cost, 60)
    assert dear.length(99) <= 2 < 4 < cheap.length(99)


def test_room_and_a_stop_are_kept():
    pace = Pace(8)
    played(pace, lambda count: count, 0.0, 10)
    assert [pace.length(room) for room in (-1, 0, 1, 3, 99)] == [0, 0, 1, 3, 8]
    pace.stop("because")
    assert pace.length(99) == 0
    assert pace.report("x").off == "because"
    pace.begin()
    assert pace.report("x").off == ""


def test_without_the_clock_the_seconds_change_nothing():
    def counts(cost, timed):
        pace = Pace(8, cost=0.2)
        pace.begin(timed=timed)
        return played(pace, lambda count: count // 2, cost, 200)

    assert counts(0.01, False) == counts(3.0, False)
    assert counts(0.01, True) != counts(3.0, True)


def test_the_report_by_hand():
    """Ten passes: three plain, seven that check four guesses at a tenth of a step, three right."""
    pace = Pace(4)
    for count in [0] * 3 + [4] * 7:
        pace.note(count, 3 if count else 0, 1 + 0.1 * count)
    report = pace.report("lookup")
    assert (report.tokens, report.forwards, report.guessing) == (31, 10, 7)
    assert (report.guessed, report.accepted, report.accepted_per_forward) == (28, 21, 3.0)
    assert report.expected == pytest.approx(31 / 12.8)
    assert report.real == pytest.approx(31 / 12.8)
    empty = Pace().report("lookup")
    assert (empty.tokens, empty.expected, empty.real, empty.accepted_per_forward) == (
        0,
        None,
        None,
        0,
    )
