"""Boxes of many JPEGs decoded in one call, by nvJPEG on a GPU: nvImageCodec's, as shards.decode.jpeg has it for one.

nvJPEG computes the inverse DCT and the upsampling of chroma in its own way, so that its pixels are others than
Pillow's, a few levels where edges are sharp: a decoder to be named, never one to be taken by itself.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

from beitforge.shards.decode import jpeg
from beitforge.shards.errors import ShardError

Box = list[int]
_CURE = "pip install 'nvidia-nvimgcodec-cu12[nvjpeg]' there (cu13 with CUDA 13), or set loader.decoder=auto"


@dataclass(frozen=True)
class Pixels:
    """u8 [h, w, 3] in the memory of a GPU, or in this process's where `device` is None; valid until the next call of
    the decoder. torch.as_tensor takes it without a copy."""

    address: int
    shape: tuple[int, int, int]
    device: int | None

    @property
    def __cuda_array_interface__(self) -> dict:
        if self.device is None:
            raise AttributeError("in memory of the processor")
        return {"shape": self.shape, "typestr": "|u1", "data": (self.address, False), "version": 3, "strides": None}

    def array(self) -> np.ndarray:
        """Of memory of the processor, a copy."""
        found = np.empty(self.shape, np.uint8)
        ctypes.memmove(found.ctypes.data, self.address, found.nbytes)
        return found


class BatchDecoder:
    """Decodes on GPU number `device`; with None on the processor, to Pillow's pixels, by the same calls."""

    def __init__(self, device: int | None):
        """Raises ShardError where there is no nvJPEG."""
        self.device = device
        self._buffers: list[_Slot] = []
        try:
            with jpeg.silent():
                self._library = jpeg.nvimgcodec()
                self._decode = self._made()
            if device is not None and self.boxes([(jpeg.sample_jpeg(), [0, 0, 64, 48])])[0] is None:
                raise RuntimeError("it decodes no JPEG")
        except (ImportError, RuntimeError, OSError) as error:
            raise ShardError(
                f"loader.decoder is gpu, and nvJPEG does not start on this host's GPU "
                f"({(str(error).splitlines() or [type(error).__name__])[0]}): {_CURE}"
            ) from error
        self.name = f"nvJPEG by {jpeg.version_of('nvimgcodec')}"

    def _made(self) -> Any:
        library, kinds = self._library, self._library.BackendKind
        if self.device is None:
            return library.Decoder(library.NVIMGCODEC_DEVICE_CPU_ONLY, 1, [library.Backend(kinds.CPU_ONLY)], "").decode
        backends = [library.Backend(kind) for kind in (kinds.HW_GPU_ONLY, kinds.GPU_ONLY, kinds.HYBRID_CPU_GPU)]
        return library.Decoder(self.device, 1, backends, ":fancy_upsampling=1").decode

    def boxes(self, asked: list[tuple[bytes, Box]], stream: int = 0) -> list[Pixels | None]:
        """The boxes x, y, width, height of JPEGs, None where one will not be decoded. stream: the CUDA stream on which
        the pixels are ready, and on which what was given before must have been used."""
        library = self._library
        streams = []
        for data, (x, y, width, height) in asked:
            region = library.Region(y, x, y + height, x + width)
            try:
                streams.append(library.CodeStream(data).get_sub_code_stream(region=region))
            except (RuntimeError, ValueError):
                streams.append(None)
        self._buffers += [_Slot() for _ in range(len(asked) - len(self._buffers))]
        able = [i for i, one in enumerate(streams) if one is not None]
        found: list[Pixels | None] = [None] * len(asked)
        for fresh in (False, True):
            mine = [i for i in able if (self._buffers[i].image is None) == fresh]
            if mine:
                for i, image in zip(mine, self._decoded(mine, streams, fresh, stream), strict=True):
                    found[i] = self._buffers[i].pixels(image, self.device)
        return found

    def _decoded(self, mine: list[int], streams: list, fresh: bool, stream: int) -> list:
        params = self._library.DecodeParams(apply_exif_orientation=False, color_spec=self._library.ColorSpec.SRGB)
        images = None if fresh else [self._buffers[i].image for i in mine]
        return self._decode([streams[i] for i in mine], images=images, params=params, cuda_stream=stream)


class _Slot:
    """An image that is decoded into again and again, as jpeg's buffer is: what it leaks when asked for its address, it
    leaks when it has grown, and no more."""

    def __init__(self) -> None:
        self.image: Any = None
        self.capacity = self.address = 0

    def pixels(self, image: Any, device: int | None) -> Pixels | None:
        if image is None:
            return None
        if image is not self.image or image.capacity != self.capacity:
            self.image, self.capacity = image, image.capacity
            interface = image.__array_interface__ if device is None else image.__cuda_array_interface__
            self.address = interface["data"][0]
        shape = (image.height, image.width, image.num_channels)
        if image.strides != (shape[1] * shape[2], shape[2], 1) or shape[2] != 3:
            return None
        return Pixels(self.address, shape, device)
