"""Six views per sample (2 x 224 and 4 x 96 pixels, the image and a neighbor decoded): ours against how it is commonly done.

All contenders take the same JPEGs, RoIs and neighbors, and augment as stage 1 of the paper. Groups "one core" pin the process to one core,
use no worker and count the process's own time; group "all cores" gives each contender one worker (process or thread) per core; group
"scaling" is ours by number of threads. Each contender's configuration is documented at its function. Two groups render the views of other
methods (see `benchmarks.user_views`).
"""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia import dali
from torchvision import transforms
from torchvision.transforms import v2

from benchmarks import user_views
from benchmarks.harness import Contender, Row, available, compare
from benchmarks.loading import (
    BATCH,
    MEAN,
    STD,
    Data,
    Normalized,
    PilBlur,
    PilSolarize,
    Sample,
    data_loader,
    decode_tensor,
    drain,
    one_thread,
    ours,
    pinned,
    pixel_source,
    store_pixels,
    torchcodec_is_there,
)
from benchmarks.photographs import load_jpegs
from orl_fast.shards import ShardIndex
from orl_fast.shards.images import decode_rgb
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.gpu import DaliRenderer
from orl_fast.views.plan import Renderer

NOTE = (
    "The reference's path, webdataset, DALI as one would write it, solo-learn and lightly yield normalized floats; ours and torchvision v2 "
    'yield uint8, which is normalized on the device. In the rows named "normalized floats" ours are normalized on the CPU.'
)
_BLUR_AND_SOLARIZE = ((1.0, 0.0), (0.1, 0.2))  # probabilities, of first and second view
types: Any = dali.types
fn: Any = dali.fn


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """Samples/s of six views, and of other methods' views; the reference's path, or the other toolkits', has ratio 1."""
    data = Data.of(load_jpegs(source, limit=48 if quick else 256))
    rounds, num_batches = (3, 1) if quick else (7, 2)
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    rows: list[Row] = []
    with ExitStack() as stored:
        stored_pixels = store_pixels(data, stored)
        with ExitStack() as stack, pinned(cores[:1]):
            contenders = _contenders(data, stored_pixels, stack, num_samples=BATCH * num_batches, workers=0)
            rows += compare(contenders, unit="samples/s", rounds=rounds, group="one core, CPU time", clock=time.process_time)
        with pinned(cores[:1]):
            rows += user_views.run(data, stored_pixels, num_samples=BATCH * num_batches, rounds=rounds)
        with ExitStack() as stack:
            contenders = _contenders(data, stored_pixels, stack, num_samples=BATCH * num_batches * len(cores), workers=len(cores))
            rows += compare(contenders, unit="samples/s", rounds=rounds, group=f"all {len(cores)} cores")
    with ExitStack() as stack:
        counts = sorted({1, len(cores), *(2**k for k in range(1, 10) if 2**k < len(cores))})
        by_threads = []
        for count in counts:
            renderer, num_samples = CpuRenderer(data, num_threads=count), BATCH * num_batches * count
            by_threads.append(ours(f"ours, {count} thread{'s' * (count > 1)}", data, renderer, stack, num_samples, workers=count))
        rows += compare(by_threads, unit="samples/s", rounds=rounds, group="scaling")
    return rows


