"""The DALI renderer: one graph decodes, crops, resizes and augments all views of a batch, on a GPU or (as a cross-check) on the CPU.

Same graph, other device: "gpu" decodes with the hardware decoder and gives CUDA tensors without a copy; "dali-cpu" runs, and is tested,
anywhere. Departures from the plan, bounded by tests against the reference: brightness and saturation that follow each other act as one
matrix, without clipping in between; the hue is rotated after the other three whatever the drawn order; where the resize filter reaches over
a crop's edge it repeats the edge; the blur is a Gaussian of equal variance in place of PIL's six box blurs, each rounded (on photographs
0.6 levels on average, at most 6 but for the outermost pixels, where DALI mirrors the view). Otherwise each operation is the reference's
within rounding. The hue is rotated in HSV as PIL does it: DALI's own `hsv` rotates in YIQ, 5 levels off on average.
"""

import threading
from contextlib import closing
from dataclasses import replace
from functools import cache, partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import fn, math
from nvidia.dali.pipeline import do_not_convert

from orl_fast.console import log
from orl_fast.shards.decode import Decoder
from orl_fast.shards.pixels import Decoded
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.plan import AnyImage, Batch, Crops, ImageSource, ViewPlan, needed_regions, usable_samples, without_bad

types: Any = dali.types
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BRIGHTNESS, _CONTRAST, _SATURATION = 0, 1, 2
_NOTHING, _NO_PIXELS = np.zeros(1, np.uint8), np.zeros((1, 1, 3), np.uint8)  # where a sample's image is of the other kind
_NUM_GRAPHS = 2
_MAX_FAILURES, _MAX_FAILURES_FIRST = 20, 2  # batches in a row, after one was rendered and before; more are not the images' fault


class DaliRenderer:
    """Renders plans in DALI graphs, on a CUDA device or (None) the CPU. An image that two samples read is decoded twice.

    There are two graphs of a kind, so that one batch is fed and decoded while the other is augmented: `run` returns when a batch is done.
    """

    def __init__(self, source: ImageSource, *, num_threads: int, device: torch.device | None = None, hw_decoder_load: float = 0.65) -> None:
        """The load is the share of JPEGs for the hardware decoder."""
        self._source, self._num_threads = source, num_threads
        device_id = (device.index or 0) if device is not None else None
        self._graphs: SimpleQueue[_Graph] = SimpleQueue()  # that are idle
        for _ in range(_NUM_GRAPHS):
            self._graphs.put(_Graph(source, device_id, num_threads=num_threads, hw_decoder_load=hw_decoder_load))
        self._lock = threading.Lock()
        self.num_on_cpu, self._failures_left = 0, _MAX_FAILURES_FIRST  # batches rendered on the CPU so far, and that may be in a row

    def render(self, plan: ViewPlan) -> Batch:
        graph = self._graphs.get()
        try:
            batch = graph.run(plan)
        except RuntimeError as error:
            return self._recovered(plan, graph, error)
        finally:
            self._graphs.put(graph)
        self._failures_left = _MAX_FAILURES
        return batch

    def close(self) -> None:
        for _ in range(_NUM_GRAPHS):
            self._graphs.get().reset()

    def _recovered(self, plan: ViewPlan, graph: "_Graph", error: RuntimeError) -> Batch:
        """Without the samples of damaged images; on the CPU where it is the GPU's decoder alone that refuses one.

        RuntimeError: the graph itself fails, batch after batch.
        """
        graph.reset()  # a bad image leaves it unusable
        sources = np.unique(plan.crops.source)
        found = self._source.views(sources)
        encoded = {source: image for source, image in zip(sources.tolist(), found, strict=True) if not isinstance(image, Decoded)}
        whole = np.full((len(encoded), 4), [0, 0, *[np.iinfo(np.int32).max] * 2])  # trimmed to the image
        images = Decoder(self._num_threads).decode(list(encoded.values()), whole)
        bad = np.array([source for source, image in zip(encoded, images, strict=True) if image is None], np.int64)
        kept = usable_samples(plan, bad)
        part = plan.of_samples(kept)
        skipped: dict[str, Any] = {"bad_rows": plan.rows[~kept], "bad_sources": bad}
        if len(bad):
            try:
                return replace(graph.run(part), **skipped)
            except RuntimeError as second:
                graph.reset()
                error = second
        with self._lock:
            if not self._failures_left:
                raise error
            self._failures_left -= 1
            self.num_on_cpu += 1
        reason = str(error).split("\n")[0]
        log.warning("a batch that the DALI graph refuses (%s) is rendered on the CPU, %d so far", reason, self.num_on_cpu)
        with closing(CpuRenderer(self._source, num_threads=self._num_threads)) as renderer:
            return replace(renderer.render(part), **skipped)


