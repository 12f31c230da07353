"""`safelight doctor --plan`: which layout a model would get on so many GPUs, why, and what a step would take."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safelight.configs.encoder_parallel import EncoderShares, choose_encoder_shares, explain_encoder
from safelight.configs.families import FAMILIES, ModelSpec, identify
from safelight.configs.options import did_you_mean
from safelight.configs.parallel import WantedDegrees, choose_degrees, explain
from safelight.configs.parallel_costs import H200, Prediction, predict
from safelight.configs.sampling_params import SamplingParams
from safelight.configs.traffic import StepShape
from safelight.runtime import hub
from safelight.runtime.errors import ConfigError


def find_model(name: str) -> ModelSpec:
    """A directory, `builtin`, or the name or hub id of a published variant, which is not downloaded.

    Raises ConfigError for an unknown name, ModelError for a directory that holds no model.
    """
    if name == "builtin":
        return identify(hub.builtin_model())
    if Path(name).expanduser().is_dir():
        return identify(Path(name).expanduser())
    variants = [(family.name, v) for family in FAMILIES.values() for v in family.variants if v.configs]
    for family, v in variants:
        if name in (v.name, v.hub_id):
            configs: Any = v.configs
            return ModelSpec(family, v.name, Path(v.hub_id), v.task, v.defaults, **configs)
    known = ["builtin", *(v.name for _, v in variants)]
    raise ConfigError(f"--plan: no directory and no known model {name!r}{did_you_mean(name, known)}", param="plan")


def step_shape(spec: ModelSpec, params: SamplingParams) -> StepShape:
    """What the cost model needs of one step with these complete parameters."""
    family = FAMILIES[spec.family]
    profile, attention = family.profile(spec, params), family.attention_of(spec)
    _, frames, rows, columns = profile.latent_shape
    return StepShape(
        tokens=profile.tokens + attention.joint_text,
        heads=attention.heads,
        head_dim=attention.head_dim,
        layers=attention.layers,
        prediction_channels=profile.latent_shape[0] * (frames * rows * columns // profile.tokens),
        branches=2 if family.guided_by_default(spec) else 1,
        text=attention.joint_text if attention.text_weights else 0,
        text_weights=attention.text_weights,
    )


def show(name: str, num_gpus: int, as_json: bool) -> None:
    """Prints the plan of a model at its default size. Raises ConfigError and ModelError."""
    spec = find_model(name)
    family = FAMILIES[spec.family]
    if not family.capabilities.spans_ranks:
        raise ConfigError(f"--plan: {spec.variant} runs on one GPU; --replicas makes several of it", param="plan")
    profile, shape = family.profile(spec, spec.defaults), step_shape(spec, spec.defaults)
    guided, heads = family.guided_by_default(spec), shape.heads
    wanted = WantedDegrees(num_gpus, num_gpus)
    degrees, alone = choose_degrees(wanted, heads, guided), WantedDegrees(1, 1).layouts()[0]
    cost = profile.phases[0].step_cost
    one, step = (predict(shape, cost, layout, H200) for layout in (alone, degrees))
    why = explain(degrees, wanted, heads, guided)
    encoder, shares = family.encoder_of(spec), EncoderShares()
    if encoder is not None:
        shares = choose_encoder_shares(None, encoder, num_gpus, "cuda")
        why.append(explain_encoder(shares, None, encoder, num_gpus, "cuda"))
    if as_json:
        efficiency = step.efficiency(one, num_gpus)
        plan = {
            "model": spec.variant,
            "num_gpus": num_gpus,
            "degrees": asdict(degrees),
            "encoder": asdict(shares),
            "why": why,
        }
        print(json.dumps({**plan, "step": asdict(step), "alone": asdict(one), "efficiency": efficiency}))
        return
    size = f"{spec.defaults.width}x{spec.defaults.height}, {spec.defaults.num_frames} frames"
    print(f"model    {spec.variant}: {heads} heads, {shape.layers} layers; {size}: {profile.tokens:,} tokens")
    print(f"layout   {degrees}, tp {shares.tp}")
    for line in why:
        print(f"         {line}")
    _show_prediction(step, one, num_gpus)


def _show_prediction(step: Prediction, one: Prediction, num_gpus: int) -> None:
    waiting, together = step.communication_s / step.seconds, step.efficiency(one, num_gpus)
    near, far, hosted = H200.link / 1e9, H200.network / 1e9, H200.gpus_per_host
    print(
        f"predicted  {step.seconds * 1e3:,.3f} ms a step, {waiting:.1%} of it waiting; {step.sent_bytes / 1e6:,.1f} MB"
    )
    if step.seconds > one.seconds:
        print(f"           one GPU is faster; {num_gpus} jobs at a time are better served by --replicas {num_gpus}")
    print(f"           one GPU {one.seconds * 1e3:,.3f} ms; efficiency {together:.0%}")
    print(f"assumed    {H200.name}: {H200.tflops:.0f} TFLOP/s, measured with Wan 2.1 1.3B (small models are slower)")
    print(f"           {near:.0f} GB/s from each GPU within a host of {hosted} (measured between two)")
    print(f"           {far:.0f} GB/s to other hosts (not measured)")
