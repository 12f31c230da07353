"""Any diffusers pipeline as a Pipeline: each output is one call of it, run step by step (docs/diffusers-backend.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin
from PIL.Image import Resampling

from safelight.configs.backend import check_call
from safelight.configs.families import FAMILIES, ModelSpec
from safelight.configs.families.calls import CallSignature
from safelight.configs.families.diffusers import FRAMES, GUIDANCE, LAST_IMAGE, RATES, TRUE_CFG
from safelight.configs.families.limits import CFG_EXTRAS
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams
from safelight.runtime.errors import JobFailed
from safelight.runtime.inputs import InputStore
from safelight.runtime.messages import GenerationRequest
from safelight.runtime.models.diffusers_backend.call import PipelineCall
from safelight.runtime.models.diffusers_backend.loading import load_diffusers, modules_of
from safelight.runtime.models.diffusers_backend.shared import SharedModules
from safelight.runtime.pipelines.protocol import FrameChunk

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions


@dataclass(frozen=True, slots=True)
class CallState:
    """One output: its running call, and how many of the `steps` that were asked for are done.

    Other than a DenoiseState it is advanced in place: the call cannot go back.
    """

    step: int
    steps: int
    call: PipelineCall

    def close(self) -> None:
        self.call.close()


@dataclass(frozen=True, slots=True)
class DiffusersPipeline:
    """One loaded pipeline. `kwargs` go to every call. It holds no state of any job."""

    spec: ModelSpec
    device: torch.device
    pipe: Any
    shared: SharedModules
    kwargs: Mapping[str, Any]
    inputs: InputStore | None
    collective_decode: bool = False

    def weights_bytes(self) -> int:
        """Bytes of all resident weights."""
        parameters = {id(p): p for module in modules_of(self.pipe).values() for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in parameters.values())

    def profile(self, request: GenerationRequest) -> JobProfile:
        """The profile that frontend and scheduler compute from the same request."""
        return FAMILIES[self.spec.family].profile(self.spec, SamplingParams.of(request))

    def encode(self, request: GenerationRequest) -> dict[str, Any]:
        """The arguments that all outputs share. The text itself is encoded by each output's call, in `prepare`."""
        call = self.spec.call
        assert call is not None, "identify read it"
        values: dict[str, Any] = {
            "prompt": request.prompt,
            "height": request.height,
            "width": request.width,
            "num_inference_steps": request.num_inference_steps,
            **dict.fromkeys(FRAMES, request.num_frames),
            **dict.fromkeys(RATES, request.fps),
        }
        if request.negative_prompt:  # to some pipelines "" is another thing than none
            values["negative_prompt"] = request.negative_prompt
        if request.guidance_scale != self.spec.defaults.guidance_scale or call.number(GUIDANCE) is not None:
            values[GUIDANCE] = request.guidance_scale
        if request.true_cfg_scale is not None:
            values[TRUE_CFG] = request.true_cfg_scale
        values |= {name: value for name in CFG_EXTRAS if (value := getattr(request, name)) is not None}
        if request.images:
            values |= self._images(request, call)
        given = {name: value for name, value in values.items() if name in call}
        return given | dict(self.kwargs) | ({"output_type": "np"} if "output_type" in call else {})

    def _images(self, request: GenerationRequest, call: CallSignature) -> dict[str, Any]:
        """The request's pictures, scaled to the size asked for where the pipeline takes its size from the picture."""
        if self.inputs is None:
            raise JobFailed("this worker was started without a folder of input pictures")
        size = (request.width, request.height)
        images = [self.inputs.read(ref) for ref in request.images]
        if self.spec.image_grid:
            images = [image if image.size == size else image.resize(size, Resampling.LANCZOS) for image in images]
        if len(images) == 2 and LAST_IMAGE in call:
            return {"image": images[0], LAST_IMAGE: images[1]}
        return {"image": images[0] if len(images) == 1 else images}

    def prepare(self, request: GenerationRequest, conditioning: dict[str, Any], index: int) -> CallState:
        """Starts the call of output `index` and runs it up to its first step. Noise is of a CPU generator."""
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        shape = (request.num_frames, request.height, request.width)
        call = PipelineCall(self.pipe, self.shared, {**conditioning, "generator": generator}, shape)
        try:
            call.begin()
        except BaseException:
            call.close()
            raise
        return CallState(0, request.num_inference_steps, call)

    def step(self, states: Sequence[CallState]) -> list[CallState]:
        """One step of each, one after the other. When a loop has another number of iterations than the steps asked for,
        a step is its share of them."""
        advanced = []
        for state in states:
            state.call.reach(math.ceil((state.step + 1) * state.call.iterations / state.steps))
            advanced.append(replace(state, step=state.step + 1))
        return advanced

    def decode(self, state: CallState, cursor: Any | None) -> tuple[FrameChunk, Any | None]:
        """The rest of the call; all frames are one chunk."""
        return FrameChunk(state.call.finish()), None

    def preview(self, state: CallState) -> None:
        """What a call holds between its steps is known to the pipeline alone (`capabilities.previews`)."""

    def save(self, state: CallState) -> dict[str, torch.Tensor]:
        """A call that runs cannot be written down (`capabilities.resumes`)."""
        raise JobFailed(f"{self.spec.variant} runs through diffusers, whose calls make no checkpoints")

    def load(self, request: GenerationRequest, conditioning: Any, tensors: dict[str, torch.Tensor]) -> CallState:
        """See `save`: only a checkpoint of another backend can come here."""
        raise JobFailed(f"{self.spec.variant} runs through diffusers, which resumes from no checkpoint; start again")


def load(spec: ModelSpec, options: LoadOptions) -> DiffusersPipeline:
    """Loads `spec.root` with diffusers. Raises ModelError and ConfigError."""
    assert spec.call is not None, "identify read it"
    check_call(spec.call, options.diffusers_kwargs)
    pipe = load_diffusers(spec, options)
    # transformers installs hooks of its own at a module's first use, which stay: only diffusers' are a call's
    shared = SharedModules(part for part in modules_of(pipe).values() if isinstance(part, ModelMixin))
    inputs = InputStore(options.input_dir) if options.input_dir else None
    return DiffusersPipeline(spec, options.device, pipe, shared, dict(options.diffusers_kwargs), inputs)
