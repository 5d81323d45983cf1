"""The DALI renderer: one graph decodes, crops, resizes and augments all views of a batch, on a GPU or (as a cross-check) on the CPU.

Same graph, other device: "gpu" decodes with the hardware decoder and gives CUDA tensors without a copy; "dali-cpu" runs, and is tested,
anywhere. Departures from the plan, bounded by tests against the reference: brightness and saturation that follow each other act as one
matrix, without clipping in between; the hue is rotated after the other three whatever the drawn order; where the resize filter reaches over
a crop's edge it repeats the edge; the blur is a Gaussian of equal variance in place of PIL's six box blurs, each rounded (0.6 levels on
average, at most 6 but for the outermost pixels, where DALI mirrors the view). Otherwise each operation is the reference's within rounding.
The hue is rotated in HSV as PIL does it: DALI's own `hsv` rotates in YIQ, 5 levels off on average.
"""

import threading
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import fn, math

from orl_fast.console import log
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.decode import Decoder
from orl_fast.views.plan import Batch, Crops, ImageSource, ViewPlan, usable_samples, without_bad

types: Any = dali.types
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BRIGHTNESS, _CONTRAST, _SATURATION = 0, 1, 2
_MAX_FAILURES, _MAX_FAILURES_FIRST = 20, 2  # batches in a row, after one was rendered and before; more are not the images' fault


class DaliRenderer:
    """Renders plans in one DALI graph, on a CUDA device or (None) the CPU. An image that two samples read is decoded twice."""

    def __init__(self, source: ImageSource, *, num_threads: int, device: torch.device | None = None, hw_decoder_load: float = 0.65) -> None:
        """The load is the share of JPEGs for the hardware decoder."""
        self._source, self._num_threads, self._load = source, num_threads, hw_decoder_load
        self._device_id = (device.index or 0) if device is not None else None
        self._lock = threading.Lock()
        self.num_on_cpu, self._failures_left = 0, _MAX_FAILURES_FIRST  # batches rendered on the CPU so far, and that may be in a row
        self._shape: tuple[Any, ...] = ()
        self._pipeline: Any = None

    def render(self, plan: ViewPlan) -> Batch:
        with self._lock:
            try:
                batch = self._run(plan)
            except RuntimeError as error:
                return self._recovered(plan, error)
            self._failures_left = _MAX_FAILURES
            return batch

    def close(self) -> None:
        with self._lock:
            self._pipeline = None

    def _recovered(self, plan: ViewPlan, error: RuntimeError) -> Batch:
        """Without the samples of damaged images; on the CPU where it is the GPU's decoder alone that refuses one.

        RuntimeError: the graph itself fails, batch after batch.
        """
        self._pipeline = None  # a bad image leaves it unusable
        sources = np.unique(plan.crops.source)
        whole = np.full((len(sources), 4), [0, 0, *[np.iinfo(np.int32).max] * 2])  # trimmed to the image
        images = Decoder(self._num_threads).decode(self._source.views(sources), whole)
        bad = sources[[image is None for image in images]]
        kept = usable_samples(plan, bad)
        part = plan.of_samples(kept)
        skipped: dict[str, Any] = {"bad_rows": plan.rows[~kept], "bad_sources": bad}
        if len(bad):
            try:
                return replace(self._run(part), **skipped)
            except RuntimeError as second:
                self._pipeline, error = None, second
        if not self._failures_left:
            raise error
        self._failures_left -= 1
        self.num_on_cpu += 1
        reason = str(error).split("\n")[0]
        log.warning("a batch that the DALI graph refuses (%s) is rendered on the CPU, %d so far", reason, self.num_on_cpu)
        with closing(CpuRenderer(self._source, num_threads=self._num_threads)) as renderer:
            return replace(renderer.render(part), **skipped)

    def _run(self, plan: ViewPlan) -> Batch:
        num, crops, sizes, nothing = len(plan.rows), plan.crops, tuple(plan.sizes_px.values()), np.empty(0, np.int64)
        if num == 0:
            return without_bad(plan, (torch.empty(0, size, size, 3, dtype=torch.uint8) for size in sizes), nothing)
        # Views that read the same images share one decoder.
        sources = crops.source.reshape(len(sizes), num)
        readers = [next(u for u in range(v + 1) if np.array_equal(sources[u], sources[v])) for v in range(len(sizes))]
        shape = (tuple(readers), sizes, plan.beyond_box)
        if self._pipeline is None or self._shape != shape or num > self._pipeline.max_batch_size:
            self._shape = shape
            self._pipeline = _views(
                readers, sizes, plan.beyond_box, self._load, gpu=self._device_id is not None,
                batch_size=num, num_threads=self._num_threads, device_id=self._device_id, prefetch_queue_depth=1,
            )  # fmt: skip
        for reader in set(readers):
            self._pipeline.feed_input(f"data{reader}", self._source.views(sources[reader]))
        for v in range(len(sizes)):
            for name, values in _parameters(crops, slice(v * num, (v + 1) * num)).items():
                self._pipeline.feed_input(f"{name}{v}", values)
        return without_bad(plan, (torch.utils.dlpack.from_dlpack(batch.as_tensor()) for batch in self._pipeline.run()), nothing)


