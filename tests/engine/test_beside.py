import threading

import pytest

from engine.beside import Beside


def test_the_call_goes_on_while_this_thread_does():
    go = threading.Event()
    beside = Beside(lambda: go.wait(10) and 42)
    go.set()  # a call that ran here would wait for this until it gave up
    assert beside.result() == 42


def test_what_the_call_raises_is_raised_where_it_is_waited_for():
    beside = Beside(lambda: [][1])
    with pytest.raises(IndexError):
        beside.result()
