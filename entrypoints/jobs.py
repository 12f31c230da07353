"""From prompts and parameters to checked jobs, before any process is started."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelight.configs.families import FAMILIES, ModelSpec, check_images, check_previews
from safelight.configs.generate_args import GenerateArgs
from safelight.configs.options import did_you_mean
from safelight.configs.sampling_params import SamplingParams
from safelight.entrypoints.pictures import from_paths
from safelight.runtime.errors import ConfigError, InvalidRequest, SafelightError
from safelight.runtime.inputs import InputStore, Picture
from safelight.runtime.messages import GenerationRequest, InputImage, MediaFormat, MediaSpec

_SEEDS = 2**31


@dataclass(frozen=True, slots=True)
class Job:
    """One checked job: `params` is complete, its seed drawn; `chunk_bytes` is its largest chunk of decoded frames."""

    number: int  # from 1
    total: int
    params: SamplingParams
    media: MediaSpec
    chunk_bytes: int
    images: tuple[Picture, ...] = ()


def read_jobs(params: SamplingParams, files: GenerateArgs) -> list[tuple[str, SamplingParams]]:
    """Where each job comes from ("" or "FILE line N: ") and its parameters; none for a slice beyond the last line.

    Raises ConfigError, InvalidRequest.
    """
    if bool(params.prompt.strip()) == (files.prompt_path is not None):
        found = "both" if files.prompt_path else "neither"
        raise ConfigError(f"one of --prompt and --prompt-path expected, got {found}", param="prompt")
    if files.prompt_path is None:
        return [("", params)]
    path = Path(files.prompt_path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-path: {path} cannot be read: {error}", param="prompt_path") from error
    filled = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ConfigError(f"--prompt-path: one prompt a line expected, {path} has none", param="prompt_path")
    first, every = files.slice
    jobs = []
    for number, line in filled[first::every]:
        where = f"{path} line {number}: "
        jobs.append((where, _at(where, lambda line=line: dataclasses.replace(params, **_line(line)))))
    return jobs


def check_jobs(
    spec: ModelSpec,
    found: Sequence[tuple[str, SamplingParams]],
    files: GenerateArgs,
    images: tuple[Picture, ...] = (),
    vae_path: str | None = None,
) -> list[Job]:
    """Fills every unset parameter and checks all jobs; `images` are of each, unless it names its own by path;
    `vae_path`: of another VAE than the model's.

    Raises InvalidRequest or ConfigError naming line and flag.
    """
    return [
        _at(where, lambda n=number, p=params: _check(spec, p, files, vae_path, n, len(found), images))
        for number, (where, params) in enumerate(found, 1)
    ]


def _check(
    spec: ModelSpec,
    params: SamplingParams,
    files: GenerateArgs,
    vae_path: str | None,
    number: int,
    total: int,
    images: tuple[Picture, ...],
) -> Job:
    family = FAMILIES[spec.family]
    check_images(spec, len(params.image_path or images))  # before they are read
    images = from_paths(params.image_path) or images
    complete = sized(spec, params, images)
    if images and not params.image_path:
        complete = dataclasses.replace(complete, image_path=tuple(picture.ref.sha256 for picture in images))
    if complete.seed is None:
        complete = dataclasses.replace(complete, seed=secrets.randbelow(_SEEDS))
    family.validate(spec, complete)
    check_previews(spec, complete.previews, vae_path)
    if complete.previews and not files.save_output:
        raise ConfigError("--previews are files; drop --no-save-output, or --previews", param="previews")
    assert complete.num_frames is not None, "the family's defaults are complete"
    media = MediaSpec(MediaFormat(files.media_format(complete.num_frames)), files.output_quality, files.return_frames)
    return Job(number, total, complete, media, family.profile(spec, complete).chunk_bytes, images)


def sized(spec: ModelSpec, params: SamplingParams, images: tuple[Picture, ...]) -> SamplingParams:
    """Complete parameters: an unset size is that of the pictures, or the model's."""
    return params.merged_over(_size_of(images, spec)).merged_over(spec.defaults)


def _size_of(images: tuple[Picture, ...], spec: ModelSpec) -> SamplingParams:
    """The size that an unset one takes from the pictures, where a model's results have their shape."""
    if (size_of := FAMILIES[spec.family].size_of) is not None:
        return size_of(spec, [(picture.ref.width, picture.ref.height) for picture in images])
    if not images or not spec.image_grid:
        return SamplingParams()
    ref, grid = images[0].ref, spec.image_grid
    return SamplingParams(height=max(grid, ref.height // grid * grid), width=max(grid, ref.width // grid * grid))


def requests(spec: ModelSpec, jobs: Sequence[Job], store: InputStore) -> Iterator[GenerationRequest]:
    """Cleans and tokenizes the prompts, stores the pictures. Raises ModelError when the tokenizer cannot be used."""
    tokenizer = load_tokenizer(spec)
    for job in jobs:
        yield request_of(tokenizer, job.params, job.media, tuple(store.add(picture) for picture in job.images))


def load_tokenizer(spec: ModelSpec) -> Any:
    """The family's tokenizer for a model. Raises ModelError."""
    module, _, attribute = FAMILIES[spec.family].tokenizer.partition(":")
    return getattr(importlib.import_module(module), attribute)(spec.root, spec)


def request_of(
    tokenizer: Any, params: SamplingParams, media: MediaSpec, images: tuple[InputImage, ...] = ()
) -> GenerationRequest:
    """The request of complete parameters and of pictures that are stored."""
    values: dict[str, Any] = dataclasses.asdict(params)
    values["negative_prompt"] = values["negative_prompt"] or ""
    values["num_outputs"] = values.pop("num_outputs_per_prompt")
    del values["image_path"]  # of this process: others know the picture by what is in it
    sizes = tuple((image.width, image.height) for image in images)
    ids = tokenizer.encode_request(values["prompt"], values["negative_prompt"], *([sizes] if sizes else []))
    return GenerationRequest(token_ids=ids, media=media, images=images, **values)


def unknown_words(root: Path, prompt: str) -> list[str]:
    """Words that a model with a vocabulary.json was not trained on; none for other models."""
    path = root / "vocabulary.json"
    if not path.is_file():
        return []
    known = set(json.loads(path.read_text(encoding="utf-8"))["words"])
    return [word for word in re.findall(r"[^\s,.;:!?]+", prompt.lower()) if word not in known]


def _line(line: str) -> dict[str, Any]:
    """The parameters in one line of a prompt file: the prompt alone, or a JSON object."""
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"a JSON object of parameters expected: {error}", param="prompt_path") from error
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown parameter {name!r}{did_you_mean(name, fields)}", param=name)
    if not values.get("prompt"):
        raise InvalidRequest("the JSON object has no prompt", param="prompt")
    return values


def _at(where: str, make: Any) -> Any:
    """The result of `make()`; its errors say where in the prompt file they are."""
    try:
        return make()
    except SafelightError as error:
        raise type(error)(where + error.message, param=error.param) from error
