"""`python -m safelight.entrypoints.frontend FOLDER AGENT_PID COMMAND ...`: the command beside torchrun's rank 0.

It outlives restarts of the ranks, and ends with the agent (the torchrun process) that started the first of them. Its
exit code is left in FOLDER.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import threading
from pathlib import Path

from safelight.entrypoints import cli
from safelight.runtime.launch.torchrun import EXIT_FILE

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
        _leave(folder, code, agent_gone=bool(select.select([handle], [], [], 0)[0]))


def _leave(folder: Path, code: int, *, agent_gone: bool) -> None:
    """The exit code for the ranks that wait for it; nobody does once the agent is gone."""
    if agent_gone:
        shutil.rmtree(folder, ignore_errors=True)
        return
    temporary = folder / f".{EXIT_FILE}"
    temporary.write_text(str(code), encoding="ascii")
    temporary.replace(folder / EXIT_FILE)


def _end_with(handle: int) -> None:
    """What Ctrl-C does, when the agent ends: nothing of it outlives torchrun."""
    select.select([handle], [], [])
    os.kill(os.getpid(), signal.SIGINT)
    select.select([], [], [], _PATIENCE_S)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
