from mosel.launcher.backoff import FIRST_PAUSE_S, LONGEST_PAUSE_S, RAN_WELL_S, Backoff


def test_pauses_double_up_to_the_longest_and_never_end() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_s(RAN_WELL_S / 2) for _ in range(12)]
    assert pauses[:4] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S, 8 * FIRST_PAUSE_S]
    assert pauses == sorted(pauses)
    assert pauses[-2:] == [LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_after_it_ran_well_the_first_pause_is_short_again() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.pause_s(RAN_WELL_S / 2)
    assert backoff.pause_s(RAN_WELL_S) == FIRST_PAUSE_S
    assert backoff.pause_s(0.0) == 2 * FIRST_PAUSE_S
