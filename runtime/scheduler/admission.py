"""Which waiting job enters a group: the queue by lanes, and the memory of a group.

The budget of a group covers what admitted jobs hold, what dropped jobs still hold, and the largest op that any of them
may run. Measured peaks correct the profile's figures by a factor per kind of op and shape that only grows.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

from safelight.configs.profile import JobProfile
from safelight.runtime import messages as m
from safelight.runtime.scheduler.jobs import Job
from safelight.runtime.scheduler.policy import JobView, Policy
from safelight.runtime.scheduler.slots import Attempt

PeakKey = tuple[str, str, tuple[int, ...]]


class PeakModel:
    """Bytes that ops need on top of what is held."""

    def __init__(self) -> None:
        self._factor: dict[PeakKey, float] = {}

    def peak(self, profile: JobProfile, encode_bytes: int = 0) -> int:
        """The largest op of a job, corrected; `encode_bytes` of weights come to the device for encoding."""
        return max(
            int(b * self._factor.get(key, 1.0)) + (encode_bytes if key[0] == m.Encode.__name__ else 0)
            for key, b in _peaks(profile).items()
        )

    def learn(self, op: m.Op, profile: JobProfile, measured: int) -> bool:
        """Takes in the peak of a plan whose only costly op was `op`; True when the correction grew."""
        kind = type(op).__name__
        for key, predicted in _peaks(profile).items():
            if key[0] == kind and predicted > 0 and measured > predicted * self._factor.get(key, 1.0):
                self._factor[key] = measured / predicted
                return True
        return False


def _peaks(profile: JobProfile) -> dict[PeakKey, int]:
    return {
        ("Encode", profile.family, ()): profile.encode_peak_bytes,
        ("Denoise", profile.family, profile.latent_shape): profile.step_peak_bytes,
        ("Decode", profile.family, profile.latent_shape): profile.decode_peak_bytes,
    }


@dataclass(slots=True)
class Memory:
    """Who holds how much of one group."""

    budget: int = 0
    encode_bytes: int = 0  # of weights that are there only while the group encodes
    _held: dict[Attempt, tuple[int, int]] = field(default_factory=dict)  # bytes held, peak

    def fits(self, held: int, peak: int) -> bool:
        peaks = (p for _, p in self._held.values())
        return self.used + held + max(peak, *peaks, 0) <= self.budget

    def take(self, attempt: Attempt, held: int, peak: int) -> None:
        self._held[attempt] = (held, peak)

    def take_rest(self, attempt: Attempt) -> None:
        """A state of unknown size: nothing else enters until it is gone."""
        self._held[attempt] = (self.budget, 0)

    def give_back(self, attempt: Attempt) -> None:
        self._held.pop(attempt, None)

    def clear(self) -> None:
        self._held.clear()

    def holds(self, attempt: Attempt) -> bool:
        return attempt in self._held

    def attempts(self) -> list[Attempt]:
        """Everyone who may have something on the device."""
        return list(self._held)

    @property
    def used(self) -> int:
        return sum(b for b, _ in self._held.values())


def too_large(profile: JobProfile, peaks: PeakModel, groups: Iterable[Memory]) -> m.ErrorInfo | None:
    """The refusal of a job that fits into none of the groups, with the figures; None when it fits into one of them."""
    needs = [(group.budget, peaks.peak(profile, group.encode_bytes)) for group in groups]
    if any(profile.held_bytes + peak <= budget for budget, peak in needs):
        return None
    largest, peak = max(needs)
    need = profile.held_bytes + peak
    return m.ErrorInfo(
        "too_large",
        f"this request needs {need / 1e9:.3f} GB beside the weights ({profile.held_bytes / 1e9:.3f} GB held, "
        f"{peak / 1e9:.3f} GB for its largest step) and the server has {largest / 1e9:.3f} GB: "
        "ask for a smaller size or fewer frames",
    )


_Entry = tuple[bool, float, int, Job]


class Queue:
    """Waiting jobs, one heap per lane of the policy; jobs that ran before come first. O(log n) per change."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._jobs: dict[str, Job] = {}
        self._heaps: list[list[_Entry]] = [[] for _ in policy.lanes]
        self._pushed = 0
        self.work_ms = 0.0  # of everything that waits

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job: Job) -> bool:
        return job.id in self._jobs

    def push(self, job: Job) -> None:
        """`job.queued_ms` is set by the caller and stays while it waits."""
        self._jobs[job.id] = job
        self.work_ms += job.queued_ms
        self._pushed += 1
        seen = view(job, job.queued_ms)
        for lane, heap in zip(self._policy.lanes, self._heaps, strict=True):
            if len(heap) > 2 * len(self._jobs) + 64:  # mostly jobs that another lane took
                heap[:] = [e for e in heap if self._jobs.get(e[3].id) is e[3]]
                heapq.heapify(heap)
            heapq.heappush(heap, (not job.requeued, lane.key(seen), self._pushed, job))

    def remove(self, job: Job) -> None:
        if self._jobs.pop(job.id, None) is not None:
            self.work_ms = max(0.0, self.work_ms - job.queued_ms) if self._jobs else 0.0

    def head(self, lane: int) -> Job | None:
        heap = self._heaps[lane]
        while heap:
            job = heap[0][3]
            if self._jobs.get(job.id) is job:
                return job
            heapq.heappop(heap)
        return None

    def first(self, lane: int, count: int) -> list[Job]:
        """The next `count` jobs of a lane in order, fewer when many of its entries are of jobs that went already."""
        self.head(lane)
        heap, found = self._heaps[lane], dict[str, Job]()
        candidates = [(heap[0], 0)] if heap else []
        for _ in range(8 * count):  # a heap's n smallest, without changing it
            if not candidates or len(found) == count:
                break
            (*_, job), at = heapq.heappop(candidates)
            if self._jobs.get(job.id) is job:
                found[job.id] = job
            for child in (2 * at + 1, 2 * at + 2):
                if child < len(heap):
                    heapq.heappush(candidates, (heap[child], child))
        return list(found.values())


def view(job: Job, remaining_ms: float) -> JobView:
    return JobView(job.seq, job.accepted_at, job.priority, remaining_ms)
