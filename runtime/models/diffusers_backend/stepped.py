"""A function that runs in pieces: on a thread of its own, but only while its owner waits for the next piece.

So the code of a whole pipeline call is executed step by step, and never beside anything else that its owner does.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Stopped(BaseException):
    """Unwinds a call that is not wanted any more; no handler of exceptions in it catches this."""


class SteppedCall(Generic[T]):
    """`body(pause)` runs until its next `pause()` with each `advance()`, and ends at the latest with `close()`.

    Owner and body take turns: exactly one of both threads runs at any time. Thread-local settings of the owner
    (inference mode, the CUDA device) do not hold in the body.
    """

    def __init__(self, name: str, body: Callable[[Callable[[], None]], T]) -> None:
        self._body: Callable[[Callable[[], None]], T] | None = body
        self._turn_of_body = threading.Semaphore(0)
        self._turn_of_owner = threading.Semaphore(0)
        self._stopping = False
        self._ended = False
        self._result: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """The body has returned, raised or been closed."""
        return self._ended

    @property
    def result(self) -> T:
        """What the body returned."""
        assert self._result is not None, "advance returned False"
        return self._result

    def advance(self) -> bool:
        """Runs the body up to its next pause; False when it has returned. Raises what it raised."""
        if not self._ended:
            self._turn_of_body.release()
            self._turn_of_owner.acquire()
        if self._ended:
            self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return not self._ended

    def close(self) -> None:
        """Ends the body where it stands, and frees what it held."""
        self._stopping = True
        while not self._ended:  # again if the body caught the exception and paused once more
            self._turn_of_body.release()
            self._turn_of_owner.acquire()
        self._thread.join()
        self._body = self._result = self._error = None

    def _run(self) -> None:
        self._turn_of_body.acquire()
        try:
            if not self._stopping and self._body is not None:
                self._result = self._body(self._pause)
        except _Stopped as stopped:
            traceback.clear_frames(stopped.__traceback__)
        except BaseException as error:  # it is the owner's: raised again by `advance`
            traceback.clear_frames(error.__traceback__)  # which would hold every tensor of the call
            self._error = error if not self._stopping else None
        finally:
            self._body = None
            self._ended = True
            self._turn_of_owner.release()

    def _pause(self) -> None:
        self._turn_of_owner.release()
        self._turn_of_body.acquire()
        if self._stopping:
            raise _Stopped
