"""`python -m safelight.entrypoints.frontend FOLDER AGENT_PID COMMAND ...`: the command beside torchrun's rank 0.

It outlives restarts of the ranks, and ends with the agent (the torchrun process) that started the first of them. Its
exit code is left in FOLDER.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from safelight.entrypoints import cli
from safelight.runtime.launch.torchrun import EXIT_FILE

_READING_S = 20.0  # of the exit code; ranks that are being restarted take so long
_PATIENCE_S = 15.0  # of the first signal; the second one ends the command at once


def main(folder: Path, agent: int, command: list[str]) -> None:
    """Runs the command of the `safelight` command line; exits with its code."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        handle = os.pidfd_open(agent)
    except ProcessLookupError:
        shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(1) from None
    threading.Thread(target=_end_with, args=(handle,), name="agent", daemon=True).start()
    sys.argv = ["safelight", *command]
    code = 1
    try:
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has been answered, and a second one would leave the folder
        _leave(folder, code, handle)


def _leave(folder: Path, code: int, agent: int) -> None:
    """The exit code for rank 0, which deletes the folder once it has read it. Nobody does when the ranks are gone."""
    temporary = folder / f".{EXIT_FILE}"
    with contextlib.suppress(FileNotFoundError):  # the folder is gone, and nobody waits any more
        temporary.write_text(str(code), encoding="ascii")
        temporary.replace(folder / EXIT_FILE)
    deadline = time.monotonic() + _READING_S
    while folder.exists() and time.monotonic() < deadline:
        if select.select([agent], [], [], 0.05)[0]:
            break
    shutil.rmtree(folder, ignore_errors=True)


def _end_with(handle: int) -> None:
    """What Ctrl-C does, when the agent ends: nothing of it outlives torchrun."""
    select.select([handle], [], [])
    os.kill(os.getpid(), signal.SIGINT)
    select.select([], [], [], _PATIENCE_S)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
