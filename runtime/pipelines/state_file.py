"""The tensor form of a DenoiseState, for safetensors: what checkpoints, resuming and transfers between roles share."""

from __future__ import annotations

from typing import Any

import torch

from safelight.runtime.errors import JobFailed
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.pipelines.protocol import DenoiseState, SamplerState

VERSION = 1


def save_state(state: DenoiseState) -> dict[str, torch.Tensor]:
    """Contiguous CPU copies; integers as (4,) int64: version, step, index, the sampler's order.

    The conditioning and the request are not part of it: a resumed job encodes again.
    """
    tensors = {
        "header": torch.tensor([VERSION, state.step, state.index, state.sampler.order], dtype=torch.int64),
        "latents": state.latents,
        "sigmas": state.sigmas,
        "rng_state": state.rng_state,
    }
    tensors |= {f"model_outputs.{i}": tensor for i, tensor in enumerate(state.sampler.model_outputs)}
    if state.sampler.last_sample is not None:
        tensors["last_sample"] = state.sampler.last_sample
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def load_state(
    tensors: dict[str, torch.Tensor],
    request: GenerationRequest,
    conditioning: Any,
    latent_shape: tuple[int, ...],
    device: torch.device,
) -> DenoiseState:
    """Inverse of `save_state`. Raises JobFailed: another version, a missing tensor, or a state of another request."""
    header = tensors.get("header")
    if header is None or header.shape != (4,) or int(header[0]) != VERSION:
        raise JobFailed(f"the checkpoint is not of version {VERSION}; start the job again")
    _, step, index, order = header.tolist()
    if missing := {"latents", "sigmas", "rng_state"} - set(tensors):
        raise JobFailed(f"the checkpoint lacks {', '.join(sorted(missing))}; start the job again")
    outputs = tuple(tensors[name].to(device) for name in sorted(n for n in tensors if n.startswith("model_outputs.")))
    last = tensors.get("last_sample")
    shapes = {tuple(t.shape) for t in (tensors["latents"], *outputs, *([] if last is None else [last]))}
    steps = request.num_inference_steps
    if shapes != {tuple(latent_shape)} or tensors["sigmas"].shape != (steps + 1,) or not 0 <= step <= steps:
        raise JobFailed(
            f"the checkpoint is of another request: latents {sorted(shapes)}, step {step} of "
            f"{len(tensors['sigmas']) - 1}; the request needs {tuple(latent_shape)} and {steps} steps"
        )
    return DenoiseState(
        latents=tensors["latents"].to(device),
        step=step,
        sigmas=tensors["sigmas"],
        sampler=SamplerState(outputs, None if last is None else last.to(device), order),
        rng_state=tensors["rng_state"],
        guidance_scale=request.guidance_scale,
        conditioning=conditioning,
        request=request,
        index=index,
    )