@cache
def _spreads() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The standard deviations of Gaussians sampled at whole pixels, and their sigmas, to which they are equal above 0.7 only."""
    sigmas, distances = np.geomspace(0.15, 64, 2000), np.arange(512)
    weights = np.exp(-0.5 * (distances / sigmas[:, None]) ** 2)
    return np.sqrt((weights * distances**2).sum(axis=1) / (weights.sum(axis=1) - 0.5)), sigmas


def _parameters(crops: Crops, part: slice) -> dict[str, NDArray[Any]]:
    """What the graph takes for one view: int32 or float32, one entry per sample."""
    box, factors, sigma = crops.box[part], crops.factors[part], crops.blur_sigma[part]
    blur = np.interp(np.where(sigma > 0, sigma, 1), *_spreads())
    place = np.argsort(crops.order[part], axis=1)[..., None, None]  # [B, 4, 1, 1]: when each operation comes
    identity, gray = np.eye(3, dtype=np.float32), np.tile(_LUMA, (3, 1))
    # Brightness and saturation are matrices, which commute: those drawn before the contrast, and those after.
    scale, mix = factors[:, _BRIGHTNESS, None, None] * identity, factors[:, _SATURATION, None, None]
    saturate = mix * identity + (1 - mix) * gray
    scale_first, saturate_first = place[:, _BRIGHTNESS] < place[:, _CONTRAST], place[:, _SATURATION] < place[:, _CONTRAST]
    return {
        "start": np.ascontiguousarray(box[:, 1::-1]),
        "end": np.ascontiguousarray(box[:, :1:-1]),
        "flip": crops.flip[part].astype(np.int32),
        "before": np.where(saturate_first, saturate, identity) @ np.where(scale_first, scale, identity),
        "contrast": factors[:, _CONTRAST].copy(),
        "after": np.where(saturate_first, identity, saturate) @ np.where(scale_first, identity, scale),
        "hue": np.trunc(crops.hue[part] * 255).astype(np.float32),
        "gray": np.where(crops.grayscale[part, None, None], gray, identity),
        "sigma": blur.astype(np.float32),
        "window": np.where(sigma > 0, 2 * np.ceil(4 * blur) + 1, 1).astype(np.int32),
        "solarize": crops.solarize[part].astype(np.float32),
    }


@dali.pipeline_def  # type: ignore[attr-defined, untyped-decorator]
def _views(readers: list[int], sizes: tuple[int, ...], beyond_box: bool, hw_decoder_load: float, *, gpu: bool) -> tuple[Any, ...]:
    decoded: dict[int, Any] = {}
    for reader in sorted(set(readers)):
        data = fn.external_source(name=f"data{reader}", dtype=types.UINT8, ndim=1, no_copy=True)
        options = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if gpu else {"device": "cpu"}
        decoded[reader] = fn.decoders.image(data, jpeg_fancy_upsampling=True, adjust_orientation=False, output_type=types.RGB, **options)
    # Added to the hue, it gives red, green and blue their places on the wheel.
    places = types.Constant(np.array([[[5, 3, 1]]], np.float32), device="gpu" if gpu else "cpu")
    return tuple(_view(decoded[reader], v, sizes[v], beyond_box, places) for v, reader in enumerate(readers))


def _view(image: Any, v: int, size: int, beyond_box: bool, places: Any) -> Any:
    p: dict[str, Any] = {}
    example = Crops.plain(np.zeros(1, np.int64), np.zeros((1, 4), np.float32))
    for name, values in _parameters(example, slice(1)).items():
        dtype = types.INT32 if values.dtype == np.int32 else types.FLOAT
        p[name] = fn.external_source(name=f"{name}{v}", dtype=dtype, ndim=values.ndim - 1)
    options: dict[str, Any] = {"size": [size, size], "interp_type": types.INTERP_LINEAR, "antialias": True, "dtype": types.UINT8}
    if beyond_box:
        x: Any = fn.resize(image, roi_start=p["start"], roi_end=p["end"], **options)
    else:
        start, end = (fn.cast(p[name], dtype=types.INT32) for name in ("start", "end"))
        x = fn.resize(fn.slice(image, start=start, end=end, axes=(0, 1), out_of_bounds_policy="trim_to_shape"), **options)
    x = fn.flip(x, horizontal=p["flip"])
    # PIL truncates and DALI rounds, so a half is subtracted.
    x = fn.coord_transform(x, M=p["before"], T=-0.49, dtype=types.UINT8)
    mean = math.floor(fn.reductions.mean(fn.coord_transform(x, M=_LUMA.tolist()), axes=(0, 1)) + 0.5)
    x = fn.cast(math.clamp(x * p["contrast"] + mean * (1 - p["contrast"]) - 0.49, 0.0, 255.0), dtype=types.UINT8)
    x = fn.coord_transform(x, M=p["after"], T=-0.49, dtype=types.UINT8)
    x = _rotate_hue(x, p["hue"], places)
    x = fn.coord_transform(x, M=p["gray"], dtype=types.UINT8)
    x = fn.gaussian_blur(x, sigma=p["sigma"], window_size=p["window"], dtype=types.UINT8)
    return fn.cast(math.abs((x >= 128) * p["solarize"] * 255.0 - x), dtype=types.UINT8)


def _rotate_hue(x: Any, shift: Any, places: Any) -> Any:
    """Rotate the hue by shift / 255 as PIL's 8-bit HSV does, without a branch (see `color._shift_hue`)."""
    r, g, b = (fn.cast(x[:, :, c : c + 1], dtype=types.FLOAT) for c in range(3))
    value, low = math.max(r, math.max(g, b)), math.min(r, math.min(g, b))
    span = value - low
    inverse = (1 / 6) / math.max(span, 1.0)
    is_red = r == value
    is_green = (g == value) & (r != value)
    is_blue = (r != value) & (g != value)
    hue = is_red * (g - b) * inverse + is_green * (1 / 3 + (b - r) * inverse) + is_blue * (2 / 3 + (r - g) * inverse)
    byte = math.floor((hue + (hue < 0.0)) * 255.0) + shift
    rotated = (byte - 256.0 * math.floor(byte * (1 / 256))) * (6 / 255)
    k = rotated + places
    k = k - 6.0 * (k >= 6.0)
    share = math.clamp(math.min(k, 4.0 - k), 0.0, 1.0)
    saturation = math.floor(span / math.max(value, 1.0) * 255.0) * (1 / 255)
    changed = fn.cast(value - value * saturation * share, dtype=types.UINT8)
    return x + fn.cast(shift != 0.0, dtype=types.UINT8) * (changed - x)
