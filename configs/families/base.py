"""What a model family tells the frontend and the scheduler, without torch.

A family is one module in this folder that builds a `Family`, and one line in `configs/families/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelight.configs.encoder_parallel import EncoderShape
from safelight.configs.families.calls import CallSignature
from safelight.configs.profile import JobProfile
from safelight.configs.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Variant:
    """One published checkpoint: its hub id and the defaults that its authors recommend.

    `configs`: its component configs, by component (a field of ModelSpec), for planning without the files.
    """

    name: str
    hub_id: str
    task: str  # "text-to-video", "text-to-image"
    defaults: SamplingParams
    parameters: str  # for people: "1.3B"
    note: str = ""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model directory, identified: which family, which variant, and the numbers of its component configs."""

    family: str
    variant: str
    root: Path
    task: str
    defaults: SamplingParams
    transformer: Mapping[str, Any] = field(default_factory=dict)  # transformer/config.json
    vae: Mapping[str, Any] = field(default_factory=dict)
    text_encoder: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)  # scheduler/scheduler_config.json
    call: CallSignature | None = None  # backend diffusers: what the pipeline takes
    weights: Mapping[str, int] = field(default_factory=dict)  # backend diffusers: bytes by component
    images: tuple[int, int] = (0, 0)  # how many pictures a request has to bring, and may
    image_grid: int = 0  # pictures come out as large as the one that came in, in multiples of this; 0: as asked
    reason: str = ""  # why this family was taken
    text_encoder_2: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)  # processor/preprocessor_config.json


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What sharing a step between ranks depends on. Every layer attends over the whole sequence once."""

    heads: int
    head_dim: int
    layers: int
    joint_text: int = 0  # text tokens in the same sequence as the picture's (JointShare); 0: cross-attention
    text_weights: int = 0  # values of the matrices that only text tokens meet


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the pipelines of a family can do beyond running a job on one rank.

    A job that cannot resume starts again from step 0 when its group dies.
    """

    resumes: bool = True  # in the middle of its steps, from a checkpoint
    batches: bool = True  # states of several jobs share one forward
    spans_ranks: bool = True  # several ranks share one job
    previews: bool = True  # small pictures of a job that is under way, if its VAE's factors are known


@dataclass(frozen=True, slots=True)
class Family:
    """`pipeline` and `tokenizer` are dotted "module:attribute" names, resolved by the worker and by the frontend.

    identify(index, root) -> ModelSpec: from model_index.json and the component configs (raises ModelError).
    resolve(spec, params) -> SamplingParams: fills every unset field from the variant's defaults.
    validate(spec, params): raises InvalidRequest naming the parameter and the nearest valid values; never changes it.
    profile(spec, params) -> JobProfile.
    attention(spec) -> AttentionShape: of a family that spans ranks.
    encoder(spec) -> EncoderShape: of the text encoder, if ranks can share its matrices; else None.
    size_of(spec, sizes) -> SamplingParams: width and height of a result of no asked size, from those of the request's
        pictures; else None, and `image_grid` says it.
    """

    name: str
    pipeline_classes: tuple[str, ...]  # `_class_name` values in model_index.json that this family runs natively
    pipeline: str
    tokenizer: str
    variants: tuple[Variant, ...]
    samplers: tuple[str, ...]
    identify: Callable[[Mapping[str, Any], Path], ModelSpec]
    validate: Callable[[ModelSpec, SamplingParams], None]
    profile: Callable[[ModelSpec, SamplingParams], JobProfile]
    attention: Callable[[ModelSpec], AttentionShape] | None = None
    encoder: Callable[[ModelSpec], EncoderShape] | None = None
    size_of: Callable[[ModelSpec, Sequence[tuple[int, int]]], SamplingParams] | None = None
    backend: str = "safelight"  # as --backend calls it
    capabilities: Capabilities = Capabilities()

    def attention_of(self, spec: ModelSpec) -> AttentionShape:
        assert self.attention is not None, f"{self.name} runs on one rank"
        return self.attention(spec)

    def guided_by_default(self, spec: ModelSpec) -> bool:
        """Whether a request with the model's defaults has two branches, which ranks can take apart."""
        return any(phase.batch_key.guided for phase in self.profile(spec, spec.defaults).phases)

    def encoder_of(self, spec: ModelSpec) -> EncoderShape | None:
        return None if self.encoder is None else self.encoder(spec)