def _contenders(data: Data, stored_pixels: ShardIndex, stack: ExitStack, *, num_samples: int, workers: int) -> list[Contender]:
    """Those that need a package that is not there are left out."""
    samples, threads = data.samples(num_samples), max(1, workers)
    contenders = [Contender(name="reference path: PIL + torchvision, DataLoader", run=data_loader(samples, _PilViews(), workers))]
    if torchcodec_is_there():
        views = _TensorViews(decode_tensor)
        contenders.append(Contender(name="torchcodec + torchvision v2 on tensors, DataLoader", run=data_loader(samples, views, workers)))
        if available("spdl.pipeline", needed_by="SPDL", remedy="pip install 'orl-fast[bench]'"):
            contenders.append(Contender(name="SPDL: torchcodec + torchvision v2", run=_spdl(samples, views, threads)))
    contenders += [
        Contender(name="webdataset + torchvision (PIL)", run=_web_dataset(samples, workers, stack)),
        Contender(name="DALI on the CPU, as one would write it", run=_naive_dali(samples, threads)),
    ]
    packed = data.with_patches()
    renderers: list[tuple[str, Data, Renderer]] = [
        ("our DALI graph on the CPU (dali-cpu)", data, DaliRenderer(data, num_threads=threads)),
        ("ours on the CPU", data, CpuRenderer(data, num_threads=threads)),
        ("ours on the CPU, partner patches", packed, CpuRenderer(packed, num_threads=threads)),
        ("ours on the CPU, pixel shards", data, CpuRenderer(pixel_source(stored_pixels), num_threads=threads)),
        (
            "ours on the CPU, pixel shards, normalized floats",
            data,
            Normalized(CpuRenderer(pixel_source(stored_pixels), num_threads=threads)),
        ),
    ]
    if torch.cuda.is_available():
        renderers.append(("ours on the GPU", data, DaliRenderer(data, num_threads=threads, device=torch.device("cuda", 0))))
    return contenders + [ours(name, source, renderer, stack, num_samples, workers=workers) for name, source, renderer in renderers]


class _PilViews:
    """Stage 1's transforms as the reference implementation has them: PIL images, torchvision's classes, PIL's blur, float tensors."""

    def __init__(self) -> None:
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        first = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)]
        last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        common = [[*first, PilBlur(blur), PilSolarize(solarize), *last] for blur, solarize in _BLUR_AND_SOLARIZE]
        self.image = [transforms.Compose([transforms.RandomResizedCrop(224), *view]) for view in common]
        self.patch = [transforms.Compose([transforms.Resize((96, 96)), *view]) for view in common]

    def __call__(self, sample: Sample) -> list[torch.Tensor]:
        image, neighbor = decode_rgb(sample.image), decode_rgb(sample.neighbor)
        parents = (image, image, image, neighbor)
        patches = [parent.crop(box) for parent, box in zip(parents, sample.boxes, strict=True)]
        return [*(view(image) for view in self.image), *(self.patch[i % 2](patch) for i, patch in enumerate(patches))]


class _TensorViews:
    """The same on uint8 tensors with torchvision's v2 classes; views stay uint8, as ours do."""

    def __init__(self, decode: Callable[[bytes], torch.Tensor]) -> None:
        self.decode = decode
        jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        self.image, self.patch = [], []
        for blur, solarize in _BLUR_AND_SOLARIZE:
            blurred = v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur)
            last = [v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), blurred, v2.RandomSolarize(128, solarize)]
            self.image.append(v2.Compose([v2.RandomResizedCrop(224, antialias=True), *last]))
            self.patch.append(v2.Compose([v2.Resize((96, 96), antialias=True), *last]))

    def __call__(self, sample: Sample) -> list[torch.Tensor]:
        image, neighbor = self.decode(sample.image), self.decode(sample.neighbor)
        views = [view(image) for view in self.image]
        for i, (parent, (x1, y1, x2, y2)) in enumerate(zip((image, image, image, neighbor), sample.boxes, strict=True)):
            views.append(self.patch[i % 2](parent[:, y1:y2, x1:x2]))
        return views


def _web_dataset(samples: list[Sample], workers: int, stack: ExitStack) -> Callable[[], float]:
    """Shards that hold the neighbor next to the image, which webdataset could not fetch otherwise; read from disk, one per worker."""
    import webdataset

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    num_shards = max(1, workers)
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for i, sample in enumerate(samples[shard::num_shards]):
                files = {"image.jpg": sample.image, "neighbor.jpg": sample.neighbor, "boxes.json": sample.boxes}
                writer.write({"__key__": f"{i:06d}", **files})
    urls = [str(folder / f"{shard}.tar") for shard in range(num_shards)]
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(_WebViews(_PilViews())).batched(BATCH)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=one_thread)
    return partial(drain, loader, len(samples))


