"""Samplers against diffusers' schedulers, step by step, and the purity that checkpoints need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from safelight.runtime.errors import InvalidRequest, ModelError
from safelight.runtime.pipelines.protocol import SamplerState
from safelight.runtime.samplers import SAMPLERS, FlowConfig, make_sampler, read_config, read_image_config

torch.set_num_threads(1)
SHIFTS = (1.0, 3.0, 5.0, 7.0)
UNIPC = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def reference(name: str, shift: float, order: int = 2) -> Any:
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )


def velocity_of(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth, non-linear stand-in for the model."""
    return torch.sin(2 * x) + x * (0.3 + sigma) - 0.2


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_tables_equal_the_reference_bitwise(name: str, shift: float) -> None:
    sampler = make_sampler(name, FlowConfig(name, shift=shift))
    scheduler = reference(name, shift)
    for steps in (*range(1, 51), 100, 1000):
        scheduler.set_timesteps(steps)
        ours = sampler.schedule(steps)
        assert torch.equal(ours.sigmas, scheduler.sigmas), steps
        assert ours.timesteps == tuple(float(t) for t in scheduler.timesteps), steps
        assert ours.sigmas.dtype == torch.float32


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("unipc", 1), ("unipc", 2)])
def test_every_step_matches_the_reference(name: str, order: int, shift: float) -> None:
    """From the reference's sample, each step lands within 1e-6 of the reference's next sample."""
    sampler = make_sampler(name, FlowConfig(name, shift=shift, solver_order=order))
    scheduler = reference(name, shift, order)
    generator = torch.Generator().manual_seed(3)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        sample = torch.randn(1, 4, 3, 2, generator=generator)
        sigmas: list[float] = sampler.schedule(steps).sigmas.tolist()
        state = SamplerState()
        for i, t in enumerate(scheduler.timesteps):
            velocity = velocity_of(sample, sigmas[i])
            ours, state = sampler.step(sigmas, i, sample, velocity, state)
            sample = scheduler.step(velocity, t, sample, return_dict=False)[0]
            error = (ours - sample).abs().max() / sample.abs().max()
            assert error <= 1e-6, (steps, i, float(error))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("name", "order"), [("unipc", 1), ("unipc", 2)])
def test_whole_runs_match_the_reference_in_double_precision(name: str, order: int, shift: float) -> None:
    """The reference computes its coefficients in its sigmas' precision: float64 shows that ours do not drift."""
    sampler = make_sampler(name, FlowConfig(name, shift=shift, solver_order=order))
    scheduler = reference(name, shift, order)
    for steps in (1, 2, 3, 5, 20, 50):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(0)
        scheduler.sigmas = scheduler.sigmas.double()
        theirs = ours = torch.randn(1, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        sigmas: list[float] = sampler.schedule(steps).sigmas.tolist()
        state = SamplerState()
        for i, t in enumerate(scheduler.timesteps):
            theirs = scheduler.step(velocity_of(theirs, sigmas[i]), t, theirs, return_dict=False)[0]
            ours, state = sampler.step(sigmas, i, ours, velocity_of(ours, sigmas[i]), state)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_step_changes_none_of_its_inputs_and_repeats_exactly(name: str) -> None:
    sampler = make_sampler(name, FlowConfig(name, shift=3.0))
    sigmas = sampler.schedule(6).sigmas.tolist()
    x, state = torch.randn(2, 3), SamplerState()
    for i in range(6):
        velocity = velocity_of(x, sigmas[i])
        kept = [t.clone() for t in (x, velocity, *state.model_outputs)]
        first, after = sampler.step(sigmas, i, x, velocity, state)
        again, _ = sampler.step(sigmas, i, x, velocity, state)
        assert torch.equal(first, again)
        assert all(torch.equal(a, b) for a, b in zip(kept, (x, velocity, *state.model_outputs), strict=True))
        x, state = first, after


def test_a_wrong_shift_is_seen_by_the_step_test() -> None:
    ours = make_sampler("unipc", FlowConfig("unipc", shift=5.0)).schedule(10).sigmas
    theirs = make_sampler("unipc", FlowConfig("unipc", shift=3.0)).schedule(10).sigmas
    assert (ours - theirs).abs().max() > 0.01


def test_both_scheduler_configs_are_read() -> None:
    assert read_config(UNIPC) == FlowConfig("unipc", 1000, 3.0, 2)
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 8.0}
    assert read_config(euler) == FlowConfig("euler", 1000, 8.0, 2)


def test_complete_configs_as_saved_by_the_reference_are_read() -> None:
    for name in SAMPLERS:
        scheduler = reference(name, 7.0)
        raw = dict(scheduler.config) | {"_class_name": type(scheduler).__name__}
        assert read_config(raw).shift == 7.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("solver_order", 3),
        ("solver_type", "bh1"),
        ("predict_x0", False),
        ("use_flow_sigmas", False),
        ("prediction_type", "epsilon"),
        ("use_karras_sigmas", True),
        ("use_dynamic_shifting", True),
        ("lower_order_final", False),
        ("final_sigmas_type", "sigma_min"),
        ("thresholding", True),
        ("disable_corrector", [0]),
        ("shift_terminal", 0.1),
        ("flow_shift", 0),
        ("num_train_timesteps", "many"),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_an_unsupported_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(ModelError, match=setting):
        read_config(UNIPC | {setting: value})


