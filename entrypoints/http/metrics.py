"""/metrics: what the frontend counts itself, and what the scheduler's newest answer says."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safelight.runtime.messages import ServerStatus

_BUCKETS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    """One registry per server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "safelight_http_requests", "replies", ("route", "method", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "safelight_http_seconds", "until the last byte", ("route",), buckets=_BUCKETS, registry=self._registry
        )
        self._jobs = Counter("safelight_jobs_submitted", "jobs accepted", ("origin",), registry=self._registry)
        self._joined = Counter("safelight_jobs_joined", "requests of a known job", ("origin",), registry=self._registry)
        self._queued = self._gauge("safelight_jobs_queued", "jobs that wait")
        self._running = self._gauge("safelight_jobs_running", "jobs that workers hold")
        self._backlog = self._gauge("safelight_backlog_seconds", "predicted work of all jobs")
        self._stored = self._gauge("safelight_artifact_bytes", "results kept")
        self._ready = self._gauge("safelight_ready", "1 when a job would run")
        self._busy = Gauge(
            "safelight_group_busy_seconds", "of computing since the scheduler's start", ("group",),
            registry=self._registry,
        )  # fmt: skip

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self._registry)

    def submitted(self, origin: str, existing: bool) -> None:
        (self._joined if existing else self._jobs).labels(origin).inc()

    def replied(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def page(self, status: ServerStatus | None, ready: bool) -> bytes:
        """Prometheus' text format."""
        self._ready.set(ready)
        if status is not None:
            self._queued.set(status.queued)
            self._running.set(status.running)
            self._backlog.set(status.backlog_ms / 1000)
            self._stored.set(status.stored_bytes)
            for group in status.groups:
                self._busy.labels(str(group.group)).set(group.busy_ms / 1000)
        return generate_latest(self._registry)
