"""The images of a batch that its worker left undecoded (Stream.defer), decoded and cut on the device that trains.

What differs from a worker's pixels is the decoder's alone: clamping, resizing and flipping give the same bits.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from beitforge.shards.decode import codec, jpeg
from beitforge.shards.decode.gpu import BatchDecoder, Pixels
from beitforge.shards.stream import fixed_point
from beitforge.shards.stream.loader import Batch, Deferred, Stream, cut_into


class OnDevice:
    """Makes the pixels of a stream's batches on a device: a GPU, or the processor, by the same steps."""

    def __init__(self, stream: Stream, device: torch.device):
        """Raises ShardError where the device has no decoder."""
        self.stream = dataclasses.replace(stream, defer=False, decoder="auto")
        self.device = device
        self.decoder = BatchDecoder(device.index or 0 if device.type == "cuda" else None)
        self._used = torch.cuda.Event() if device.type == "cuda" else None

    def describe(self) -> str:
        """What decodes, and how far its pixels of a test image are from Pillow's."""
        data = jpeg.sample_jpeg()
        exact = codec.decode(data).astype(np.int64)
        found = self.crops([Deferred(0, data, [0, 0, exact.shape[1], exact.shape[0]], False, [0, 255])])[0]
        assert found is not None, "it decoded this image when it was made"
        apart = np.abs(found.cpu().numpy() - exact)
        said = f"up to {apart.max()} levels from Pillow's pixels of noise" if apart.any() else "Pillow's pixels"
        return f"{self.decoder.name} ({said})"

    def finish(self, batch: Batch) -> Batch:
        """The batch with the pixels of its deferred rows, and with them all of its pixels, on the device. Raises
        ShardError as Stream.batch does."""
        if not batch.deferred:
            return batch
        pixels = batch.pixels.to(self.device, non_blocking=True)
        second = batch.tokenizer_pixels.to(self.device, non_blocking=True)
        done = batch._replace(pixels=pixels, tokenizer_pixels=second, deferred=(), bad=list(batch.bad))
        crops = self.crops(batch.deferred)
        whole = [(one, crop) for one, crop in zip(batch.deferred, crops, strict=True) if crop is not None]
        if whole:
            self._cut(pixels, whole, self.stream.resample)
            if second.numel():
                self._cut(second, whole, self.stream.tokenizer_resample)
        if self._used is not None:
            self._used.record()
        for one, crop in zip(batch.deferred, crops, strict=True):
            if crop is None:
                self._substitute(done, one.row)
        return done

    def crops(self, deferred: Sequence[Deferred]) -> list[torch.Tensor | None]:
        """The boxes u8 [h, w, 3], their values within the view's limits; None where an image does not decode at all."""
        stream = 0
        if self._used is not None:
            self._used.synchronize()  # what was decoded before is decoded into again
            stream = torch.cuda.current_stream(self.device).cuda_stream
        asked = [(one.data, one.box) for one in deferred]
        crops = [self._crop(*pair) for pair in zip(deferred, self.decoder.boxes(asked, stream), strict=True)]
        return [
            crop if crop is None or one.limits == [0, 255] else crop.clamp(*one.limits)
            for one, crop in zip(deferred, crops, strict=True)
        ]

    def _crop(self, one: Deferred, found: Pixels | None) -> torch.Tensor | None:
        if found is not None and found.shape == (one.box[3], one.box[2], 3):
            return torch.as_tensor(found if self._used else found.array(), device=self.device)
        try:
            return torch.from_numpy(codec.crop(codec.decode(one.data), one.box)).to(self.device)
        except codec.ImageError:
            return None

    def _cut(self, out: torch.Tensor, crops: list[tuple[Deferred, torch.Tensor]], resample: str) -> None:
        """Write the views into `out` u8 [B, 3, H, W], as cut_into does one."""
        size = (out.shape[2], out.shape[3])
        here = [(one, crop) for one, crop in crops if fixed_point.resizes(one.box[:1:-1], size, resample)]
        if here:
            found = fixed_point.resize([crop for _, crop in here], size, resample)
            flips = torch.tensor([one.flip for one, _ in here], device=self.device)[:, None, None, None]
            out[[one.row for one, _ in here]] = torch.where(flips, found.flip(-1), found)
        for one, crop in crops:
            if not fixed_point.resizes(one.box[:1:-1], size, resample):
                place = torch.empty(out.shape[1:], dtype=torch.uint8)
                cut_into(place, crop.cpu().numpy(), one.flip, [0, 255], resample)
                out[one.row] = place.to(self.device)

    def _substitute(self, batch: Batch, row: int) -> None:
        """Put a row whose image does not decode by what stands in for it, as a worker does."""
        found = self.stream.batch(batch.samples[row : row + 1].numpy())
        for name, value in batch._asdict().items():
            if isinstance(value, torch.Tensor):
                value[row] = getattr(found, name)[0]
        batch.bad.extend(found.bad)
