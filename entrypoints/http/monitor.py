"""Is the server well? The scheduler is asked twice a second; its answer says when it heard of the others last."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from safelight.entrypoints.async_client import AsyncClient
from safelight.entrypoints.http.schemas import Health
from safelight.runtime.errors import SafelightError
from safelight.runtime.messages import ServerStatus

ASK_S = 0.4
SILENT_S = 1.4  # everybody is heard twice a second; a death or a hang has to be told within two


class Monitor:
    """`status` is the newest answer, or None."""

    def __init__(self, client: AsyncClient, parent: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.status: ServerStatus | None = None
        self._client, self._parent, self._clock = client, parent, clock
        self._answered = clock()
        self._was_well = False

    async def run(self) -> None:
        """Asks for ever."""
        while True:
            asked = self._clock()
            with contextlib.suppress(SafelightError):
                self.status = await self._client.status(timeout_s=1.0)
                self._answered = asked
            await asyncio.sleep(max(0.0, ASK_S - (self._clock() - asked)))

    @property
    def ready(self) -> bool:
        """Whether a job would run."""
        return self.status is not None and self.status.ready and self._silence() <= SILENT_S

    def health(self) -> Health:
        """What each component is like."""
        components = {"frontend": "ok", "supervisor": self._supervisor(), "scheduler": self._scheduler()}
        if self.status is not None and components["scheduler"] == "ok":
            components |= self._others(self.status)
        well = self.status is not None and all(state == "ok" for state in components.values())
        self._was_well = self._was_well or well
        return Health(status="ok" if well else "unhealthy" if self._was_well else "starting", components=components)

    def _silence(self) -> float:
        return self._clock() - self._answered

    def _scheduler(self) -> str:
        return "ok" if self._silence() <= SILENT_S else f"silent for {self._silence():.1f} s"

    def _supervisor(self) -> str:
        try:
            stat = Path(f"/proc/{self._parent}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "gone"
        state = stat.rpartition(")")[2].split()[0]
        return "stopped" if state in "TtZX" or os.getppid() != self._parent else "ok"

    def _others(self, status: ServerStatus) -> dict[str, str]:
        late = self._silence()  # what the answer says of silences is as old as it
        output = "ok"
        if not status.output_alive:
            output = "not ready"
        elif status.output_silent_s + late > SILENT_S:
            output = f"silent for {status.output_silent_s + late:.1f} s"
        found = {"output": output}
        for group in status.groups:
            state = "ok" if group.phase == "ready" else group.phase
            if state == "ok" and group.silent_s + late > SILENT_S:
                state = f"silent for {group.silent_s + late:.1f} s"
            found[f"workers {group.group}"] = state
        return found
