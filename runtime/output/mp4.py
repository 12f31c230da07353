"""H.264 in MP4 through PyAV, written as the frames arrive. Imported when the first video is made."""

from __future__ import annotations

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from safelight.runtime.messages import OpenJob
from safelight.runtime.output.media import Frames

H264_OPTIONS = {"preset": "veryfast", "crf": "18"}
BT709, VIDEO_RANGE = 1, 1  # ffmpeg's AVCOL_*_BT709 and AVCOL_RANGE_MPEG


class Mp4Encoder:
    """H.264 in MP4 with the index in front; yuv420p, or yuv444p when a side is odd (420 would have to resize).

    Colours are converted and tagged as BT.709, video range: untagged files are shown differently by size and player.
    """

    def __init__(self, path: Path, job: OpenJob) -> None:
        odd = job.width % 2 or job.height % 2
        self._format = "yuv444p" if odd else "yuv420p"
        self._next = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        stream = self._container.add_stream("libx264", rate=Fraction(job.fps), options=H264_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = job.width, job.height, self._format
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = VIDEO_RANGE
        context.thread_count = min(4, os.cpu_count() or 1)
        self._stream = stream

    def add(self, frames: Frames) -> None:
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format=self._format, dst_colorspace=BT709, dst_color_range=VIDEO_RANGE)
            frame.pts = self._next
            self._next += 1
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abort(self) -> None:
        with contextlib.suppress(av.FFmpegError, OSError):  # closing writes an index, which may not fit the disk
            self._container.close()
