"""How many threads are used beside other busy processes."""

from __future__ import annotations

import multiprocessing
import time

from w2c_tui.backends.free_cores import LOOK_EVERY_S, FreeCores


def _busy() -> None:
    while True:
        pass


def _settled(cores: FreeCores) -> int:
    for _ in range(3):
        time.sleep(LOOK_EVERY_S + 0.1)
        found = cores.threads()
    return found


def test_another_busy_process_has_its_core():
    cores = FreeCores(8)
    cores._cores = 8
    assert cores.threads() == 8, "nothing is known yet"
    other = multiprocessing.get_context("spawn").Process(target=_busy, daemon=True)
    other.start()
    try:
        # Until it has started.
        time.sleep(2)
        assert _settled(cores) <= 7
    finally:
        other.kill()
        other.join()


def looked(cores: FreeCores, *, seconds: float, busy: float, own: float) -> int:
    """What it says when its last look was `seconds` ago and so much CPU time was spent since."""
    now = cores._look()
    cores._seen = (now[0] - seconds, now[1] - busy, now[2] - own)
    return cores.threads()


def test_what_this_process_takes_itself_is_free():
    cores = FreeCores(8)
    cores._cores = 8
    assert looked(cores, seconds=2, busy=15.8, own=15.8) == 8
    assert looked(cores, seconds=2, busy=9.8, own=7.8) == 7
    assert looked(cores, seconds=2, busy=15.8, own=1.0) == 1
    assert looked(cores, seconds=2, busy=2.0, own=2.0) == 8


def test_an_old_or_a_recent_look_changes_nothing():
    cores = FreeCores(4)
    cores._cores = 4
    assert looked(cores, seconds=100, busy=400, own=0) == 4
    assert looked(cores, seconds=0.1, busy=0.4, own=0) == 4
