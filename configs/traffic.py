"""Bytes that a rank must send for one denoising step: the least that each scheme of splitting can do with.

Ulysses moves every element of q, k, v that another rank's heads need, and every element of the result that is another
rank's token, once. A ring passes each chunk of keys and values on, but for the one that its successor began with. The
prediction is made whole by sending the rank's own part to each other rank. A cfg pair exchanges predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from safelight.configs.parallel import Degrees


@dataclass(frozen=True, slots=True)
class StepShape:
    """One step's forward: B `batch` states, each with `branches` predictions (2 when guided)."""

    tokens: int
    heads: int
    head_dim: int
    layers: int
    prediction_channels: int  # of each token's prediction: channels x patch volume
    batch: int = 1
    branches: int = 2
    item_bytes: int = 2  # of an activation
    text: int = 0  # of the tokens, those that have matrices of their own
    text_weights: int = 0  # values of these matrices, all layers


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one rank sends to others in a step."""

    ulysses: int
    ring: int
    gather: int  # of the prediction's shares
    cfg: int

    @property
    def total(self) -> int:
        return self.ulysses + self.ring + self.gather + self.cfg


def shares(total: int, parts: int) -> list[int]:
    """Shares of `total` that differ by at most one, larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def step_traffic(shape: StepShape, degrees: Degrees, rank: int) -> Traffic:
    """Of one rank, exactly, uneven shares included. Ranks are numbered as in runtime/parallel/mesh.py."""
    column, row = rank % degrees.ulysses, rank // degrees.ulysses % degrees.ring
    chunks, heads = shares(shape.tokens, degrees.ring), shares(shape.heads, degrees.ulysses)[column]
    chunk, following = chunks[row], chunks[(row + 1) % degrees.ring]
    share = shares(chunk, degrees.ulysses)[column]
    split = degrees.cfg == 2 and shape.branches == 2
    batch = shape.batch * (1 if split else shape.branches)
    layer = batch * shape.layers * shape.head_dim * shape.item_bytes
    prediction = shape.batch * shape.prediction_channels
    return Traffic(
        ulysses=layer * (3 * share * (shape.heads - heads) + heads * (chunk - share)),
        ring=layer * 2 * heads * (shape.tokens - following) if degrees.ring > 1 else 0,
        gather=batch * shape.prediction_channels * shape.item_bytes
        * (share * (degrees.ulysses - 1) + chunk * (degrees.ring - 1)),
        cfg=4 * prediction * shape.tokens if split else 0,  # float32
    )  # fmt: skip


def whole_text_traffic(shape: StepShape, text: int, degrees: Degrees, rank: int) -> Traffic:
    """Of a joint attention that keeps `text` of the tokens on every rank, to compare with cutting them like the others.

    Only image tokens travel to their heads and around the ring; after attention every Ulysses rank needs the text's
    result of every head. What this does not show: each rank then runs all rows of text through every linear layer.
    """
    alone = step_traffic(replace(shape, tokens=shape.tokens - text), degrees, rank)
    heads = shares(shape.heads, degrees.ulysses)[rank % degrees.ulysses]
    split = degrees.cfg == 2 and shape.branches == 2
    batch = shape.batch * (1 if split else shape.branches)
    gathered = batch * shape.layers * shape.head_dim * shape.item_bytes * text * heads * (degrees.ulysses - 1)
    return replace(alone, ulysses=alone.ulysses + gathered)