def test_settings_missing_from_a_unipc_config_have_the_class_defaults() -> None:
    with pytest.raises(ModelError, match="use_flow_sigmas"):
        read_config({"_class_name": "UniPCMultistepScheduler"})


def test_an_unknown_sampler_names_the_known_ones() -> None:
    with pytest.raises(InvalidRequest, match="unipc, euler"):
        make_sampler("ddim", FlowConfig("unipc"))


# ---------------------------------------------------------------------------------------------------------------------
# Image families: sigmas of the pipeline's own, and a shift that grows with the image

FLUX_DEV = {"shift": 3.0, "use_dynamic_shifting": True}
FLUX_SCHNELL = {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15}
QWEN = {"shift": 1.0, "use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
Z_IMAGE = {"shift": 3.0}
LINEAR = {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 0.7, "max_shift": 2.0}
IMAGE_CONFIGS = {"dev": FLUX_DEV, "schnell": FLUX_SCHNELL, "qwen": QWEN, "z-image": Z_IMAGE, "linear": LINEAR}


def image_scheduler(settings: dict[str, Any], steps: int, tokens: int) -> Any:
    """Diffusers' scheduler as the pipelines set it: their own sigmas, and mu from the tokens."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler: Any = FlowMatchEulerDiscreteScheduler(**settings)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[name] for name in names))
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler


@pytest.mark.parametrize("tokens", [15, 256, 4096, 16_384])
@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_image_tables_equal_the_reference(name: str, tokens: int) -> None:
    raw = dict(FlowMatchEulerDiscreteScheduler(**IMAGE_CONFIGS[name]).config)
    sampler = make_sampler("euler", read_image_config(raw | {"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    for steps in (*range(2 if name == "qwen" else 1, 31), 50, 1000):  # one step of Qwen's divides 0 by 0 there
        scheduler, ours = image_scheduler(IMAGE_CONFIGS[name], steps, tokens), sampler.schedule(steps, tokens)
        torch.testing.assert_close(ours.sigmas, scheduler.sigmas, rtol=1e-7, atol=0)
        assert ours.timesteps == pytest.approx([float(t) for t in scheduler.timesteps], rel=1e-7)


@pytest.mark.parametrize("name", IMAGE_CONFIGS)
def test_every_step_of_an_image_schedule_matches_the_reference(name: str) -> None:
    raw = {"_class_name": "FlowMatchEulerDiscreteScheduler", **IMAGE_CONFIGS[name]}
    sampler = make_sampler("euler", read_image_config(raw))
    for steps in (2, 4, 9, 50):
        scheduler = image_scheduler(IMAGE_CONFIGS[name], steps, 1024)
        scheduler.set_begin_index(0)
        sample = torch.randn(1, 4, 3, 2, generator=torch.Generator().manual_seed(3))
        sigmas: list[float] = sampler.schedule(steps, 1024).sigmas.tolist()
        for i, t in enumerate(scheduler.timesteps):
            velocity = velocity_of(sample, sigmas[i])
            ours, _ = sampler.step(sigmas, i, sample, velocity, SamplerState())
            sample = scheduler.step(velocity, t, sample, return_dict=False)[0]
            assert (ours - sample).abs().max() / sample.abs().max() <= 1e-6


def test_one_step_to_a_terminal_sigma_starts_from_noise() -> None:
    sampler = make_sampler("euler", read_image_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **QWEN}))
    assert sampler.schedule(1, 4096).sigmas.tolist() == [1.0, 0.0]


def test_wrong_tokens_or_a_forgotten_shift_show() -> None:
    raw = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FLUX_DEV}
    sampler = make_sampler("euler", read_image_config(raw))
    sigmas = sampler.schedule(10, 4096).sigmas
    for other in (sampler.schedule(10, 1024), make_sampler("euler", read_config(raw | {"use_dynamic_shifting": False})).schedule(10)):  # fmt: skip  # noqa: E501
        assert (other.sigmas - sigmas).abs().max() > 0.01
    with pytest.raises(ValueError, match="tokens"):
        sampler.schedule(10)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("_class_name", "UniPCMultistepScheduler"),
        ("use_karras_sigmas", True),
        ("stochastic_sampling", True),
        ("shift_terminal", 1.5),
        ("time_shift_type", "cubic"),
        ("base_shift", "much"),
        ("max_image_seq_len", 256),
    ],
)
def test_an_unsupported_image_setting_is_named(setting: str, value: object) -> None:
    raw = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FLUX_DEV}
    with pytest.raises(ModelError, match=setting):
        read_image_config(raw | {setting: value})


def test_an_image_schedule_runs_with_euler_only() -> None:
    with pytest.raises(InvalidRequest, match="euler"):
        make_sampler("unipc", read_image_config({"_class_name": "FlowMatchEulerDiscreteScheduler", **Z_IMAGE}))
