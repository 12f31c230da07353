"""Any pipeline of diffusers that no native family runs: what can be known of it from its files and its source.

Costs are rough (parameters x tokens); the scheduler corrects them by measured plans. What such a pipeline cannot do is
in `capabilities`; docs/diffusers-backend.md has the table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safelight.configs.families.base import Capabilities, Family, ModelSpec
from safelight.configs.families.calls import CallSignature, diffusers_folder, signature_in, signature_of
from safelight.configs.families.diffusers_costs import DENOISERS, profile, spatial_scale
from safelight.configs.families.limits import CFG_EXTRAS
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import InvalidRequest, ModelError

OWN_SCHEDULER = "default"  # the only sampler: the scheduler that the checkpoint names
FRAMES = ("num_frames", "video_length")
RATES = ("frame_rate", "fps")
GUIDANCE, TRUE_CFG = "guidance_scale", "true_cfg_scale"
CALLBACKS = ("callback_on_step_end", "callback")
# What a request can fill, and what only this program may.
REQUESTED = (
    "prompt", "negative_prompt", "image", "last_image", "height", "width", "num_inference_steps", GUIDANCE, TRUE_CFG,
    *CFG_EXTRAS, *FRAMES, *RATES,
)  # fmt: skip
OWNED = (
    "generator", "output_type", "return_dict", "callback_steps", "callback_on_step_end_tensor_inputs",
    "num_images_per_prompt", "num_videos_per_prompt", "latents", *CALLBACKS,
)  # fmt: skip
LAST_IMAGE = "last_image"  # what a second picture is to pipelines that make a video between two
# Pipelines whose `image` may be a list of pictures that one result is made of, and how many their models were made for.
SEVERAL_IMAGES: Mapping[str, int] = MappingProxyType(
    {
        "QwenImageEditPlusPipeline": 3, "Flux2Pipeline": 10, "Flux2KleinPipeline": 4, "Flux2KleinKVPipeline": 4,
    }
)  # fmt: skip
_UNSUPPORTED_INPUTS = ("mask_image", "control_image", "video", "audio", "audio_length_in_s", "audio_end_in_s")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LARGEST, MOST_FRAMES, MOST_STEPS, MOST_GUIDANCE, MOST_OUTPUTS, MOST_FPS, MAX_SEED = (
    8192, 2000, 1000, 100.0, 16, 120, 2**62,
)  # fmt: skip
MAX_PROMPT_CHARACTERS = 20_000
_SIDE = 512  # of a checkpoint that says nothing of its size


def identify(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """A checkpoint that needs nothing but diffusers and transformers. Raises ModelError: remote code, pickled weights,
    a missing component, a class that diffusers does not have or that cannot be run in steps."""
    return _identify(index, root, trust_remote_code=False)


def identify_trusting(index: Mapping[str, Any], root: Path) -> ModelSpec:
    """As `identify`, but the checkpoint may bring classes of its own (--trust-remote-code)."""
    return _identify(index, root, trust_remote_code=True)


def _identify(index: Mapping[str, Any], root: Path, *, trust_remote_code: bool) -> ModelSpec:
    components = {n: tuple(v) for n, v in index.items() if isinstance(v, list) and len(v) == 2 and n[0] != "_"}
    components = {n: v for n, v in components.items() if v[0] is not None}
    if not trust_remote_code:
        _refuse_remote_code(index, components, root)
    weights = {name: _weights_bytes(root, name) for name in components}
    call = _signature(index, root)
    _check_runnable(call)
    configs = {name: _config(root / name) for name in components}
    denoiser = next((configs[name] for name in DENOISERS if name in configs), {})
    vae = next((configs[name] for name in ("vae", "vqgan", "movq") if name in configs), {})
    spec = ModelSpec(
        "diffusers", call.name, root, _task(call), SamplingParams(), transformer=denoiser, vae=vae,
        sampler=configs.get("scheduler", {}), call=call, weights=weights,
        images=(int(needs_image(call)), _most_images(call)),
        image_grid=0 if "height" in call or "image" not in call else spatial_scale(vae),
    )  # fmt: skip
    return dataclasses.replace(spec, defaults=_defaults(spec, call))


def _refuse_remote_code(index: Mapping[str, Any], components: Mapping[str, tuple[Any, ...]], root: Path) -> None:
    """Only classes of diffusers and transformers: any other module name would be imported and run."""
    pipelines = diffusers_folder() / "pipelines"
    foreign = [("_class_name", index["_class_name"])] if not isinstance(index.get("_class_name"), str) else []
    for name, (library, kind) in components.items():
        known = library in ("diffusers", "transformers")
        if isinstance(library, str) and library.isidentifier() and (pipelines / library).is_dir():
            known = not (root / name / f"{library}.py").exists()  # a class that one pipeline defines for itself
        if not known or not isinstance(kind, str):
            foreign.append((name, (library, kind)))
    if foreign:
        name, value = foreign[0]
        raise ModelError(
            f"{root / 'model_index.json'}: {name} is {value!r}, which is code outside of diffusers and transformers; "
            "start with --trust-remote-code if you have read it and trust it",
            param="trust_remote_code",
        )


def _weights_bytes(root: Path, name: str) -> int:
    """Bytes of a component's safetensors. Raises ModelError: no such folder, or weights as pickles only."""
    folder = root / name
    if not folder.is_dir():
        raise ModelError(f"{root} has no folder {name}, which model_index.json names", param="model_path")
    found = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if found == 0:
        pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{folder} has its weights as {pickled[0]} only; pickled files can execute code and are never read: "
                "convert them to safetensors",
                param="model_path",
            )
    return found


