"""Every error that crosses a module or process boundary.

    SafelightError
    ├── InvalidRequest        a parameter of one request is wrong (names the parameter and the nearest valid value)
    │   └── TooLarge          the request can never fit this server's memory
    ├── ConfigError           a flag, file or variable of this process is wrong
    │   └── ModelError        the model's folder is missing, corrupt or of an unknown kind
    │       └── UnsupportedModel  a sound model of a kind that this backend does not run
    ├── Overloaded            the queue is full (carries retry_after_s)
    ├── Conflict              the job id exists with another body
    ├── NotFound              no such job
    ├── Cancelled             the job was cancelled (by its client, by its lease, by shutdown)
    ├── JobFailed             the job ended in an error of its own
    │   └── Poisoned          the job killed its worker twice while it ran alone
    ├── StartupError          a process could not start (port, memory, peer)
    ├── WorkerLost            a rank or a process that the caller needs is gone
    └── ProtocolError         a frame that no correct peer sends (length, checksum, epoch, tag)

A message says what was expected, what came, and what to change. `code` is the stable machine name that travels in
`messages.ErrorInfo`; HTTP status codes belong to `entrypoints/http/errors.py`.
"""

from __future__ import annotations

from typing import ClassVar


class SafelightError(Exception):
    """Base of the tree. `param` names the offending parameter, when one can be named."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(SafelightError):
    code = "invalid_request"


class TooLarge(InvalidRequest):
    code = "too_large"


class ConfigError(SafelightError):
    code = "config_error"


class ModelError(ConfigError):
    code = "model_error"


class UnsupportedModel(ModelError):
    code = "unsupported_model"


class Overloaded(SafelightError):
    code = "overloaded"


class Conflict(SafelightError):
    code = "conflict"


class NotFound(SafelightError):
    code = "not_found"


class Cancelled(SafelightError):
    code = "cancelled"


class JobFailed(SafelightError):
    code = "job_failed"


class Poisoned(JobFailed):
    code = "poisoned"


class StartupError(SafelightError):
    code = "startup_error"


class WorkerLost(SafelightError):
    code = "worker_lost"


class ProtocolError(SafelightError):
    code = "protocol_error"


def _tree(root: type[SafelightError]) -> dict[str, type[SafelightError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def from_code(code: str, message: str, param: str | None = None, retry_after_s: float | None = None) -> SafelightError:
    """The typed error for a code that came over a wire; an unknown code becomes the base class."""
    kind = _tree(SafelightError).get(code, SafelightError)
    return kind(message, param=param, retry_after_s=retry_after_s)