class _Graph:
    """A DALI pipeline, built again when plans of another shape come; used by one thread at a time."""

    def __init__(self, source: ImageSource, device_id: int | None, *, num_threads: int, hw_decoder_load: float) -> None:
        self._source, self._device_id, self._num_threads, self._load = source, device_id, num_threads, hw_decoder_load
        self._kinds: set[str] = set()  # of images seen so far: "encoded", "stored"
        self.reset()

    def reset(self) -> None:
        self._shape: tuple[Any, ...] = ()
        self._pipeline: Any = None

    def run(self, plan: ViewPlan) -> Batch:
        num, crops, sizes, nothing = len(plan.rows), plan.crops, tuple(plan.sizes_px.values()), np.empty(0, np.int64)
        if num == 0:
            return without_bad(plan, (torch.empty(0, size, size, 3, dtype=torch.uint8) for size in sizes), nothing)
        # Views that read the same images share one decoder.
        sources = crops.source.reshape(len(sizes), num)
        readers = [next(u for u in range(v + 1) if np.array_equal(sources[u], sources[v])) for v in range(len(sizes))]
        images = {reader: self._source.views(sources[reader]) for reader in set(readers)}
        stored = {reader: [isinstance(image, Decoded) for image in found] for reader, found in images.items()}
        self._kinds |= {"stored" if there else "encoded" for found in stored.values() for there in found}
        kinds = "".join(sorted(self._kinds))
        shape = (tuple(readers), sizes, plan.beyond_box, kinds)
        if self._pipeline is None or self._shape != shape or num > self._pipeline.max_batch_size:
            self._shape = shape
            self._pipeline = _views(
                readers, sizes, plan.beyond_box, self._load, kinds, gpu=self._device_id is not None,
                enable_conditionals=kinds == "encodedstored", batch_size=num, num_threads=self._num_threads,
                device_id=self._device_id, prefetch_queue_depth=1,
            )  # fmt: skip
        order = {reader: k for k, reader in enumerate(images)}
        places = np.concatenate([order[reader] * num + np.arange(num) for reader in readers])
        regions = needed_regions(plan, places, len(images) * num).reshape(len(images), num, 4)
        boxes = crops.box.copy().reshape(len(sizes), num, 4)
        for reader, found in images.items():
            views = [v for v in range(len(sizes)) if readers[v] == reader]
            pixels = [_lines(image, top, bottom) for image, (_, top, _, bottom) in zip(found, regions[order[reader]].tolist(), strict=True)]
            boxes[views] = boxes[views] * np.array([scale for _, _, scale in pixels]) - np.array([[0, top, 0, top] for _, top, _ in pixels])
            if "encoded" in self._kinds:
                self._pipeline.feed_input(f"data{reader}", [_NOTHING if isinstance(image, Decoded) else image for image in found])
            if "stored" in self._kinds:
                self._pipeline.feed_input(f"pixels{reader}", [part for part, _, _ in pixels])
            if kinds == "encodedstored":
                self._pipeline.feed_input(f"stored{reader}", np.array(stored[reader]))
        for v in range(len(sizes)):
            for name, values in _parameters(crops, boxes[v], slice(v * num, (v + 1) * num)).items():
                self._pipeline.feed_input(f"{name}{v}", values)
        return without_bad(plan, (torch.utils.dlpack.from_dlpack(batch.as_tensor()) for batch in self._pipeline.run()), nothing)


@cache
def _spreads() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The standard deviations of Gaussians sampled at whole pixels, and their sigmas, to which they are equal above 0.7 only."""
    sigmas, distances = np.geomspace(0.15, 64, 2000), np.arange(512)
    weights = np.exp(-0.5 * (distances / sigmas[:, None]) ** 2)
    return np.sqrt((weights * distances**2).sum(axis=1) / (weights.sum(axis=1) - 0.5)), sigmas


def _lines(image: AnyImage, top: int, bottom: int) -> tuple[NDArray[np.uint8], int, NDArray[np.float64]]:
    """The stored lines of an image that a box between `top` and `bottom` needs, the first of them, and by what to multiply boxes."""
    if not isinstance(image, Decoded):
        return _NO_PIXELS, 0, np.ones(4)
    height, width, _ = image.pixels.shape
    part = image.lines(top, bottom)
    first = (part.ctypes.data - image.pixels.ctypes.data) // (3 * width)
    return part, first, np.array([width / image.width, height / image.height] * 2)


def _parameters(crops: Crops, box: NDArray[np.float32], part: slice) -> dict[str, NDArray[Any]]:
    """What the graph takes for one view: int32 or float32, one entry per sample."""
    factors, sigma = crops.factors[part], crops.blur_sigma[part]
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


def _image(reader: int, hw_decoder_load: float, kinds: str, gpu: bool) -> Any:
    """Decoded, or uploaded, or for each sample the one or the other; `kinds` is of all images seen so far."""
    data = pixels = None
    if "encoded" in kinds:
        data = fn.external_source(name=f"data{reader}", dtype=types.UINT8, ndim=1, no_copy=True)
    if "stored" in kinds:
        pixels = fn.external_source(name=f"pixels{reader}", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True)
        pixels = pixels.gpu() if gpu else pixels
    options = {"device": "mixed", "hw_decoder_load": hw_decoder_load} if gpu else {"device": "cpu"}
    decode = partial(fn.decoders.image, jpeg_fancy_upsampling=True, adjust_orientation=False, output_type=types.RGB, **options)
    if data is None or pixels is None:
        return pixels if data is None else decode(data)
    if fn.external_source(name=f"stored{reader}", dtype=types.BOOL, ndim=0):  # noqa: SIM108 (DALI follows statements)
        image = pixels
    else:
        image = decode(data)
    return image


@dali.pipeline_def  # type: ignore[attr-defined, untyped-decorator]
def _views(
    readers: list[int], sizes: tuple[int, ...], beyond_box: bool, hw_decoder_load: float, kinds: str, *, gpu: bool
) -> tuple[Any, ...]:
    decoded = {reader: _image(reader, hw_decoder_load, kinds, gpu) for reader in sorted(set(readers))}
    # Added to the hue, it gives red, green and blue their places on the wheel.
    places = types.Constant(np.array([[[5, 3, 1]]], np.float32), device="gpu" if gpu else "cpu")
    return tuple(_view(decoded[reader], v, sizes[v], beyond_box, places) for v, reader in enumerate(readers))


@do_not_convert
def _view(image: Any, v: int, size: int, beyond_box: bool, places: Any) -> Any:
    p: dict[str, Any] = {}
    example = Crops.plain(np.zeros(1, np.int64), np.zeros((1, 4), np.float32))
    for name, values in _parameters(example, example.box, slice(1)).items():
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
