"""How many ranks share a text encoder's matrices (`--tp-size`), and what encoding takes then.

A set of tp ranks holds one copy of the encoder; the sets of a group share the prompts. Splitting prompts costs one
message each but only helps as far as there are several, and keeps the whole encoder on every rank; splitting matrices
costs two sums over the ranks a layer, helps with one prompt as well, and leaves 1/tp of the weights on each rank.
So the largest tp is chosen that is predicted to be no slower than one rank alone: never slower, with least memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from safelight.configs.parallel_costs import H200, Machine
from safelight.runtime.errors import ConfigError

PROMPTS, TOKENS = 2, 128  # a guided request: its prompts are encoded unpadded, and few are longer
_BYTES = 2  # of a weight
_SUM_BYTES = 4  # sums over ranks are float32
CPU = Machine(
    "CPU", attention_tflops=0.03, tflops=0.03, link=1e9, network=1e9, latency_s=1e-3, memory=10e9, encoder_sum_s=1e-3
)


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Per layer 2 width x inner for queries and the output, 2 width x `keys` for keys and values, 3 width x d_ff."""

    layers: int
    heads: int  # that ranks can share: of keys and values, where several heads of queries go with each
    width: int
    inner: int  # heads x head dim
    d_ff: int
    vocabulary: int
    tokens: int = TOKENS  # of each prompt
    prompts: int = PROMPTS  # of a usual request
    keys: int | None = None  # heads of keys x head dim; None: as many as of queries

    @property
    def layer_weights(self) -> int:
        keys = self.inner if self.keys is None else self.keys
        return self.layers * self.width * (2 * self.inner + 2 * keys + 3 * self.d_ff)

    @property
    def weights_bytes(self) -> int:
        return _BYTES * (self.layer_weights + self.vocabulary * self.width)


@dataclass(frozen=True, slots=True)
class EncoderShares:
    """`tp` ranks hold one encoder together; `sets` of them take different prompts, 1: every set encodes them all."""

    tp: int = 1
    sets: int = 1


def encode_seconds(shape: EncoderShape, shares: EncoderShares, device: str) -> float:
    """A guided request's prompts: the slowest of arithmetic, reading the weights and launching the kernels, the sums
    over ranks, and the results' way to all ranks."""
    tp, sets = shares.tp, shares.sets
    machine = _machine(device)
    tokens = shape.tokens * -(-shape.prompts // min(shape.prompts, sets))  # of the set that has most
    part = -(-shape.heads // tp) / shape.heads
    work = 2.0 * shape.layer_weights * tokens * part / 1e12 / machine.tflops
    reading = _BYTES * shape.layer_weights * part / machine.memory
    summed = _SUM_BYTES * tokens * shape.width * 2 * (tp - 1) / tp / machine.link
    sums = (2 * shape.layers + 1) * (machine.encoder_sum_s + summed) if tp > 1 else 0.0
    sent = shape.prompts * (machine.latency_s + _BYTES * shape.tokens * shape.width / machine.link) if sets > 1 else 0.0
    return max(work, reading, shape.layers * machine.encoder_layer_s) + sums + sent


def choose_encoder_shares(
    wanted: int | None, shape: EncoderShape | None, world_size: int, device: str
) -> EncoderShares:
    """`wanted` is the flag, None where unset; `shape` None: the family's encoder cannot be shared.

    Raises ConfigError: more ranks than the encoder has heads, or an encoder that cannot be shared.
    """
    if shape is None:
        if wanted is not None and wanted > 1:
            raise ConfigError(
                f"--tp-size {wanted}: this model's text encoder runs whole on every rank; leave it out", param="tp_size"
            )
        return EncoderShares()
    if wanted is not None and wanted > shape.heads:
        kind = "heads" if shape.keys is None else "heads of keys and values"
        raise ConfigError(
            f"--tp-size {wanted}: this model's text encoder has {shape.heads} {kind}, and every rank needs one; use at "
            f"most {shape.heads}",
            param="tp_size",
        )
    most = min(world_size, shape.heads, _machine(device).gpus_per_host)
    sizes = [size for size in range(1, most + 1) if world_size % size == 0] if wanted is None else [wanted]
    found = [_best(shape, size, world_size, device) for size in sizes]
    alone = encode_seconds(shape, EncoderShares(), device)
    return next((s for s in reversed(found) if encode_seconds(shape, s, device) <= alone), found[0])


def _best(shape: EncoderShape, tp: int, world_size: int, device: str) -> EncoderShares:
    options = (EncoderShares(tp, 1), EncoderShares(tp, world_size // tp))
    return min(options, key=lambda shares: encode_seconds(shape, shares, device))


def explain_encoder(
    chosen: EncoderShares, wanted: int | None, shape: EncoderShape, world_size: int, device: str
) -> str:
    """Why, in one line."""
    held = shape.weights_bytes / chosen.tp / 1e9
    one, time = (encode_seconds(shape, shares, device) * 1e3 for shares in (EncoderShares(), chosen))
    why = "as asked" if wanted is not None else "the most ranks that are no slower than one"
    if wanted is None and chosen.tp == 1:
        why = "one rank" if world_size == 1 else "sums over ranks would take longer than they save"
    prompts = f", {chosen.sets} sets share the prompts" if chosen.sets > 1 else ""
    return f"tp {chosen.tp}: {why}{prompts}; {held:.2f} GB of text encoder a rank, {time:,.3f} ms (one rank {one:,.3f})"


def _machine(device: str) -> Machine:
    """What a prediction assumes of a device type."""
    return H200 if device == "cuda" else CPU