class _WebViews:
    def __init__(self, views: _PilViews) -> None:
        self.views = views

    def __call__(self, entry: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        import json

        return tuple(self.views(Sample(entry["image.jpg"], entry["neighbor.jpg"], json.loads(entry["boxes.json"]))))


def _spdl(samples: list[Sample], views: _TensorViews, threads: int) -> Callable[[], float]:
    """SPDL's thread pipeline, torchcodec's decoder (SPDL's own needs FFmpeg's libraries) and v2 views."""
    from spdl.pipeline import PipelineBuilder

    def load() -> float:
        builder: Any = PipelineBuilder()
        builder = builder.add_source(iter(samples)).pipe(views, concurrency=threads).aggregate(BATCH).pipe(_stack).add_sink(2)
        pipeline = builder.build(num_threads=threads)
        with pipeline.auto_stop():
            for _ in pipeline:
                pass
        return len(samples)

    return load


def _naive_dali(samples: list[Sample], threads: int) -> Callable[[], float]:
    """DALI's operators in the order of the recipe, one chain per view, as its examples do."""
    pipeline: Any = _naive_graph(batch_size=BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=1, seed=0)
    batches = [samples[i : i + BATCH] for i in range(0, len(samples), BATCH)]

    def load() -> float:
        for batch in batches:
            for name in ("image", "neighbor"):
                pipeline.feed_input(name, [np.frombuffer(getattr(sample, name), np.uint8) for sample in batch])
            pipeline.feed_input("boxes", np.array([sample.boxes for sample in batch], np.int32))
            for views in pipeline.run():
                torch.utils.dlpack.from_dlpack(views.as_tensor())
        return len(samples)

    return load


@dali.pipeline_def  # type: ignore[attr-defined, untyped-decorator]
def _naive_graph() -> Any:
    image, neighbor = (fn.decoders.image(fn.external_source(name=name), output_type=types.RGB) for name in ("image", "neighbor"))
    boxes = fn.external_source(name="boxes")
    crops = [fn.random_resized_crop(image, size=(224, 224), random_area=(0.08, 1.0), antialias=True) for _ in range(2)]
    for i, parent in enumerate((image, image, image, neighbor)):
        box = boxes[i]
        crop = fn.slice(parent, start=fn.stack(box[1], box[0]), end=fn.stack(box[3], box[2]), axes=(0, 1))
        crops.append(fn.resize(crop, size=(96, 96), antialias=True))
    return tuple(_naive_view(crop, blur, solarize) for crop, (blur, solarize) in zip(crops, _BLUR_AND_SOLARIZE * 3, strict=True))


def _naive_view(x: Any, blur: float, solarize: float) -> Any:
    uniform, coin = fn.random.uniform, fn.random.coin_flip
    x = fn.flip(x, horizontal=coin())
    on = fn.cast(coin(probability=0.8), dtype=types.FLOAT)
    amount = {name: 1 + on * uniform(range=(-r, r)) for name, r in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2))}
    x = fn.color_twist(x, hue=on * uniform(range=(-36.0, 36.0)), **amount)
    x = fn.hsv(x, saturation=1 - fn.cast(coin(probability=0.2), dtype=types.FLOAT))
    sigma = uniform(range=(0.1, 2.0))
    if blur == 1.0:
        x = fn.gaussian_blur(x, sigma=sigma)
    else:
        chosen = fn.cast(coin(probability=blur), dtype=types.UINT8)
        x = x * (1 - chosen) + fn.gaussian_blur(x, sigma=sigma) * chosen
    if solarize:
        chosen = fn.cast(coin(probability=solarize), dtype=types.UINT8) * (x >= 128)
        x = x * (1 - chosen) + (255 - x) * chosen
    return fn.crop_mirror_normalize(fn.cast(x, dtype=types.UINT8), mean=[255 * m for m in MEAN], std=[255 * s for s in STD])


def _stack(batch: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(views) for views in zip(*batch, strict=True)]
