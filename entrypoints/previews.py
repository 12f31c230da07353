"""What clients get of a job that is under way: small pictures of what it will be."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelight.runtime.messages import PreviewMade

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Preview:
    """The `number`-th preview (from 0) of output `index`, after `step` steps; `data` is a file of `media_type`.

    Of a video it shows the middle frame.
    """

    job: str
    index: int
    number: int
    step: int
    width: int
    height: int
    media_type: str
    data: bytes

    @property
    def place(self) -> tuple[int, int]:
        """Grows from preview to preview of a job. An output process that was started again may send some twice."""
        return self.index, self.number

    @property
    def image(self) -> Image.Image:
        """The picture, decoded."""
        from PIL import Image

        found = Image.open(io.BytesIO(self.data))
        found.load()
        return found


def received(message: PreviewMade, frames: tuple[memoryview, ...]) -> Preview | None:
    """A preview as it came; None when its picture is not whole."""
    if len(frames) != 1 or frames[0].nbytes != message.nbytes:
        return None
    m = message
    return Preview(m.job, m.index, m.number, m.step, m.width, m.height, m.media_type, bytes(frames[0]))
