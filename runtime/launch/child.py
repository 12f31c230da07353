"""The start of a torch-free child (scheduler, output, frontend): `python -m safelight.runtime.launch.child ROLE`.

stdin carries the length-prefixed spec and then stays open as long as the supervisor lives. A child that cannot start
writes one encoded ErrorInfo to stdout and exits with 1.
"""

from __future__ import annotations

import os
import struct
import sys
import threading

import msgspec

from safelight.runtime import logs
from safelight.runtime.errors import SafelightError
from safelight.runtime.messages import ErrorInfo, FrontendSpec, OutputSpec, SchedulerSpec

_LENGTH = struct.Struct(">I")


def frame_spec(spec: SchedulerSpec | OutputSpec | FrontendSpec) -> bytes:
    """What the supervisor writes to the child's stdin."""
    data = msgspec.msgpack.encode(spec)
    return _LENGTH.pack(len(data)) + data


def main(role: str) -> None:
    """Runs the process main of `role` until it returns or the supervisor is gone."""
    spec_bytes = _read(_LENGTH.unpack(_read(_LENGTH.size))[0])
    status = os.dup(1)
    os.dup2(2, 1)  # nothing but the status may reach the supervisor's pipe
    threading.Thread(target=_exit_with_supervisor, name="parent", daemon=True).start()
    try:
        _run(role, spec_bytes)
    except SafelightError as error:
        os.write(status, msgspec.msgpack.encode(ErrorInfo(error.code, error.message, error.param)))
        raise SystemExit(1) from None


def _read(nbytes: int) -> bytes:
    """Exactly `nbytes` of stdin, unbuffered: a buffered stdin held by a thread aborts the interpreter at its end."""
    data = b""
    while len(data) < nbytes:
        part = os.read(0, nbytes - len(data))
        if not part:
            raise SystemExit("the supervisor was gone before it had sent the specification")
        data += part
    return data


def _run(role: str, spec_bytes: bytes) -> None:
    if role == "scheduler":
        from safelight.runtime.scheduler import main as scheduler

        spec = msgspec.msgpack.decode(spec_bytes, type=SchedulerSpec)
        logs.configure(role, spec.log_level)
        scheduler.main(spec)
    elif role == "frontend":
        from safelight.entrypoints.http import main as frontend

        frontend_spec = msgspec.msgpack.decode(spec_bytes, type=FrontendSpec)
        logs.configure(role, frontend_spec.log_level)
        frontend.main(frontend_spec)
    else:
        from safelight.runtime.output import main as output

        output_spec = msgspec.msgpack.decode(spec_bytes, type=OutputSpec)
        logs.configure(role, output_spec.log_level)
        output.main(output_spec)


def _exit_with_supervisor() -> None:
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
