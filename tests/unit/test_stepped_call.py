"""A body on its own thread runs only while its owner waits, and always ends when the owner says so."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from safelight.runtime.models.diffusers_backend.stepped import SteppedCall

Pause = Callable[[], None]


def test_body_and_owner_take_turns_in_order() -> None:
    seen: list[str] = []

    def body(pause: Pause) -> int:
        for step in range(3):
            seen.append(f"body {step}")
            pause()
        return 7

    call = SteppedCall("call", body)
    for step in range(3):
        seen.append(f"owner {step}")
        assert call.advance()
    assert not call.advance()
    assert call.result == 7
    assert seen == [f"{who} {step}" for step in range(3) for who in ("owner", "body")]


def test_two_calls_never_run_at_the_same_time() -> None:
    running = threading.Lock()

    def body(pause: Pause) -> None:
        for _ in range(50):
            assert running.acquire(blocking=False), "another body runs"
            running.release()
            pause()

    calls = [SteppedCall(f"call {number}", body) for number in range(3)]
    for _ in range(50):
        assert all(call.advance() for call in calls)
    for call in calls:
        call.close()


def test_an_error_of_the_body_is_raised_to_the_owner_once_and_frees_its_frames() -> None:
    class Big:
        pass

    held: list[weakref.ref[Big]] = []

    def body(pause: Pause) -> None:
        big = Big()
        held.append(weakref.ref(big))
        pause()
        raise ValueError("no")

    call = SteppedCall("call", body)
    assert call.advance()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no"):
            call.advance()
        assert held[0]() is None
    finally:
        gc.enable()
    assert call.ended
    assert not call.advance()
    call.close()


def test_close_unwinds_a_body_that_is_paused_even_through_handlers() -> None:
    seen: list[str] = []

    def body(pause: Pause) -> None:
        for _ in range(3):
            try:
                pause()
            except Exception:
                seen.append("handled")
            except BaseException:
                seen.append("stopped")  # and goes on to pause again
            finally:
                seen.append("cleaned up")

    call = SteppedCall("call", body)
    call.advance()
    call.close()
    call.close()
    assert seen == ["stopped", "cleaned up"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name == "call"]


def test_a_call_that_never_started_can_be_closed() -> None:
    started: list[bool] = []
    call = SteppedCall("call", lambda pause: started.append(True))
    call.close()
    assert not started
    assert call.ended
