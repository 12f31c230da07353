"""The worker groups of one server: started, watched, started again when a rank dies, given up when that cannot help."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq

from safelight.configs.server_args import ServerArgs
from safelight.runtime.errors import ConfigError, ModelError, StartupError, UnsupportedModel, from_code
from safelight.runtime.launch.children import MAX_FAILED_STARTS
from safelight.runtime.launch.joining import JoinDesk, JoinedRank
from safelight.runtime.launch.processes import Group, Rank, RankStarter
from safelight.runtime.messages import (
    ErrorInfo,
    GroupFailed,
    GroupGivenUp,
    GroupStarting,
    Join,
    KillGroup,
    PhaseReport,
    RankExited,
    RankSilent,
    Ready,
    ToControlled,
    Welcome,
    WorkerSpec,
)

_FINAL_ERRORS = (ConfigError.code, ModelError.code, UnsupportedModel.code)  # trying again cannot help
log = logging.getLogger(__name__)


class WorkerGroups:
    """Ranks are processes of ours, or with `--worker-endpoint` those that torchrun starts, which join at a desk.

    `spec_of` and `welcome_of` make what a rank is told (group, rank's number, and how it joined); `tell` sends to the
    scheduler, which is told of the start and the end of each epoch. `failure` is set when no group can run again.
    Belongs to the supervisor's lock.
    """

    def __init__(
        self,
        args: ServerArgs,
        starter: RankStarter,
        spec_of: Callable[[Group, int], WorkerSpec],
        welcome_of: Callable[[Group, int, Join], Welcome],
        tell: Callable[[ToControlled], bool],
    ) -> None:
        self._args = args
        self._spec_of, self._welcome_of, self._tell = spec_of, welcome_of, tell
        self._starter = starter
        self._desk: JoinDesk | None = None
        self.groups = [Group(number) for number in range(args.replicas)]
        self.failure: StartupError | None = None

    # ---- the supervisor's side

    def warm(self) -> None:
        """Begins with the imports that ranks of ours need."""
        if self._args.worker_endpoint is None:
            self._starter.warm()

    def start(self, context: zmq.Context[Any], device: str) -> None:
        """Starts all groups. Raises StartupError, WorkerLost, and ConfigError for an endpoint without keys."""
        args = self._args
        if args.worker_endpoint is not None:
            self._desk = JoinDesk(context, args.worker_endpoint, args.keys, args.num_gpus, device)
        for group in self.groups:
            self._start_group(group)

    def end(self) -> None:
        """Ends all ranks; those of torchrun are asked to leave."""
        if self._desk:
            self._desk.dismiss()
            self._desk = None
            for group in self.groups:
                group.ranks = []
        for group in self.groups:
            group.kill()

    @property
    def settled(self) -> bool:
        """Whether each group is ready, or given up."""
        return all(group.ready or group.given_up for group in self.groups)

    @property
    def phase(self) -> str:
        """What the groups are doing, for people."""
        return ", ".join(sorted({group.phase for group in self.groups}))

    def pids(self) -> dict[str, int]:
        """Of ranks that are our processes, by "worker group.rank"."""
        return {
            f"worker {group.number}.{number}": rank.pid
            for group in self.groups
            for number, rank in enumerate(group.ranks)
            if isinstance(rank, Rank)
        }

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """Of the desk, to poll beside `descriptors`."""
        return self._desk.socket if self._desk else None

    def descriptors(self) -> list[int]:
        """One becomes readable when a rank says something, or ends."""
        return [descriptor for group in self.groups for rank in group.ranks for descriptor in rank.descriptors()]

    def watch(self, ready: set[int]) -> None:
        """Takes in what ranks said, and ends the groups of those that ended."""
        if self._desk:
            self._watch_desk(self._desk)
        for group in self.groups:
            self._watch_group(group, ready)

    def introduce(self) -> None:
        """What a new scheduler must know: the newest epoch of each group, and that earlier ones are dead."""
        for group in self.groups:
            if group.epoch > 0:
                self._tell(RankExited(group.number, group.epoch - 1, "before this scheduler"))
            self._announce(group)

    def complaint(self, message: RankSilent | KillGroup) -> None:
        """The scheduler found a rank silent, or wants a group ended. What is said of another epoch than the present is
        late, or nonsense, and changes nothing."""
        group = self.groups[message.group] if 0 <= message.group < len(self.groups) else None
        if group is None or group.epoch != message.group_epoch or not group.ranks:
            return
        if isinstance(message, KillGroup):
            self._restart_group(group, message.reason)
        elif 0 <= message.rank < len(group.ranks) and (state := group.ranks[message.rank].state()) in "TtZX":
            silence = f"rank {message.rank} silent for {message.seconds:.0f} s"
            self._restart_group(group, f"{silence}, process state {state}")

    # ---- one group

    def _start_group(self, group: Group) -> None:
        group.error, group.phase = None, "starting"
        if self._desk:
            return  # torchrun starts its ranks
        for number in range(self._args.group_size):
            group.ranks.append(self._starter.start(self._spec_of(group, number)))

    def _watch_group(self, group: Group, ready: set[int]) -> None:
        for number, rank in enumerate(group.ranks):
            if self._desk or ready.intersection(rank.descriptors()):
                for message in rank.messages():
                    self._note_status(group, rank, message)
            if (end := rank.ended(ready)) or (self._desk and group.error):
                self._restart_group(group, group.error.message if group.error else f"rank {number} {end}")
                return

    def _note_status(self, group: Group, rank: Rank | JoinedRank, message: PhaseReport | Ready | GroupFailed) -> None:
        match message:
            case PhaseReport(phase=phase):
                group.phase = phase
            case Ready():
                rank.ready = True
                if group.ready:
                    group.phase, group.failed_starts = "ready", 0
            case GroupFailed(error=error):
                group.error = group.error or error

    def _restart_group(self, group: Group, reason: str) -> None:
        was_ready = group.ready
        log.error("group %d epoch %d ends: %s", group.number, group.epoch, reason)
        group.kill()
        self._tell(RankExited(group.number, group.epoch, reason))
        group.failed_starts = 0 if was_ready else group.failed_starts + 1
        final = group.error is not None and group.error.code in _FINAL_ERRORS and not was_ready
        if self._desk:
            self._desk.end()  # its agent restarts all ranks of torchrun together
        if final or group.failed_starts >= MAX_FAILED_STARTS:
            self._give_up(group, group.error or ErrorInfo(StartupError.code, reason))
            return
        group.epoch += 1
        self._start_group(group)
        self._announce(group)
        if self._desk and (other := next((other for other in self.groups if other.ranks), None)):
            self._restart_group(other, reason)

    def _give_up(self, group: Group, why: ErrorInfo) -> None:
        group.phase, group.given_up = "dead", why
        self._announce(group)
        if self._desk or all(other.given_up for other in self.groups):
            self.failure = StartupError(why.message)
            if why.code in _FINAL_ERRORS:
                self.failure.__cause__ = from_code(why.code, why.message, why.param)

    def _announce(self, group: Group) -> None:
        if group.given_up:
            self._tell(GroupGivenUp(group.number, group.given_up))
        else:
            self._tell(GroupStarting(group.number, group.epoch, self._args.group_size))

    # ---- under torchrun

    def _watch_desk(self, desk: JoinDesk) -> None:
        """Ranks that torchrun started come and go by rounds of all of them."""
        if (reason := desk.receive()) and (at_work := next((group for group in self.groups if group.ranks), None)):
            self._restart_group(at_work, reason)
        if ranks := desk.begin():
            size = self._args.group_size
            for group in self.groups:
                self._welcome(group, [ranks[group.number * size + number] for number in range(size)])
        for group in self.groups:
            group.phase = group.phase if desk.round else desk.phase
        if desk.idle_s > self._args.startup_timeout_s:
            self.failure = StartupError(
                f"{desk.phase}, and that for {desk.idle_s:.0f} s; raise --startup-timeout-s, or start them"
            )

    def _welcome(self, group: Group, ranks: list[JoinedRank]) -> None:
        group.epoch += 1
        group.ranks, group.phase = [*ranks], "starting"
        self._announce(group)
        for number, rank in enumerate(ranks):
            rank.welcome(self._welcome_of(group, number, rank.join))
