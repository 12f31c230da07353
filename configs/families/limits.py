"""What requests may ask of any native family: limits that are the same for all, and checks that name nearest values."""

from __future__ import annotations

from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest

MAX_OUTPUTS, MAX_STEPS, MAX_GUIDANCE, MAX_FPS, MAX_SEED = 16, 1000, 100.0, 120, 2**62
MAX_PROMPT_CHARACTERS = 20_000


def check_grid(name: str, value: int | None, step: int, offset: int, most: int) -> None:
    """`value` must be step * n + offset with n >= 1 (n >= 0 when there is an offset), and at most `most`.

    Raises InvalidRequest naming the nearest values that are right.
    """
    least = offset or step
    assert value is not None, f"{name} was not filled from the defaults"
    rule = f"{name} must be a multiple of {step}" + (f" plus {offset}" if offset else "")
    if value < least or value > most:
        raise InvalidRequest(f"{rule}, from {least} to {most}; got {value}", param=name)
    if (value - offset) % step:
        below = (value - offset) // step * step + offset
        nearest = [v for v in (below, below + step) if least <= v <= most]
        raise InvalidRequest(f"{rule}; got {value}, the nearest are {' and '.join(map(str, nearest))}", param=name)


def check_between(name: str, value: float | None, least: float, most: float) -> None:
    """Raises InvalidRequest."""
    if value is None or not least <= value <= most:  # NaN fails too
        raise InvalidRequest(f"{name} must be from {least} to {most}; got {value!r}", param=name)


def check_one_picture(params: SamplingParams, model: str) -> None:
    """Raises InvalidRequest for a video of a model that makes pictures."""
    if params.num_frames != 1:
        raise InvalidRequest(
            f"num_frames must be 1, {model} makes pictures; got {params.num_frames}", param="num_frames"
        )


def check_usual(params: SamplingParams, samplers: tuple[str, ...], *, text_tokens: int) -> None:
    """What every family limits alike; `text_tokens` are what its encoder reads, for the message of a prompt that is
    too long. `true_cfg_scale` is checked where it is set: whether a family takes it, it says itself.

    `params` is complete. Raises InvalidRequest naming the first wrong parameter.
    """
    check_between("num_inference_steps", params.num_inference_steps, 1, MAX_STEPS)
    check_between("guidance_scale", params.guidance_scale, 0.0, MAX_GUIDANCE)
    if params.true_cfg_scale is not None:
        check_between("true_cfg_scale", params.true_cfg_scale, 0.0, MAX_GUIDANCE)
    check_between("fps", params.fps, 1, MAX_FPS)
    check_between("num_outputs_per_prompt", params.num_outputs_per_prompt, 1, MAX_OUTPUTS)
    if params.seed is not None:
        check_between("seed", params.seed, 0, MAX_SEED)
    if params.sampler not in samplers:
        raise InvalidRequest(f"sampler is one of {', '.join(samplers)}; got {params.sampler!r}", param="sampler")
    for name, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
        if text is not None and len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                f"{name} may have {MAX_PROMPT_CHARACTERS} characters (the model reads {text_tokens} tokens); "
                f"got {len(text)}",
                param=name,
            )
