#!/usr/bin/env python3
"""Kills and stops random processes of a real server at random moments while jobs run, and checks every result.

    python scripts/soak_faults.py MODEL_DIR [--faults 100] [--num-gpus 2] [--replicas 1] [--seed 0]

MODEL_DIR is a checkpoint such as `scripts/make_checkpoint.py wan2.1-t2v DIR` makes. Four jobs are always in flight,
one of them detached. Each must end once, completed, with exactly the frames of an undisturbed run. Prints one JSON line
with the counts, and exits with 1 if anything was lost, answered twice or changed.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from safelight.configs.server_args import ServerArgs
from safelight.entrypoints.client import Client
from safelight.runtime.errors import Poisoned
from safelight.runtime.launch.supervisor import Supervisor
from safelight.runtime.messages import Event, GenerationRequest, MediaFormat, MediaSpec, Status

IN_FLIGHT = 4
SEEDS = 3  # different requests
STUCK_S = 120.0  # without any terminal


def request(seed: int) -> GenerationRequest:
    """A job of about a second."""
    return GenerationRequest(
        prompt="a cat",
        negative_prompt="",
        token_ids={"prompt": (20, 8, 1), "negative": (1,)},
        height=32,
        width=32,
        num_frames=5,
        fps=8,
        num_inference_steps=200,
        guidance_scale=5.0,
        seed=seed,
        num_outputs=2,
        sampler="unipc",
        media=MediaSpec(MediaFormat.NPY),
    )


def digest(event: Event) -> str:
    """Of all frames of a completed job."""
    frames = [np.load(Path(artifact.path)) for artifact in event.artifacts]
    return hashlib.sha256(b"".join(f.tobytes() for f in frames)).hexdigest()


class Soak:
    """The running jobs, what came of them, and the faults done so far."""

    def __init__(self, server: Supervisor, client: Client, seed: int) -> None:
        self.server, self.client, self.random = server, client, random.Random(seed)
        self.running: dict[str, int] = {}
        self.ended: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.expected: dict[int, str] = {}
        self.wrong: list[str] = []
        self.poisoned = 0
        self.last_end = time.monotonic()

    def learn(self) -> None:
        """The results of undisturbed runs."""
        for seed in range(SEEDS):
            self.expected[seed] = digest(self.client.wait(self.client.submit(request(seed))))

    def fill(self) -> None:
        while len(self.running) < IN_FLIGHT:
            seed = self.random.randrange(SEEDS)
            job = self.client.submit(request(seed), attached=len(self.running) > 0)
            self.running[job] = seed

    def collect(self, seconds: float) -> None:
        """Follows the jobs for a while; a wrong or missing result is noted."""
        until = time.monotonic() + seconds
        while self.running and (now := time.monotonic()) < until:
            for event in self.client.poll(min(0.2, until - now)):
                if event.status is None:
                    continue
                self.ended[event.job] += 1
                self.last_end = time.monotonic()
                seed = self.running.pop(event.job, -1)
                if event.error and event.error.code == Poisoned.code:
                    self.poisoned += 1  # by chance killed twice while it ran alone: the rule, not a loss
                elif event.status is not Status.COMPLETED or digest(event) != self.expected[seed]:
                    self.wrong.append(f"{event.job}: {event.status} {event.error}")
            if self.server.failure:
                raise self.server.failure
            if time.monotonic() - self.last_end > STUCK_S:
                raise SystemExit(f"stuck: {self.running}")

    def hurt(self) -> None:
        role, pid = self.random.choice(sorted(self.server.pids().items()))
        number = signal.SIGSTOP if self.random.random() < 0.1 else signal.SIGKILL
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        self.faults[f"{role.partition(' ')[0]} {number.name}"] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill random processes of a server and check every result.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    settings = ServerArgs(
        model_path=str(args.model), device="cpu", num_gpus=args.num_gpus, replicas=args.replicas, checkpoint_every=20
    )
    started = time.monotonic()
    with Supervisor(settings, args.model, 1 << 20) as server, Client(server.endpoints) as client:
        server.wait_ready(120)
        soak = Soak(server, client, args.seed)
        soak.learn()
        while sum(soak.faults.values()) < args.faults:
            soak.fill()
            soak.collect(soak.random.uniform(1.0, 5.0))  # within MAX_DEATHS of the supervisor
            soak.hurt()
        soak.collect(600)
    twice = [job for job, count in soak.ended.items() if count != 1]
    print(
        json.dumps(
            {
                "faults": dict(soak.faults),
                "jobs": len(soak.ended),
                "lost": len(soak.running),
                "answered_twice": len(twice),
                "wrong": soak.wrong,
                "poisoned": soak.poisoned,
                "seconds": round(time.monotonic() - started),
            }
        )
    )
    return 1 if soak.running or twice or soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
