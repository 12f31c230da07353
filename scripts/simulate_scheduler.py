#!/usr/bin/env python3
"""Runs the real scheduler core against simulated workers, output and clients, and prints how each policy serves them.

    python scripts/simulate_scheduler.py --jobs 20000 --load 0.85 --groups 4 --deaths-per-hour 2

Time is simulated; the core is the one that serves. The load is Poisson arrivals of three classes whose step times are
those of Wan 2.1 1.3B at 832x480 on one H100 (81 frames: 520 ms a forward, 21-25 frames: 72 ms, two forwards a step).
Jobs never renew a lease (they are detached); long videos are cancelled when their deadline passes.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from safelight.configs.profile import BatchKey, JobProfile, Phase
from safelight.runtime import messages as m
from safelight.runtime.scheduler import policy
from safelight.runtime.scheduler.core import SchedulerCore
from safelight.runtime.scheduler.events import (
    ClientSaid,
    CoreEvent,
    JournalCommitted,
    JournalWrite,
    OutputSaid,
    RankSaid,
    SendClient,
    SendOutput,
    SendRank,
    SendSupervisor,
    SupervisorSaid,
    Tick,
)
from safelight.runtime.scheduler.state import CoreConfig

COMMIT_S = 0.003
TICK_S = 4.0
RESTART_S = 30.0
GB = 10**9


@dataclass(frozen=True)
class JobClass:
    """`slo_s` is the time to the last frame that a client hopes for; `deadline_s` cancels."""

    name: str
    share: float
    steps: int
    step_ms: float
    chunks: int
    chunk_ms: float
    slo_s: float
    deadline_s: float | None = None

    @property
    def work_s(self) -> float:
        return (20 + self.steps * self.step_ms + self.chunks * self.chunk_ms) / 1000

    def profile(self) -> JobProfile:
        """Costs in TFLOP at 300 TFLOP/s, so that the cost model's prior is near and its learning is seen."""
        shape = (16, self.chunks, 60, 104)
        return JobProfile(
            family="wan", latent_shape=shape, tokens=1560 * self.chunks, steps=self.steps, outputs=1,
            phases=(Phase(0, "wan", BatchKey("wan", shape, True, 512), self.step_ms * 0.3),),
            encode_cost=6.0, decode_chunk_cost=self.chunk_ms * 0.3, chunk_frames=(4,) * self.chunks,
            chunk_bytes=4 * 480 * 832 * 3, conditioning_bytes=8 * 10**6, state_bytes=self.chunks * 10**7,
            encode_peak_bytes=GB, step_peak_bytes=GB // 5 * self.chunks, decode_peak_bytes=4 * GB,
        )  # fmt: skip


CLASSES = (
    JobClass("image", 0.80, 20, 30.0, 1, 30.0, slo_s=10.0),
    JobClass("short video", 0.15, 30, 144.0, 5, 98.0, slo_s=60.0),
    JobClass("long video", 0.05, 50, 1040.0, 21, 98.0, slo_s=600.0, deadline_s=1800.0),
)


@dataclass
class Report:
    """What one run gave."""

    policy: str
    jobs: int
    simulated_s: float = 0.0
    wall_s: float = 0.0
    events: int = 0
    busy_s: float = 0.0
    groups: int = 1
    deaths: int = 0
    latencies: dict[str, list[float]] = field(default_factory=lambda: {c.name: [] for c in CLASSES})
    served_s: dict[int, float] = field(default_factory=dict)  # by group: what the ops would take at speed 1
    missed: dict[str, int] = field(default_factory=lambda: {c.name: 0 for c in CLASSES})  # refused, cancelled, failed

    def attainment(self, c: JobClass) -> float:
        done = self.latencies[c.name]
        return sum(s <= c.slo_s for s in done) / max(1, len(done) + self.missed[c.name])

    def as_dict(self) -> dict[str, Any]:
        met = sum(self.attainment(c) * (len(self.latencies[c.name]) + self.missed[c.name]) for c in CLASSES)
        classes = {
            c.name: {
                "slo": round(self.attainment(c), 4), "p50_s": round(quantile(self.latencies[c.name], 0.5), 2),
                "p99_s": round(quantile(self.latencies[c.name], 0.99), 2), "missed": self.missed[c.name],
            }
            for c in CLASSES
        }  # fmt: skip
        return {
            "policy": self.policy, "jobs": self.jobs, "slo": round(met / self.jobs, 4), "classes": classes,
            "idle": round(1 - self.busy_s / (self.groups * self.simulated_s), 4), "deaths": self.deaths,
            "served": {g: round(t / sum(self.served_s.values()), 3) for g, t in sorted(self.served_s.items())},
            "simulated_h": round(self.simulated_s / 3600, 2), "events": self.events,
            "events_per_s": round(self.events / self.wall_s),
        }  # fmt: skip


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