def _signature(index: Mapping[str, Any], root: Path) -> CallSignature:
    name = index.get("_class_name")
    if isinstance(name, list) and len(name) == 2 and all(isinstance(part, str) for part in name):
        return signature_in(root / f"{Path(name[0]).name}.py", name[1])
    return signature_of(str(name))


def check_class(name: str) -> None:
    """Raises ModelError for a class that diffusers does not have or that cannot be run in steps."""
    _check_runnable(signature_of(name))


def _check_runnable(call: CallSignature) -> None:
    """Raises ModelError naming what keeps the class from being run in steps, or fed by a request."""
    if not any(name in call for name in CALLBACKS):
        raise ModelError(f"{call.name} has no step callback, so its jobs could be neither followed nor cancelled; "
                         "it cannot be served", param="model_path")  # fmt: skip
    if "generator" not in call:
        raise ModelError(f"{call.name} takes no generator, so no seed would hold; it cannot be served",
                         param="model_path")  # fmt: skip
    if needed := [name for name in _UNSUPPORTED_INPUTS if name in call]:
        raise ModelError(f"{call.name} works with {needed[0]}, which requests cannot carry", param="model_path")


def _config(folder: Path) -> dict[str, Any]:
    """A component's config; {} for one without (tokenizers), or of a kind that is not JSON objects."""
    for name in ("config.json", "scheduler_config.json"):
        path = folder / name
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{path} cannot be read as JSON: {error}", param="model_path") from error
            return content if isinstance(content, dict) else {}
    return {}


def needs_image(call: CallSignature) -> bool:
    """diffusers gives many inputs the default None and refuses that later; `strength` tells those that do."""
    edits = ("Img2Img", "ImageToVideo", "Image2Video", "Edit", "Upscale")
    return "image" in call.required or (
        "image" in call and ("strength" in call or any(word in call.name for word in edits))
    )


def _most_images(call: CallSignature) -> int:
    """A list means several pictures of one request to few pipelines; to the others it is a batch of requests."""
    return SEVERAL_IMAGES.get(call.name, 1 + (LAST_IMAGE in call)) if "image" in call else 0


def is_video(call: CallSignature) -> bool:
    return any(name in call for name in FRAMES)


def _task(call: CallSignature) -> str:
    return f"{'image' if needs_image(call) else 'text'}-to-{'video' if is_video(call) else 'image'}"


