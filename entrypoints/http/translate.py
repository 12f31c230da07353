"""From OpenAI's request structs to a GenerationRequest: names, limits, the family's rules, tokens. No work yet."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safelight.configs.families import FAMILIES, check_images, identify, no_previews
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.http.pictures import Brought, Intake
from safelight.entrypoints.http.schemas import ImageEditRequest, ImageRequest, VideoRequest
from safelight.entrypoints.jobs import load_tokenizer, request_of, sized
from safelight.runtime.errors import InvalidRequest, NotFound
from safelight.runtime.inputs import Picture
from safelight.runtime.messages import (
    GenerationRequest,
    InputImage,
    MediaFormat,
    MediaSpec,
    RequestLimits,
    ServedModel,
)

_SEEDS = 2**31
_DEFAULT_SECONDS = 2.0  # of a model whose default is a picture
_SEARCH = 16  # frames around the number asked for by seconds
_STILLS = {"png": MediaFormat.PNG, "jpeg": MediaFormat.JPEG, "webp": MediaFormat.WEBP}
_VIDEOS = {"mp4": MediaFormat.MP4, "webp": MediaFormat.WEBP}


class Translator:
    """Knows the served model. Raises ModelError when it cannot be served."""

    def __init__(self, model: ServedModel, limits: RequestLimits) -> None:
        self.model = model
        self.spec = identify(Path(model.root), model.backend, model.trust_remote_code)
        self.no_previews = no_previews(self.spec, model.vae_path)  # why the model makes none
        self._limits = limits
        self._family = FAMILIES[self.spec.family]
        self._tokenizer = load_tokenizer(self.spec)

    def check_model(self, name: str | None) -> None:
        """Raises NotFound for a model that is not served here."""
        if name is not None and name not in self.names:
            raise NotFound(f"the model {name[:200]!r} is not served here; {self.model.id!r} is", param="model")

    @property
    def names(self) -> tuple[str, ...]:
        """What the served model may be called; the first is its id."""
        return tuple(dict.fromkeys((self.model.id, self.spec.variant, Path(self.model.root).name)))

    def warnings(self, body: ImageRequest | VideoRequest) -> list[str]:
        """What the client should know of a body that is taken."""
        if not body.partial_images or self.no_previews is None:
            return []
        return [f"partial_images: only the finished result will come: {self.no_previews}"]

    async def image(self, body: ImageRequest, seed: int | None, brought: Brought, intake: Intake) -> GenerationRequest:
        """`seed` is taken when the body has none; drawn when that is None too. The pictures are taken last.

        Raises InvalidRequest, NotFound.
        """
        if isinstance(body, ImageEditRequest) and self.spec.task == "image-to-video":
            raise InvalidRequest(f"{self.model.id} makes videos from pictures; use /v1/videos", param="model")
        height, width = _size(body)
        params = self._params(body, seed, height=height, width=width, num_frames=1, num_outputs_per_prompt=body.n)
        media = MediaSpec(_STILLS[body.output_format], body.output_compression)
        return await self._request(body, params, media, brought, intake)

    async def video(self, body: VideoRequest, seed: int | None, brought: Brought, intake: Intake) -> GenerationRequest:
        """As `image`."""
        if self.spec.task.endswith("image"):
            raise InvalidRequest(f"{self.model.id} makes pictures only; use /v1/images/generations", param="model")
        height, width = _size(body)
        params = self._params(body, seed, height=height, width=width, fps=body.fps, num_frames=body.num_frames)
        if body.num_frames is None and (body.seconds is not None or params.num_frames == 1):
            params = self._lasting(params, body.seconds or _DEFAULT_SECONDS)
        elif body.num_frames is not None and body.seconds is not None:
            raise InvalidRequest("one of seconds and num_frames expected, got both", param="seconds")
        media = MediaSpec(_VIDEOS[body.output_format], body.output_compression)
        return await self._request(body, params, media, brought, intake)

    def _params(self, body: ImageRequest | VideoRequest, seed: int | None, **more: Any) -> SamplingParams:
        self.check_model(body.model)
        given = SamplingParams(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            num_inference_steps=body.num_inference_steps,
            guidance_scale=body.guidance_scale,
            true_cfg_scale=body.true_cfg_scale,
            cfg_normalization=body.cfg_normalization,
            cfg_truncation=body.cfg_truncation,
            sampler=body.sampler,
            seed=body.seed if body.seed is not None else seed,
            previews=body.partial_images if self.no_previews is None else 0,
            **more,
        )
        params = given.merged_over(self.spec.defaults)
        return params if params.seed is not None else dataclasses.replace(params, seed=secrets.randbelow(_SEEDS))

    def _lasting(self, params: SamplingParams, seconds: float) -> SamplingParams:
        """With the valid number of frames that is nearest to so many seconds from the first to the last."""
        assert params.fps is not None, "the family's defaults are complete"
        wanted = max(2, round(seconds * params.fps) + 1)
        error: InvalidRequest | None = None
        for distance in range(_SEARCH):
            for frames in (wanted + distance, wanted - distance):
                changed = dataclasses.replace(params, num_frames=max(2, frames))
                try:
                    self._family.validate(self.spec, changed)
                except InvalidRequest as refusal:
                    if refusal.param != "num_frames":
                        raise
                    error = refusal
                else:
                    return changed
        assert error is not None, "tried"
        raise error

    async def _request(
        self,
        body: ImageRequest | VideoRequest,
        params: SamplingParams,
        media: MediaSpec,
        brought: Brought,
        intake: Intake,
    ) -> GenerationRequest:
        self._check_count(body, brought)
        self._check(body, params)
        images: tuple[InputImage, ...] = ()
        if brought.count:
            height, width = _size(body)

            def check(pictures: tuple[Picture, ...]) -> None:
                nonlocal params
                names = tuple(picture.ref.sha256 for picture in pictures)  # how many there are counts for the costs
                given = dataclasses.replace(params, height=height, width=width, image_path=names)
                params = sized(self.spec, given, pictures)
                self._check(body, params)

            images = await intake.take(brought, check)
        return await asyncio.to_thread(request_of, self._tokenizer, params, media, images)  # milliseconds

    def _check_count(self, body: ImageRequest | VideoRequest, brought: Brought) -> None:
        """Raises InvalidRequest unless the model takes so many pictures, under the client's name of them."""
        if not brought.count and self.spec.images[0] > 0 and not isinstance(body, ImageEditRequest):
            where = "input_reference" if isinstance(body, VideoRequest) else "image of /v1/images/edits"
            raise InvalidRequest(
                f"{self.model.id} ({self.spec.task}) starts from a picture; send it as {where}", param=brought.param
            )
        check_images(self.spec, brought.count, brought.param)
        if not brought.count and isinstance(body, ImageEditRequest):
            raise InvalidRequest(
                f"image: a picture to edit expected; {self.model.id} makes them from text at /v1/images/generations",
                param="image",
            )

    def _check(self, body: ImageRequest | VideoRequest, params: SamplingParams) -> None:
        """Raises InvalidRequest under the body's own names."""
        height, width, limits = params.height or 0, params.width or 0, self._limits
        size = "size" if body.size != "auto" else "height"
        frames = "seconds" if isinstance(body, VideoRequest) and body.seconds is not None else "num_frames"
        _at_most(size, "pixels", height * width, limits.max_pixels)
        _at_most(frames, "frames", params.num_frames or 0, limits.max_frames)
        _at_most("num_inference_steps", "steps", params.num_inference_steps or 0, limits.max_steps)
        _at_most("n", "pictures", params.num_outputs_per_prompt or 0, limits.max_outputs)
        names = {"height": size, "width": size if size == "size" else "width", "num_frames": frames}
        names["num_outputs_per_prompt"] = "n"
        _renamed(names, lambda: self._family.validate(self.spec, params))


def _at_most(param: str, what: str, value: int, limit: int) -> None:
    if value > limit:
        raise InvalidRequest(f"{param}: this server makes at most {limit} {what}, got {value}", param=param)


def _renamed(names: dict[str, str], check: Callable[[], None]) -> None:
    try:
        check()
    except InvalidRequest as error:
        raise type(error)(error.message, param=names.get(error.param or "", error.param)) from None


def _size(body: ImageRequest | VideoRequest) -> tuple[int | None, int | None]:
    """(height, width), None for the default."""
    if body.size == "auto":
        return body.height, body.width
    width, _, height = body.size.partition("x")
    if body.height not in (None, int(height)) or body.width not in (None, int(width)):
        raise InvalidRequest(f"size {body.size} contradicts height and width; send one of them", param="size")
    return int(height), int(width)