@dataclass
class Worker:
    """One group of one rank: runs plans in order."""

    group: int
    speed: float = 1.0
    epoch: int = 0
    plans: list[m.Plan] = field(default_factory=list)
    alive: bool = True
    last: int = -1


class Simulation:
    """An event queue around one core."""

    def __init__(
        self, name: str, jobs: int, groups: int, load: float, deaths_per_hour: float, seed: int,
        speeds: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.random = random.Random(seed)  # of arrivals: every policy gets the same ones
        self.noise = random.Random(seed + 1)  # of what ops take, and deaths
        self.report = Report(name, jobs, groups=groups)
        self.profiles = {c.steps: c.profile() for c in CLASSES}
        config = CoreConfig(
            groups=groups, policy=policy.by_name(name), slot_count=16, slot_bytes=10**8, max_queue=10_000,
            profile_of=lambda r: self.profiles[r.num_inference_steps], keep_ended=1000, job_id=re.compile(".+"),
        )  # fmt: skip
        self.core = SchedulerCore(config, 1)
        self.now = 0.0
        self.workers = [Worker(g, *speeds[g : g + 1]) for g in range(groups)]
        self.running: dict[str, tuple[JobClass, float]] = {}
        self.left = jobs
        self.rate = load * sum(w.speed for w in self.workers) / sum(c.share * c.work_s for c in CLASSES)
        self.deaths_per_s = deaths_per_hour / 3600
        self.commit_planned = False
        self.token = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def run(self) -> Report:
        """Until every job has ended."""
        started = time.perf_counter()
        self.tick()
        self.arrive()
        if self.deaths_per_s > 0:
            self.later(self.noise.expovariate(self.deaths_per_s), self.kill_one)
        while self.left or self.running:
            self.now, _, happen = heapq.heappop(self._queue)
            happen()
        self.report.simulated_s, self.report.wall_s = self.now, time.perf_counter() - started
        return self.report

    def later(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), happen))

    def feed(self, event: CoreEvent) -> None:
        self.report.events += 1
        for action in self.core.handle(event, self.now):
            if isinstance(action, SendRank):
                self.rank_receives(self.workers[action.group], action)
            elif isinstance(action, SendOutput):
                self.output_receives(action.message)
            elif isinstance(action, JournalWrite):
                self.token = action.token
                if not self.commit_planned:
                    self.commit_planned = True
                    self.later(COMMIT_S, self.commit)
            elif isinstance(action, SendClient) and isinstance(action.message, m.Refused):
                self.report.missed[self.running.pop(action.message.job)[0].name] += 1
            elif isinstance(action, SendSupervisor) and isinstance(action.message, m.KillGroup):
                raise RuntimeError(f"the core killed a healthy group: {action.message.reason}")

    # ---- clients

    def arrive(self) -> None:
        """One job now, the next one later."""
        self.left -= 1
        kind = self.random.choices(CLASSES, [c.share for c in CLASSES])[0]
        job = f"j{self.left}"
        self.running[job] = (kind, self.now)
        media = m.MediaSpec(m.MediaFormat.MP4)
        request = m.GenerationRequest("", "", {}, 480, 832, 1, 16, kind.steps, 5.0, 0, 1, "unipc", media)
        self.feed(ClientSaid(b"", m.Submit(job, "me", request, attached=False, deadline_s=kind.deadline_s)))
        if self.left:
            self.later(self.random.expovariate(self.rate), self.arrive)

    def commit(self) -> None:
        self.commit_planned = False
        self.feed(JournalCommitted(self.token))

    def tick(self) -> None:
        self.later(TICK_S, self.tick)
        for w in self.workers:
            if w.alive:
                self.feed(RankSaid(m.Heartbeat(w.group, 0, 1, w.epoch, 1, True)))
        self.feed(OutputSaid(m.OutputHello("out", 1)))
        self.feed(Tick())

    # ---- workers

    def rank_receives(self, w: Worker, action: SendRank) -> None:
        message = action.message
        if action.group_epoch != w.epoch or not w.alive:
            return
        if isinstance(message, m.InventoryRequest):
            ready = m.Ready(w.group, 0, 1, w.epoch, 80 * GB, 10 * GB, 2 * GB, "cuda")
            inventory = m.Inventory(message.scheduler_epoch, w.group, 0, w.epoch, -1, -1, -1, ())
            self.later(0.0, lambda: self.feed(RankSaid(ready)))
            self.later(0.0, lambda: self.feed(RankSaid(inventory)))
        elif isinstance(message, m.Plan):
            if message.number != w.last + 1:
                raise RuntimeError(f"plan {message.number} after {w.last}")
            w.last = message.number
            w.plans.append(message)
            if len(w.plans) == 1:
                self.begin(w)

    def begin(self, w: Worker) -> None:
        """Runs the first plan; its ops take their class's time, give or take 3 %."""
        results = []
        for op in w.plans[0].ops:
            results.append(m.OpResult(ms=self.op_ms(op) / w.speed, last_chunk=self.is_last(op)))
        self.later(sum(r.ms for r in results) / 1000, partial(self.finish, w, w.epoch, tuple(results)))

    def op_ms(self, op: m.Op) -> float:
        if isinstance(op, m.Drop | m.Release | m.Checkpoint | m.Preview):
            return 0.0
        job = op.units[0].job if isinstance(op, m.Denoise) else op.job
        kind = self.running[job][0] if job in self.running else CLASSES[0]
        if isinstance(op, m.Denoise):
            return kind.step_ms * self.noise.uniform(0.97, 1.03)
        if isinstance(op, m.Decode):
            return kind.chunk_ms * self.noise.uniform(0.97, 1.03)
        return 20.0 if isinstance(op, m.Encode) else 2.0

    def is_last(self, op: m.Op) -> bool:
        if not isinstance(op, m.Decode) or op.job not in self.running:
            return False
        return op.chunk + 1 == self.running[op.job][0].chunks

    def finish(self, w: Worker, epoch: int, results: tuple[m.OpResult, ...]) -> None:
        if w.epoch != epoch or not w.alive:
            return
        plan = w.plans.pop(0)
        spent = sum(r.ms for r in results) / 1000
        self.report.busy_s += spent
        self.report.served_s[w.group] = self.report.served_s.get(w.group, 0.0) + spent * w.speed
        for op, result in zip(plan.ops, results, strict=True):
            if isinstance(op, m.Decode):
                self.later(0.04, partial(self.encoded, op, result.last_chunk))
        if w.plans:
            self.begin(w)
        self.feed(RankSaid(m.PlanDone(plan.scheduler_epoch, w.group, 0, epoch, plan.number, results)))

    def kill_one(self) -> None:
        self.later(self.noise.expovariate(self.deaths_per_s), self.kill_one)
        w = self.noise.choice(self.workers)
        if w.alive:
            w.alive = False
            self.report.deaths += 1
            self.feed(SupervisorSaid(m.RankExited(w.group, w.epoch, "simulated")))
            self.later(RESTART_S, partial(self.restart, w))

    def restart(self, w: Worker) -> None:
        w.epoch, w.alive, w.last = w.epoch + 1, True, -1
        w.plans.clear()
        self.feed(SupervisorSaid(m.GroupStarting(w.group, w.epoch, 1)))

    # ---- output

    def encoded(self, op: m.Decode, last: bool) -> None:
        """40 ms after its decode a chunk is read; the file follows the last one."""
        self.feed(OutputSaid(m.SlotReleased(op.slot, op.job, op.attempt, op.index, op.take, op.chunk)))
        if last:
            artifact = m.Artifact(op.index, "/x.mp4", "video/mp4", 1, "0")
            self.feed(OutputSaid(m.ArtifactCommitted(op.job, op.attempt, op.take, artifact)))

    def output_receives(self, message: m.ToOutput) -> None:
        if isinstance(message, m.Publish):
            kind, since = self.running.pop(message.job)
            if message.status == m.Status.COMPLETED:
                self.report.latencies[kind.name].append(self.now - since)
            else:
                self.report.missed[kind.name] += 1
        elif isinstance(message, m.OutputReset):
            self.later(0.0, lambda: self.feed(OutputSaid(m.OutputReady("out", message.scheduler_epoch))))
        elif isinstance(message, m.DropOutput):
            self.later(0.01, lambda: self.feed(OutputSaid(m.OutputDropped(message.job, message.attempt))))


