"""What the Python API returns: files, pictures, frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.configs.families import ModelSpec, check_images
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.jobs import check_jobs, load_tokenizer, request_of
from safelight.entrypoints.pictures import check_list, from_likes
from safelight.runtime.errors import InvalidRequest, JobFailed
from safelight.runtime.inputs import InputStore
from safelight.runtime.messages import Artifact, GenerationRequest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

    from safelight.entrypoints.pictures import PictureLike


@dataclass(frozen=True, slots=True)
class Result:
    """The outputs of a completed job, in order."""

    job: str
    artifacts: tuple[Artifact, ...]

    @property
    def paths(self) -> list[Path]:
        """The files, where the server keeps them until they are deleted or expire."""
        return [Path(artifact.path) for artifact in self.artifacts]

    def frames(self) -> list[npt.NDArray[np.uint8]]:
        """Each output as uint8 RGB (F, H, W, 3). Exact for PNG and NPY; MP4, JPEG and WebP lose a little."""
        return [_frames(path) for path in self.paths]

    def images(self) -> list[Image.Image]:
        """Each output's first frame."""
        from PIL import Image

        return [Image.fromarray(frames[0]) for frames in self.frames()]


class RequestMaker:
    """Checks and completes requests for one model, whose server finds their pictures in `inputs`.

    `vae_path`: of another VAE than the model's. Raises ModelError when the model's tokenizer cannot be read.
    """

    def __init__(self, spec: ModelSpec, inputs: InputStore, vae_path: str | None = None) -> None:
        self._spec, self._tokenizer, self._inputs, self._vae = spec, load_tokenizer(spec), inputs, vae_path

    def make(
        self,
        prompt: str,
        output_format: str | None,
        output_quality: int | None,
        images: Sequence[PictureLike] = (),
        **params: Any,
    ) -> GenerationRequest:
        """`params` are SamplingParams' fields. Raises InvalidRequest and ConfigError naming the parameter."""
        files = GenerateArgs(output_format=output_format, output_quality=output_quality)
        wanted = SamplingParams(prompt=prompt, **params)
        check_list(images)
        if images and wanted.image_path:
            raise InvalidRequest("one of images and image_path expected, got both", param="images")
        if not wanted.image_path:
            check_images(self._spec, len(images), "images")
        (job,) = check_jobs(self._spec, [("", wanted)], files, from_likes(images), self._vae)
        stored = tuple(self._inputs.add(picture) for picture in job.images)
        return request_of(self._tokenizer, job.params, job.media, stored)


def _frames(path: Path) -> npt.NDArray[np.uint8]:
    import numpy as np

    try:
        if path.suffix == ".npy":
            loaded: npt.NDArray[np.uint8] = np.load(path, allow_pickle=False)
            return loaded
        if path.suffix == ".mp4":
            import av

            with av.open(str(path)) as container:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        from PIL import Image, ImageSequence

        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    except OSError as error:
        raise JobFailed(f"the result {path} cannot be read: {error}") from error
