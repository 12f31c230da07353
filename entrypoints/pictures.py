"""Pictures as Python callers and the command line give them: paths, bytes of files, pictures of Pillow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from safelight.runtime.errors import InvalidRequest
from safelight.runtime.inputs import Picture, check_picture, picture_of

if TYPE_CHECKING:
    from PIL import Image

    PictureLike: TypeAlias = str | os.PathLike[str] | bytes | Image.Image


def from_paths(paths: Sequence[str]) -> tuple[Picture, ...]:
    """The checked pictures of --image-path. Raises InvalidRequest."""
    return tuple(check_picture(_read(path, "--image-path", "image_path")) for path in paths)


def check_list(images: object) -> None:
    """Raises InvalidRequest for one picture in place of a list of them."""
    if not isinstance(images, list | tuple):
        raise InvalidRequest(f"images: a list of pictures expected, got {type(images).__name__}", param="images")


def from_likes(images: Sequence[PictureLike]) -> tuple[Picture, ...]:
    """The checked pictures of `images=[...]`. Raises InvalidRequest."""
    from PIL import Image

    found = []
    for image in images:
        if isinstance(image, Image.Image):
            found.append(picture_of(image, "images"))
        elif isinstance(image, bytes | bytearray):
            found.append(check_picture(bytes(image), "images"))
        elif isinstance(image, str | os.PathLike):
            found.append(check_picture(_read(image, "images", "images"), "images"))
        else:
            raise InvalidRequest(
                f"images: paths, bytes of files or pictures of PIL expected, got {type(image).__name__}", param="images"
            )
    return tuple(found)


def _read(path: str | os.PathLike[str], shown: str, param: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{shown}: {path} cannot be read: {error}", param=param) from error