def table(reports: Sequence[Report]) -> str:
    """Markdown, one line per policy."""
    heads = [f"{c.name} SLO {c.slo_s:.0f} s: met, p50, p99" for c in CLASSES]
    lines = [
        "| policy | SLO met | " + " | ".join(heads) + " | idle | events/s |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for r in reports:
        d = r.as_dict()
        cells = [
            f"{v['slo']:.1%}, {v['p50_s']:.1f} s, {v['p99_s']:.1f} s" for v in (d["classes"][c.name] for c in CLASSES)
        ]
        lines.append(f"| {r.policy} | {d['slo']:.1%} | {' | '.join(cells)} | {d['idle']:.1%} | {d['events_per_s']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[Report]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--speeds", type=float, nargs="+", default=[], help="of the groups, 1 where not given")
    parser.add_argument("--load", type=float, default=0.85, help="share of the groups' time that is asked for")
    parser.add_argument("--deaths-per-hour", type=float, default=0.0)
    parser.add_argument("--policy", nargs="+", default=["fcfs", "sjf", "fair"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    reports = []
    for name in args.policy:
        simulation = Simulation(name, args.jobs, args.groups, args.load, args.deaths_per_hour, args.seed, args.speeds)
        reports.append(simulation.run())
        print(json.dumps(reports[-1].as_dict()), flush=True)
    print(table(reports))
    return reports


if __name__ == "__main__":
    main()
