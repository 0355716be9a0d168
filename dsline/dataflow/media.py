"""Pictures and films as items: through Pillow (extra "images") and PyAV (extra "video")."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Final, TypeAlias

import numpy as np

from dsline.errors import FeatureUnavailableError, PipelineBuildError, PipelineRuntimeError

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "VideoReader",
    "VideoWriter",
    "needs",
    "read_image",
    "write_image",
]

Array: TypeAlias = np.ndarray[Any, Any]

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
VIDEO_SUFFIXES: Final = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_CODECS: Final = ("libx264", "mpeg4")


def needs(module: str, extra: str, what: str) -> Any:
    """Import a module of an optional extra.

    Raises
    ------
    FeatureUnavailableError
        It is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise FeatureUnavailableError(
            f"{what} needs {package}, which is not installed; install dsline[{extra}]"
        ) from error


def read_image(path: str | os.PathLike[str]) -> Array:
    """Decode a picture: (h, w) for grey ones, (h, w, 3) for colours, (h, w, 4) with transparency."""
    image = needs("PIL.Image", "images", "reading pictures")
    try:
        with image.open(path) as picture:
            if picture.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV"):
                picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
            return np.asarray(picture)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise PipelineRuntimeError(f"picture {os.fspath(path)!r} cannot be read: {error}") from error


def write_image(path: str, array: Array) -> None:
    """Encode a picture in the format of the path's suffix; the file appears whole or not at all."""
    image = needs("PIL.Image", "images", "writing pictures")
    try:
        picture = image.fromarray(np.ascontiguousarray(array))
        temporary = _temporary(path)
        picture.save(temporary)
        os.replace(temporary, path)
    except (TypeError, KeyError, ValueError) as error:
        raise PipelineRuntimeError(
            f"an array of {array.dtype} {array.shape} is no picture for {path!r}: {error}; use uint8 or bool of (h, w), or "
            "uint8 of (h, w, 3) or (h, w, 4)"
        ) from error


def _temporary(path: str) -> str:
    """A hidden name of the same suffix in the same folder: no pattern finds it."""
    folder, name = os.path.split(path)
    root, suffix = os.path.splitext(name)
    return os.path.join(folder, f".{root}.tmp{suffix}")


class VideoReader:
    """Decodes the first video stream of a file, frame by frame, into (h, w, 3) arrays of uint8, red first."""

    def __init__(self, path: str) -> None:
        self._av = needs("av", "video", "reading films")
        self._path = path
        try:
            self._container = self._av.open(path)
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            raise PipelineBuildError(f"film {path!r} cannot be read: {error}") from error
        if not self._container.streams.video:
            self._container.close()
            raise PipelineBuildError(f"file {path!r} has no video stream")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, 3: of the stream's header."""
        return self._stream.codec_context.height, self._stream.codec_context.width, 3

    def frames(self, after: int | None = None) -> Iterator[tuple[int | None, Array]]:
        """Yield (presentation time in ticks of the stream, frame), from the first frame behind the time `after` on."""
        try:
            if after is not None:
                self._container.seek(after, stream=self._stream)  # to the key frame at or before it
            for frame in self._container.decode(self._stream):
                if after is None or (frame.pts is not None and frame.pts > after):
                    yield frame.pts, frame.to_ndarray(format="rgb24")
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            raise PipelineRuntimeError(f"film {self._path!r} cannot be decoded: {error}") from error

    def close(self) -> None:
        self._container.close()


class VideoWriter:
    """Encodes frames into a file, which gets its name when it is complete.

    Frames are (h, w) or (h, w, 3) arrays of uint8; h and w have to be even for most codecs.
    """

    def __init__(self, path: str, fps: float, codec: str | None) -> None:
        self._av = needs("av", "video", "writing films")
        self._path = path
        self._temporary = _temporary(path)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._codec = codec
        self._container: Any = None
        self._stream: Any = None
        self._shape: tuple[int, ...] = ()

    def write(self, array: Array) -> None:
        if self._stream is None:
            self._begin(array)
        if array.dtype != np.uint8 or array.shape != self._shape:
            raise PipelineRuntimeError(
                f"film {self._path!r} has frames of uint8 {self._shape}, and {array.dtype} {array.shape} came"
            )
        pixels = np.ascontiguousarray(array)
        frame = self._av.VideoFrame.from_ndarray(pixels, format="gray" if array.ndim == 2 else "rgb24")
        self._mux(frame)

    def finish(self) -> None:
        """Write what the encoder still has, and give the file its name."""
        if self._container is not None:
            self._mux(None)
            self._container.close()
            self._container = None
            os.replace(self._temporary, self._path)

    def close(self) -> None:
        """Give up a film that was not finished."""
        if self._container is not None:
            self._container.close()
            self._container = None
            with contextlib.suppress(FileNotFoundError):  # an encoder that has written nothing has made none
                os.unlink(self._temporary)

    def _begin(self, array: Array) -> None:
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
            raise PipelineRuntimeError(
                f"{array.dtype} {array.shape} is no frame of a film; use uint8 of (h, w) or (h, w, 3)"
            )
        height, width = array.shape[:2]
        if height % 2 or width % 2:
            raise PipelineRuntimeError(
                f"frames of {height} x {width} cannot be encoded; crop or pad them to even sizes"
            )
        codec = self._codec
        if codec is None:
            codec = next((name for name in _CODECS if name in self._av.codecs_available), "mpeg4")
        try:
            self._container = self._av.open(self._temporary, "w")
            self._stream = self._container.add_stream(codec, rate=self._fps)
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            raise PipelineRuntimeError(
                f"film {self._path!r} cannot be written with codec {codec!r}: {error}"
            ) from error
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self._shape = array.shape

    def _mux(self, frame: Any) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except (OSError, ValueError, self._av.error.FFmpegError) as error:
            raise PipelineRuntimeError(f"film {self._path!r} cannot be written: {error}") from error
