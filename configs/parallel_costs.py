"""Seconds per denoising step over several GPUs, predicted from a model's numbers.

Compute: the profile's TFLOP at measured rates, of the rank with the most tokens and heads. Matrices that only text
meets are read whole by every rank, and a few rows take as long as the reading. Communication: the bytes of `traffic`
over the slowest link in each group. Ulysses' exchanges and the gathering at the end wait; a ring's chunks travel while
attention computes, and cost what does not fit behind it, and passes over memory that pack the chunks and merge the
partial results. Against the clock: docs/benchmarks/parallel.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from safelight.configs.parallel import Degrees
from safelight.configs.traffic import StepShape, shares, step_traffic

_WEIGHT_BYTES = 2


@dataclass(frozen=True, slots=True)
class Machine:
    """What the prediction assumes. Links: bytes per second that one GPU sends, all its peers together."""

    name: str
    attention_tflops: float
    tflops: float  # of the rest of a forward, its passes over memory included
    link: float  # of messages between GPUs of one host
    network: float  # between hosts
    gpus_per_host: int = 8
    latency_s: float = 30e-6  # of one all-to-all, or one turn of a ring, beside its bytes
    peer_link: float = 0.0  # of stores into a peer's memory, on one host; 0: there are none
    peer_latency_s: float = 0.0  # of the barrier behind them
    memory: float = 3.6e12  # bytes per second that one GPU reads
    encoder_layer_s: float = 0.0  # of the host, which launches a text encoder's layer
    encoder_sum_s: float = 0.0  # of one sum over ranks in a text encoder, its launch included, beside its bytes
    ring_s: float = 16e-12  # of a ring's passes, per value of a rank's queries and attention: packing, rounding
    ring_merge_s: float = 6.4e-12  # the same, per value and merged chunk


# All from docs/benchmarks/parallel.md and docs/parallelism.md (two H200), but memory and the network, assumed: three
# quarters of 4.8 TB/s, 60 % of one 400 Gbit/s adapter a GPU.
H200 = Machine(
    "H200",
    attention_tflops=560.0,
    tflops=620.0,
    link=295e9,
    network=30e9,
    latency_s=28e-6,
    peer_link=345e9,
    peer_latency_s=13e-6,
    encoder_layer_s=1.2e-3,
    encoder_sum_s=0.5e-3,
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One step of one state."""

    seconds: float
    communication_s: float  # the part of `seconds` in which nothing is computed
    sent_bytes: int  # by the rank that sends most

    def efficiency(self, alone: Prediction, world_size: int) -> float:
        """Against as many GPUs that each work alone."""
        return alone.seconds / (world_size * self.seconds)


def predict(shape: StepShape, step_tflop: float, degrees: Degrees, machine: Machine) -> Prediction:
    """`step_tflop`: of one step of one state on one GPU, all branches included."""
    width = shape.heads * shape.head_dim
    attention = shape.branches * shape.layers * 4.0 * shape.tokens**2 * width / 1e12
    branches = shape.branches / degrees.cfg if shape.branches % degrees.cfg == 0 else shape.branches
    part = branches / shape.branches
    chunk = shares(shape.tokens, degrees.ring)[0] / shape.tokens
    share = shares(round(chunk * shape.tokens), degrees.ulysses)[0] / shape.tokens
    heads = shares(shape.heads, degrees.ulysses)[0] / shape.heads
    attention_s = attention * part * chunk * heads / machine.attention_tflops
    other_s = (step_tflop - attention) * part * share / machine.tflops
    read_s = _WEIGHT_BYTES * shape.text_weights / machine.memory
    other_s += branches * max(0.0, read_s - 2e-12 * shape.text_weights * shape.text * share / machine.tflops)
    most = max((step_traffic(shape, degrees, rank) for rank in range(degrees.world_size)), key=lambda t: t.total)
    wide = _bandwidth(degrees.sp, machine)
    exposed = most.gather / wide + most.cfg / _bandwidth(degrees.world_size, machine)
    if degrees.ulysses > 1:
        stored = machine.peer_link > 0 and degrees.ulysses <= machine.gpus_per_host
        rate = machine.peer_link if stored else _bandwidth(degrees.ulysses, machine)
        latency = machine.peer_latency_s if stored else machine.latency_s
        exposed += most.ulysses / rate + 2 * shape.layers * latency
    if degrees.ring > 1:
        behind = attention_s * (degrees.ring - 1) / degrees.ring
        exposed += max(0.0, most.ring / wide - behind) + machine.latency_s * shape.layers * (degrees.ring - 1)
        values = branches * shape.layers * shape.tokens * chunk * width * heads
        other_s += values * (machine.ring_s + machine.ring_merge_s * (degrees.ring - 1))
    return Prediction(attention_s + other_s + exposed, exposed, most.total)


def _bandwidth(ranks: int, machine: Machine) -> float:
    """Ranks are numbered with Ulysses innermost, so a group of that span stays on one host as long as it fits."""
    return machine.link if ranks <= machine.gpus_per_host else machine.network