def _defaults(spec: ModelSpec, call: CallSignature) -> SamplingParams:
    """The signature's own; sizes that it leaves open come from the denoiser's sample size, as in diffusers."""
    sample = spec.transformer.get("sample_size")
    sides = sample if isinstance(sample, list | tuple) and len(sample) == 2 else (sample, sample)
    sides = (spec.transformer.get("sample_height", sides[0]), spec.transformer.get("sample_width", sides[1]))
    scale = spatial_scale(spec.vae)
    height, width = (int(side) * scale if isinstance(side, int) else _SIDE for side in sides)
    frames = call.number(*FRAMES) or spec.transformer.get("sample_frames") or 16
    return SamplingParams(
        negative_prompt="",
        height=int(call.number("height") or height),
        width=int(call.number("width") or width),
        num_frames=int(frames) if is_video(call) else 1,
        fps=int(call.number(*RATES) or 16),
        num_inference_steps=int(call.number("num_inference_steps") or 50),
        guidance_scale=float(call.number(GUIDANCE) or 1.0),
        num_outputs_per_prompt=1,
        sampler=OWN_SCHEDULER,
        true_cfg_scale=call.number(TRUE_CFG),
    )


def validate(spec: ModelSpec, params: SamplingParams) -> None:
    """Raises InvalidRequest naming the first parameter that the pipeline does not take. What only the pipeline itself
    can judge, it refuses when the job starts."""
    call = spec.call
    assert call is not None, "identify read it"
    scale = spatial_scale(spec.vae)
    for name, size in (("height", params.height), ("width", params.width)):
        if size is None or size % scale or not scale <= size <= LARGEST:
            raise InvalidRequest(f"{name} must be a multiple of {scale} up to {LARGEST}; got {size}", param=name)
    _between("num_frames", params.num_frames, 1, MOST_FRAMES if is_video(call) else 1)
    _between("num_inference_steps", params.num_inference_steps, 1, MOST_STEPS)
    _between("guidance_scale", params.guidance_scale, 0.0, MOST_GUIDANCE)
    if params.true_cfg_scale is not None:
        _between(TRUE_CFG, params.true_cfg_scale, 0.0, MOST_GUIDANCE)
    _between("fps", params.fps, 1, MOST_FPS)
    _between("num_outputs_per_prompt", params.num_outputs_per_prompt, 1, MOST_OUTPUTS)
    if params.seed is not None:
        _between("seed", params.seed, 0, MAX_SEED)
    empties: dict[str, Any] = dict.fromkeys((TRUE_CFG, *CFG_EXTRAS)) | {
        "negative_prompt": "",
        GUIDANCE: spec.defaults.guidance_scale,
        "num_inference_steps": spec.defaults.num_inference_steps,
    }
    for name, empty in empties.items():
        if name not in call and getattr(params, name) != empty:
            raise InvalidRequest(f"{call.name} takes no {name}; leave it out", param=name)
    if params.sampler != OWN_SCHEDULER:
        message = f"sampler is {OWN_SCHEDULER} (the checkpoint's own) with --backend diffusers; got {params.sampler!r}"
        raise InvalidRequest(message, param="sampler")
    for name, text in (("prompt", params.prompt), ("negative_prompt", params.negative_prompt)):
        if text is not None and len(text) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(f"{name} may have {MAX_PROMPT_CHARACTERS} characters; got {len(text)}", param=name)


def _between(name: str, value: float | None, least: float, most: float) -> None:
    if value is None or not least <= value <= most:  # NaN fails too
        raise InvalidRequest(f"{name} must be from {least:g} to {most:g}; got {value!r}", param=name)


FAMILY = Family(
    name="diffusers",
    pipeline_classes=(),
    pipeline="safelight.runtime.models.diffusers_backend.pipeline:load",
    tokenizer="safelight.runtime.text.raw:load_tokenizer",
    variants=(),
    samplers=(OWN_SCHEDULER,),
    identify=identify,
    validate=validate,
    profile=profile,
    backend="diffusers",
    capabilities=Capabilities(resumes=False, batches=False, spans_ranks=False, previews=False),
)
