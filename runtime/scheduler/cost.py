"""Predicts what ops cost: milliseconds per unit of work, learned from measured plans.

A rate belongs to (kind of op, weights id), and once more to each group, as replicas may differ in speed. A group's own
rate starts from that of all groups, so that one slow first op (a warm-up) does not condemn it. Until a rate is measured
it is a prior for the device: 300 TFLOP/s on a GPU, 0.03 on a CPU (units are TFLOP, see configs/profile.py).
"""

from __future__ import annotations

from safelight.configs.profile import JobProfile
from safelight.runtime.messages import Decode, Denoise, Encode, Op, Prepare
from safelight.runtime.scheduler.jobs import Cursor, Stage

CUDA_MS_PER_UNIT = 3.3
CPU_MS_PER_UNIT = 33_000.0
PREPARE_MS = 5.0
EWMA = 0.2

RateKey = tuple[str, str]


class CostModel:
    """Rates in ms per unit, one EWMA each. `group` None: of all groups."""

    def __init__(self) -> None:
        self._rates: dict[RateKey, float] = {}
        self._of_group: dict[int, dict[RateKey, float]] = {}
        self._prior = CPU_MS_PER_UNIT

    def use_device(self, device: str) -> None:
        """Chooses the prior by the device type that a worker reports ("cuda", "cuda:0", "cpu")."""
        self._prior = CUDA_MS_PER_UNIT if device.startswith("cuda") else CPU_MS_PER_UNIT

    def rate(self, key: RateKey, group: int | None = None) -> float:
        """ms per unit, measured or prior. A prepare is one unit, unless its profile says what it costs."""
        rate = self._of_group.get(group, {}).get(key) if group is not None else None
        if rate is None:
            rate = self._rates.get(key)
        if rate is None:
            return PREPARE_MS if key[0] == "prepare" else self._prior
        return rate

    def learn(self, op: Op, profile: JobProfile, ms: float, group: int | None = None) -> None:
        """Takes in one measured op; ops without a cost of their own teach nothing."""
        key, units = _work(op, profile)
        if units <= 0 or ms <= 0:
            return
        measured = ms / units
        old = self._rates.get(key)
        if group is not None:
            own = self._of_group.setdefault(group, {})
            before = own.get(key, measured if old is None else old)
            own[key] = before + EWMA * (measured - before)
        self._rates[key] = measured if old is None else old + EWMA * (measured - old)

    def forget(self, group: int) -> None:
        """New processes, perhaps on another device."""
        self._of_group.pop(group, None)

    def op_ms(self, op: Op, profile: JobProfile, group: int | None = None) -> float:
        """Predicted ms of one op."""
        key, units = _work(op, profile)
        return units * self.rate(key, group) if units else 0.0

    def step_ms(self, profile: JobProfile, group: int | None = None) -> float:
        """The longest single step of a job."""
        return max(p.step_cost * self.rate(("denoise", p.weights_id), group) for p in profile.phases)

    def remaining_ms(self, profile: JobProfile, at: Cursor, outputs_left: int, group: int | None = None) -> float:
        """Everything that is left from `at` on, when `outputs_left` outputs (the current one included) are undone."""
        chunk = profile.decode_chunk_cost * self.rate(("decode", profile.family), group)
        decode = len(profile.chunk_frames) * chunk
        prepare = self._costly_prepare_ms(profile, group)
        left = prepare if at.stage <= Stage.PREPARE else 0.0
        if at.stage <= Stage.DENOISE:
            left += self._denoise_ms(profile, at.k, group) + decode
        elif at.stage == Stage.DECODE:
            left = decode - at.k * chunk
        if outputs_left > 1:
            left += (outputs_left - 1) * (prepare + self._denoise_ms(profile, 0, group) + decode)
        if at.stage == Stage.ENCODE:
            left += profile.encode_cost * self.rate(("encode", profile.family), group)
        return left

    def _costly_prepare_ms(self, profile: JobProfile, group: int | None) -> float:
        return profile.prepare_cost * self.rate(_prepare(profile)[0], group) if profile.prepare_cost else 0.0

    def _denoise_ms(self, profile: JobProfile, step: int, group: int | None) -> float:
        total, end = 0.0, profile.steps
        for phase in reversed(profile.phases):
            left = end - max(step, phase.first_step)
            if left > 0:
                total += left * phase.step_cost * self.rate(("denoise", phase.weights_id), group)
            end = phase.first_step
        return total


def _prepare(profile: JobProfile) -> tuple[RateKey, float]:
    """Drawing noise takes a moment, whatever the request; a pipeline that encodes meanwhile says what that costs."""
    if profile.prepare_cost:
        return ("prepare and encode", profile.family), profile.prepare_cost
    return ("prepare", profile.family), 1.0


def _work(op: Op, profile: JobProfile) -> tuple[RateKey, float]:
    if isinstance(op, Denoise):
        phase = profile.phase_at(op.units[0].step) if len(profile.phases) > 1 else profile.phases[0]
        return ("denoise", phase.weights_id), phase.step_cost * len(op.units)
    if isinstance(op, Decode):
        return ("decode", profile.family), profile.decode_chunk_cost
    if isinstance(op, Encode):
        return ("encode", profile.family), profile.encode_cost
    if isinstance(op, Prepare):
        return _prepare(profile)
    return ("", ""), 0.0
