"""Load on a server at any URL: open-loop Poisson arrivals of mixed pictures and videos; one JSON line.

    scripts/bench_serving.py --url http://127.0.0.1:30000 --rate 0.5 --mix image:4:128x128:1 video:20:128x128:17

A kind of the mix is image or video, steps, size, frames, and optionally its weight. Arrivals do not wait for answers,
so a slow server is not asked less. The objective of a job is its alone time (measured first, each kind on the idle
server) times --slo-scale; goodput counts the jobs that met theirs. Idle share: 1 minus the growth of
safelight_group_busy_seconds over the time of the run, for servers that tell it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of job in the mix."""

    name: str
    route: str
    body: dict[str, Any]
    weight: float

    @staticmethod
    def parse(text: str) -> Kind:
        """`image:4:128x128:1[:weight]`."""
        what, steps, size, frames, *weight = text.split(":")
        body: dict[str, Any] = {"prompt": "a red apple", "num_inference_steps": int(steps), "size": size}
        if what == "image":
            return Kind(text, "/v1/images/generations", body, float(weight[0]) if weight else 1.0)
        if what != "video":
            raise argparse.ArgumentTypeError(f"image or video expected, got {what!r} in {text!r}")
        body["num_frames"] = int(frames)
        return Kind(text, "/v1/videos", body, float(weight[0]) if weight else 1.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one job; `error` is a status or the name of an exception."""

    kind: Kind
    seconds: float
    error: str | None = None


async def run_job(http: httpx2.AsyncClient, kind: Kind, seed: int) -> Outcome:
    """From the request to the finished result; nothing is retried."""
    started, error = time.monotonic(), None
    try:
        reply = await http.post(kind.route, json={**kind.body, "seed": seed})
        found = reply.json()
        if reply.status_code != 200:
            error = str(reply.status_code)
        while error is None and found.get("status") in ("queued", "in_progress"):
            await asyncio.sleep(POLL_S)
            found = (await http.get(f"{kind.route}/{found['id']}")).json()
        if found.get("status") == "failed":
            error = "failed"
    except httpx2.HTTPError as failure:
        error = type(failure).__name__
    return Outcome(kind, time.monotonic() - started, error)


async def busy_seconds(http: httpx2.AsyncClient) -> tuple[float, int] | None:
    """Of all groups together, and how many there are; None when the server does not tell."""
    reply = await http.get("/metrics")
    if reply.status_code != 200:
        return None
    found = re.findall(r"^safelight_group_busy_seconds\{.*\} (\S+)$", reply.text, re.MULTILINE)
    return (sum(map(float, found)), len(found)) if found else None


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    draw = random.Random(args.seed)
    key = os.environ.get("SAFELIGHT_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=args.url, timeout=args.timeout, headers=headers, limits=limits) as http:
        alone = {}
        for kind in args.mix:
            await run_job(http, kind, 0)  # warms up
            alone[kind.name] = min([(await run_job(http, kind, n)).seconds for n in (1, 2)])
        before, started = await busy_seconds(http), time.monotonic()
        tasks: list[asyncio.Task[Outcome]] = []
        due = started
        while (due := due + draw.expovariate(args.rate)) < started + args.seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            (kind,) = draw.choices(args.mix, [kind.weight for kind in args.mix])
            tasks.append(asyncio.create_task(run_job(http, kind, draw.randrange(2**31))))
        outcomes = await asyncio.gather(*tasks)
        elapsed, after = time.monotonic() - started, await busy_seconds(http)
    idle = 1 - (after[0] - before[0]) / (elapsed * after[1]) if before and after else None
    return {"url": args.url, "label": args.label, "rate": args.rate, "seconds": round(elapsed, 2)} | summary(
        outcomes, alone, args.slo_scale, elapsed, idle
    )


def summary(
    outcomes: Sequence[Outcome], alone: dict[str, float], slo_scale: float, elapsed: float, idle: float | None
) -> dict[str, Any]:
    """The figures of a run."""
    good = [o for o in outcomes if o.error is None and o.seconds <= slo_scale * alone[o.kind.name]]
    by_kind = {}
    for name, base in alone.items():
        times = sorted(o.seconds for o in outcomes if o.kind.name == name and o.error is None)
        met = sum(o.kind.name == name for o in good)
        by_kind[name] = {"alone_s": round(base, 3), "jobs": sum(o.kind.name == name for o in outcomes), "met": met}
        by_kind[name] |= {f"p{p}_s": round(percentile(times, p), 3) for p in (50, 95, 99)} if times else {}
        by_kind[name] |= {"mean_slowdown": round(statistics.fmean(times) / base, 2)} if times else {}
    errors = [o.error for o in outcomes if o.error is not None]
    return {
        "jobs": len(outcomes),
        "errors": {error: errors.count(error) for error in sorted(set(errors))},
        "slo_scale": slo_scale,
        "slo_attainment": round(len(good) / len(outcomes), 4) if outcomes else None,
        "goodput_per_s": round(len(good) / elapsed, 4),
        "idle_share": round(idle, 4) if idle is not None else None,
        "kinds": by_kind,
    }


def percentile(times: Sequence[float], percent: float) -> float:
    """By nearest rank, of sorted times."""
    return times[max(0, -(-len(times) * int(percent) // 100) - 1)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--url", default="http://127.0.0.1:30000")
    made.add_argument("--rate", type=float, default=1.0, help="arrivals per second")
    made.add_argument("--seconds", type=float, default=60.0, help="of arrivals")
    made.add_argument("--slo-scale", type=float, default=5.0, help="times the alone time")
    made.add_argument("--timeout", type=float, default=600.0, help="of one request")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--label", default="", help="goes into the line, e.g. the policy")
    mix = [Kind.parse("image:4:128x128:1:4"), Kind.parse("video:20:128x128:17:1")]
    made.add_argument("--mix", type=Kind.parse, nargs="+", default=mix, metavar="KIND:STEPS:SIZE:FRAMES[:WEIGHT]")
    return made


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(parser().parse_args()))), flush=True)
