"""The bodies of requests and replies: OpenAI's schema with our additions. /openapi.json is made of these structs.

Requests are lenient: a null is an absent field, OpenAI's fields that mean nothing here are ignored (`IGNORED`), unknown
ones are named in a response header. Replies are strict: they are made of structs only.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from safelight.configs.previews import MAX_PREVIEWS

MAX_SEED = 2**62
Prompt = Annotated[str, Meta(min_length=1, max_length=20_000, description="what to make")]
Size = Annotated[
    str, Meta(pattern=r"^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto)$", description="WIDTHxHEIGHT, or auto: the default")
]
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED, description="of the noise; picture i uses seed + i; absent: drawn")]
Steps = Annotated[int, Meta(ge=1, le=1000, description="denoising steps")]
Guidance = Annotated[float, Meta(ge=0, le=100, description="classifier-free guidance; 1 switches it off")]
TrueCfg = Annotated[
    float,
    Meta(ge=0, le=100, description="classifier-free guidance of models that guidance_scale steers another way; 1: off"),
]
CfgNormalization = Annotated[
    float,
    Meta(
        ge=0, le=100, description="longest that a guided prediction may be, in lengths of the conditional one; 0: any"
    ),
]
CfgTruncation = Annotated[
    float,
    Meta(
        ge=0,
        le=100,
        description="share of the way from noise to picture after which guidance is switched off; 1: never",
    ),
]
Completed = Literal["image_generation.completed", "image_edit.completed"]
Pixels = Annotated[int, Meta(ge=1, le=99_999)]


class ImageRequest(msgspec.Struct, kw_only=True, frozen=True):
    """POST /v1/images/generations."""

    completed: ClassVar[Completed] = "image_generation.completed"

    prompt: Prompt
    model: Annotated[str, Meta(description="as /v1/models names it; absent: the one that is served")] | None = None
    n: Annotated[int, Meta(ge=1, le=10, description="pictures")] = 1
    size: Size = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Meta(ge=0, le=100, description="quality of JPEG and WebP")] | None = None
    stream: bool = False
    partial_images: Annotated[int, Meta(ge=0, le=3, description="previews of a streamed picture")] = 0
    seed: Seed | None = None
    negative_prompt: Annotated[str, Meta(max_length=20_000)] | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    true_cfg_scale: TrueCfg | None = None
    cfg_normalization: CfgNormalization | None = None
    cfg_truncation: CfgTruncation | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    sampler: str | None = None


Pictures = Annotated[
    str | list[str],
    Meta(description="pictures: in a form files, else data: URLs, or http and https ones with --allow-url-inputs"),
]


class ImageEditRequest(ImageRequest, kw_only=True, frozen=True):
    """POST /v1/images/edits: the fields of a generation, and the pictures to start from, in this order."""

    completed: ClassVar[Completed] = "image_edit.completed"
    image: Pictures | None = None
    images: Pictures | None = msgspec.field(name="image[]", default=None)
    url: Pictures | None = None
    urls: Pictures | None = msgspec.field(name="url[]", default=None)


class VideoRequest(msgspec.Struct, kw_only=True, frozen=True):
    """POST /v1/videos."""

    prompt: Prompt
    model: Annotated[str, Meta(description="as /v1/models names it; absent: the one that is served")] | None = None
    seconds: (
        Annotated[
            float, Meta(gt=0, le=600, description="from the first frame to the last, to the nearest number of frames")
        ]
        | None
    ) = None
    size: Size = "auto"
    num_frames: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    fps: Annotated[int, Meta(ge=1, le=120)] | None = None
    seed: Seed | None = None
    negative_prompt: Annotated[str, Meta(max_length=20_000)] | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    true_cfg_scale: TrueCfg | None = None
    cfg_normalization: CfgNormalization | None = None
    cfg_truncation: CfgTruncation | None = None
    height: Pixels | None = None
    width: Pixels | None = None
    sampler: str | None = None
    output_format: Literal["mp4", "webp"] = "mp4"
    output_compression: Annotated[int, Meta(ge=0, le=100, description="quality of WebP")] | None = None
    input_reference: Pictures | None = None
    partial_images: Annotated[int, Meta(ge=0, le=MAX_PREVIEWS, description="previews among the video's events")] = 0


# Fields of OpenAI's (and SGLang Diffusion's) requests without a meaning here: taken, and not warned of.
IGNORED = frozenset(
    {"user", "background", "moderation", "quality", "style", "input_fidelity", "extra_body", "metadata"}
)


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct, frozen=True):
    error: ErrorBody


class _Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """Base of replies; `None` is left out by those that say so."""


class TokenDetails(_Reply, frozen=True, kw_only=True):
    image_tokens: int
    text_tokens: int


class Usage(_Reply, frozen=True, kw_only=True):
    """Input: text tokens; output: latent tokens of the pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Image(_Reply, frozen=True, kw_only=True):
    """One of `b64_json` and `url`; the file is at /v1/images/`id`/content either way."""

    id: str
    b64_json: str | msgspec.UnsetType = msgspec.UNSET
    url: str | msgspec.UnsetType = msgspec.UNSET
    seed: int


class ImagesReply(_Reply, frozen=True, kw_only=True):
    created: int
    id: str
    data: list[Image]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    usage: Usage


class ImageEvent(_Reply, frozen=True, kw_only=True):
    """The event of a streamed picture that is done."""

    type: Completed
    b64_json: str
    created_at: int
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    usage: Usage


class PartialImage(_Reply, frozen=True, kw_only=True):
    """The event of a preview of a streamed picture: the `partial_image_index`-th (from 0) of picture `index`, after
    `step` steps. `size` is that of the preview."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    partial_image_index: int
    created_at: int
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    index: int
    step: int


class VideoError(_Reply, frozen=True, kw_only=True):
    code: str
    message: str


class Video(_Reply, frozen=True, kw_only=True):
    """OpenAI's 13 keys."""

    id: str
    object: Literal["video"] = "video"
    created_at: int
    completed_at: int | None
    expires_at: int | None
    model: str
    progress: Annotated[int, Meta(ge=0, le=100)]
    prompt: str
    remixed_from_video_id: None = None
    seconds: str
    size: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    error: VideoError | None


class VideoList(_Reply, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(_Reply, frozen=True, kw_only=True):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class VideoProgress(_Reply, frozen=True, kw_only=True):
    """An event of GET /v1/videos/{id}/events before the last one, which is the Video."""

    id: str
    stage: Literal["queued", "encoding", "denoising", "decoding", "saving"]
    index: int
    step: int
    steps: int
    position: int
    eta_ms: float | None


class VideoPreview(_Reply, frozen=True, kw_only=True):
    """An event of GET /v1/videos/{id}/events: the middle frame after `step` steps."""

    id: str
    b64_json: str
    partial_image_index: int
    created_at: int
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    step: int


class Model(_Reply, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "safelight"


class ModelList(_Reply, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class ModelInfo(_Reply, frozen=True, kw_only=True):
    """SGLang Diffusion's /models."""

    model_path: str
    task_type: str
    pipeline_name: str
    pipeline_class: str
    num_gpus: int
    dit_precision: str
    vae_precision: str


class Health(_Reply, frozen=True, kw_only=True):
    """`components` says of each process "ok" or what is wrong with it."""

    status: Literal["ok", "starting", "unhealthy"]
    components: dict[str, str]


class Readiness(_Reply, frozen=True, kw_only=True):
    ready: bool
    draining: bool
    queued: int
    running: int
