"""What `safelight generate` reads and writes, beside the server's arguments and the sampling parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from safelight.configs.options import check_options, flag, option
from safelight.runtime.errors import ConfigError

FORMATS = ("png", "jpeg", "webp", "mp4", "npy")
_OF_EXTENSION = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "mp4": "mp4", "npy": "npy"}
_LONGEST_NAME = 230  # file systems allow 255; numbers and extensions come on top
_STILL = ("png", "jpeg", "webp")


@dataclass(frozen=True, slots=True)
class GenerateArgs:
    """Raises ConfigError naming the flag when a value is of the wrong type or contradicts another."""

    prompt_path: str | None = option(None, "file with one job a line: a prompt, or a JSON object of parameters")
    output_path: str = option("outputs", "folder for the results")
    output_file_name: str | None = option(None, "file name of the result; unset: made of prompt and seed")
    output_format: str | None = option(None, "unset: by the file name, else png, or mp4 for a video", choices=FORMATS)
    output_quality: int | None = option(None, "of JPEG and WebP, 0 to 100", minimum=0)
    save_output: bool = option(True, "keep the result as a file")
    return_frames: bool = option(False, "also write the raw frames, as .npy beside the result")
    json: bool = option(False, "one JSON object a line on stdout, for machines")
    prompt_slice: str | None = option(None, "I/N: only every N-th job of --prompt-path, from the I-th (0 to N-1) on")
    resume: bool = option(False, "go on with the run that --state-dir holds; without one there, start it")

    def __post_init__(self) -> None:
        check_options(self, ConfigError)
        name = self.output_file_name
        if name is not None and (
            not name.strip() or {"/", "\0"} & {*name} or name in (".", "..") or len(name.encode()) > _LONGEST_NAME
        ):
            raise ConfigError(
                f"--output-file-name: a plain file name of at most {_LONGEST_NAME} bytes expected, got {name!r}; its "
                "folder is --output-path",
                param="output_file_name",
            )
        if self.prompt_slice is not None and self.prompt_path is None:
            raise ConfigError("--prompt-slice takes jobs from --prompt-path FILE; give that too", param="prompt_slice")
        _ = self.slice
        if self.output_quality is not None and self.output_quality > 100:
            raise ConfigError(
                f"--output-quality: at most 100 expected, got {self.output_quality}", param="output_quality"
            )
        named = self._named_format()
        if named and self.output_format and named != self.output_format:
            raise ConfigError(
                f"--output-format {self.output_format} contradicts --output-file-name {name}; drop one of them",
                param="output_format",
            )

    @property
    def slice(self) -> tuple[int, int]:
        """(first, every) of the lines of --prompt-path. Raises ConfigError for anything but I/N with I < N."""
        if self.prompt_slice is None:
            return 0, 1
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.prompt_slice)
        first, every = (int(match[1]), int(match[2])) if match else (0, 0)
        if first >= every:
            raise ConfigError(
                f"--prompt-slice: I/N with I from 0 to N-1 expected, got {self.prompt_slice!r}; the first of 4 is 0/4",
                param="prompt_slice",
            )
        return first, every

    def _named_format(self) -> str | None:
        stem, _, extension = (self.output_file_name or "").rpartition(".")
        return _OF_EXTENSION.get(extension.lower()) if stem else None

    def media_format(self, num_frames: int) -> str:
        """The format of a job's files. Raises ConfigError for a still-image format with several frames."""
        chosen = self.output_format or self._named_format() or ("png" if num_frames == 1 else "mp4")
        if chosen in _STILL and num_frames > 1:
            name = "output_format" if self.output_format else "output_file_name"
            raise ConfigError(
                f"{flag(name)}: {chosen} holds one picture, not {num_frames} frames; use mp4, or --num-frames 1",
                param=name,
            )
        return chosen
