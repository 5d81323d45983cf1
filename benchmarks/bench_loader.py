"""Six views per sample (2 x 224 and 4 x 96 pixels, the image and a neighbor decoded): ours against how it is commonly done.

All contenders take the same JPEGs, RoIs and neighbors, and augment as stage 1 of the paper. Group "one core" pins the process to one core,
uses no worker and counts the process's own time; group "all cores" gives each contender one worker (process or thread) per core; group
"scaling" is ours by number of threads. Each contender's configuration is documented at its function.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia import dali
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

from benchmarks.harness import Contender, Row, compare
from benchmarks.photographs import load_jpegs
from orl_fast.config import Config
from orl_fast.errors import DataError
from orl_fast.methods import ORL
from orl_fast.shards.images import decode_rgb
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.cpu import CpuRenderer
from orl_fast.views.draw import Mined, draw_plan
from orl_fast.views.gpu import DaliRenderer
from orl_fast.views.loader import ViewLoader
from orl_fast.views.patches import PATCH_SIDE_PX
from orl_fast.views.plan import Batch, Renderer, Rows, ViewPlan
from orl_fast.views.sampler import Sampler

_BATCH = 32
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_VIEWS = ORL.views(Config())
_BLUR_AND_SOLARIZE = ((1.0, 0.0), (0.1, 0.2))  # probabilities, of first and second view
_NUM_ROIS, _NUM_NEIGHBORS = 8, 4
types: Any = dali.types
fn: Any = dali.fn


def run(source: Path | None, *, quick: bool) -> list[Row]:
    """Samples/s of six views; the reference's path has ratio 1."""
    data = _Data.of(load_jpegs(source, limit=48 if quick else 256))
    rounds, num_batches = (3, 1) if quick else (7, 2)
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    rows: list[Row] = []
    with ExitStack() as stack, _pinned(cores[:1]):
        contenders = _contenders(data, stack, num_samples=_BATCH * num_batches, workers=0)
        rows += compare(contenders, unit="samples/s", rounds=rounds, group="one core, CPU time", clock=time.process_time)
    with ExitStack() as stack:
        contenders = _contenders(data, stack, num_samples=_BATCH * num_batches * len(cores), workers=len(cores))
        rows += compare(contenders, unit="samples/s", rounds=rounds, group=f"all {len(cores)} cores")
    with ExitStack() as stack:
        counts = sorted({1, len(cores), *(2**k for k in range(1, 10) if 2**k < len(cores))})
        ours = []
        for count in counts:
            renderer, num_samples = CpuRenderer(data, num_threads=count), _BATCH * num_batches * count
            ours.append(_ours(f"ours, {count} thread{'s' * (count > 1)}", data, renderer, stack, num_samples, workers=count))
        rows += compare(ours, unit="samples/s", rounds=rounds, group="scaling")
    return rows


@dataclass(frozen=True, kw_only=True)
class _Data:
    """JPEGs in memory (beyond them: stored patches), drawn RoIs, and neighbors that are never in the same batch."""

    jpegs: list[bytes]
    arrays: list[np.ndarray[Any, Any]]
    heights: np.ndarray[Any, Any]
    widths: np.ndarray[Any, Any]
    rois: BoxTable
    pairs: PairTable
    patch_rows: np.ndarray[Any, Any] | None = None

    @classmethod
    def of(cls, jpegs: list[bytes]) -> "_Data":
        sizes = [Image.open(io.BytesIO(data)).size for data in jpegs]
        jpegs, sizes = zip(*((data, size) for data, size in zip(jpegs, sizes, strict=True) if min(size) >= 200), strict=True)  # type: ignore[assignment]
        num, rng = len(jpegs), np.random.default_rng(0)
        if num < 2:
            raise DataError("fewer than two photographs of at least 200 px; name a folder with more")
        boxes = []
        for width, height in sizes:
            sides = np.exp(rng.uniform(np.log(96), np.log([0.8 * width, 0.8 * height]), (_NUM_ROIS, 2)))
            corner = rng.random((_NUM_ROIS, 2)) * (np.array([width, height]) - sides)
            boxes.append(np.concatenate([corner, corner + sides], axis=1).astype(np.int16))
        # The images of a batch come from one half, their neighbors from the other: in a large data set they do not meet either.
        neighbors = (np.arange(num)[:, None] + num // 2 + rng.integers(0, max(1, num // 4), (num, _NUM_NEIGHBORS))) % num
        pairs = PairTable(
            neighbors=neighbors.astype(np.int64),
            first=np.arange(num * _NUM_NEIGHBORS).reshape(num, -1),
            count=np.ones((num, _NUM_NEIGHBORS), np.int32),
            query_roi=rng.integers(0, _NUM_ROIS, num * _NUM_NEIGHBORS).astype(np.int16),
            partner_roi=rng.integers(0, _NUM_ROIS, num * _NUM_NEIGHBORS).astype(np.int16),
            similarities=np.zeros(num * _NUM_NEIGHBORS, np.float32),
        )
        return cls(
            jpegs=list(jpegs), arrays=[np.frombuffer(data, np.uint8) for data in jpegs], rois=BoxTable.from_lists(boxes), pairs=pairs,
            heights=np.array([size[1] for size in sizes], np.int32), widths=np.array([size[0] for size in sizes], np.int32),
        )  # fmt: skip

    def with_patches(self) -> "_Data":
        """The same, with each partner RoI stored as mining packs it."""
        used = np.unique(self.rois.offsets[self.pairs.neighbors.ravel()] + self.pairs.partner_roi)  # one pair per neighbor
        arrays, owner, image = list(self.arrays), -1, Image.new("RGB", (1, 1))
        for row in used:
            if row // _NUM_ROIS != owner:
                owner = int(row // _NUM_ROIS)
                image = decode_rgb(self.jpegs[owner])
            buffer = io.BytesIO()
            patch = image.crop(tuple(self.rois.boxes[row].tolist())).resize((PATCH_SIDE_PX, PATCH_SIDE_PX), Image.Resampling.BILINEAR)
            patch.save(buffer, "JPEG", quality=95, subsampling=0)
            arrays.append(np.frombuffer(buffer.getvalue(), np.uint8))
        return replace(self, arrays=arrays, patch_rows=used)

    def views(self, rows: Rows, /) -> list[np.ndarray[Any, Any]]:
        return [self.arrays[row] for row in rows.tolist()]

    def close(self) -> None:
        """Nothing is held."""

    def __len__(self) -> int:
        return len(self.jpegs)

    def plan(self, rows: Rows, epoch: int) -> ViewPlan:
        mined = _Packed(rois=self.rois, pairs=self.pairs, stored=self.patch_rows)
        return draw_plan(rows, _VIEWS, seed=0, epoch=epoch, heights=self.heights, widths=self.widths, mined=mined)

    def samples(self, num: int) -> "list[_Sample]":
        """What a common data set would hand out: two files and four boxes."""
        samples: list[_Sample] = []
        for start in range(0, num, _BATCH):
            rows = np.arange(start, min(start + _BATCH, num)) % max(1, len(self) // 2)
            crops = self.plan(rows, start).crops
            boxes = crops.box.astype(int).reshape(6, len(rows), 4)[2:]
            neighbors = crops.source.reshape(6, len(rows))[5]
            samples += [
                _Sample(self.jpegs[rows[b]], self.jpegs[neighbors[b]], [tuple(box[b].tolist()) for box in boxes]) for b in range(len(rows))
            ]
        return samples


@dataclass(frozen=True, kw_only=True)
class _Packed(Mined):
    """With patches that lie in memory."""

    stored: np.ndarray[Any, Any] | None = None

    @property
    def patch_rows(self) -> np.ndarray[Any, Any]:
        return self.stored if self.stored is not None else np.empty(0, np.int64)


@dataclass(frozen=True)
class _Sample:
    image: bytes
    neighbor: bytes
    boxes: list[tuple[int, int, int, int]]  # xyxy: RoI, jittered RoI, query, partner


def _contenders(data: _Data, stack: ExitStack, *, num_samples: int, workers: int) -> list[Contender]:
    samples, threads = data.samples(num_samples), max(1, workers)
    contenders = [
        Contender(name="reference path: PIL + torchvision, DataLoader", run=_data_loader(samples, _PilViews(), workers)),
        Contender(name="torchvision v2 on tensors, DataLoader", run=_data_loader(samples, _TensorViews(_decode_torchvision), workers)),
        Contender(name="webdataset + torchvision (PIL)", run=_web_dataset(samples, workers, stack)),
        Contender(name="SPDL + torchvision v2", run=_spdl(samples, threads)),
        Contender(name="DALI on the CPU, as one would write it", run=_naive_dali(samples, threads)),
    ]
    packed = data.with_patches()
    ours: list[tuple[str, _Data, Renderer]] = [
        ("our DALI graph on the CPU (dali-cpu)", data, DaliRenderer(data, num_threads=threads)),
        ("ours on the CPU", data, CpuRenderer(data, num_threads=threads)),
        ("ours on the CPU, partner patches", packed, CpuRenderer(packed, num_threads=threads)),
    ]
    if torch.cuda.is_available():
        ours.append(("ours on the GPU", data, DaliRenderer(data, num_threads=threads, device=torch.device("cuda", 0))))
    return contenders + [_ours(name, source, renderer, stack, num_samples, workers=workers) for name, source, renderer in ours]


def _ours(name: str, data: _Data, renderer: Renderer, stack: ExitStack, num_samples: int, *, workers: int) -> Contender:
    """Views on the renderer's device; on one core without the loader's own threads, else by a ViewLoader as training does."""
    stack.callback(renderer.close)
    half = max(1, len(data) // 2)

    def load() -> float:
        if not workers:
            for start in range(0, num_samples, _BATCH):
                renderer.render(data.plan(np.arange(start, start + _BATCH) % half, start))
        else:
            draw: Callable[[Rows, int], ViewPlan] = lambda rows, epoch: data.plan(rows % half, epoch)  # noqa: E731
            sampler = Sampler(num_images=max(half, _BATCH), batch_size=_BATCH, seed=0)
            loader = ViewLoader(_Kept(renderer), draw, sampler=sampler, num_steps=num_samples // _BATCH)
            with loader:
                for _ in loader:
                    pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return num_samples

    return Contender(name=name, run=load)


@dataclass(frozen=True)
class _Kept:
    """A renderer that outlives its loader."""

    renderer: Renderer

    def render(self, plan: ViewPlan) -> Batch:
        return self.renderer.render(plan)

    def close(self) -> None:
        """It is closed when its group is done."""


class _PilViews:
    """Stage 1's transforms as the reference implementation has them: PIL images, torchvision's classes, PIL's blur, float tensors."""

    def __init__(self) -> None:
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        first = [transforms.RandomHorizontalFlip(), jitter, transforms.RandomGrayscale(0.2)]
        last = [transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
        common = [[*first, _PilBlur(blur), _PilSolarize(solarize), *last] for blur, solarize in _BLUR_AND_SOLARIZE]
        self.image = [transforms.Compose([transforms.RandomResizedCrop(224), *view]) for view in common]
        self.patch = [transforms.Compose([transforms.Resize((96, 96)), *view]) for view in common]

    def __call__(self, sample: _Sample) -> list[torch.Tensor]:
        image, neighbor = decode_rgb(sample.image), decode_rgb(sample.neighbor)
        parents = (image, image, image, neighbor)
        patches = [parent.crop(box) for parent, box in zip(parents, sample.boxes, strict=True)]
        return [*(view(image) for view in self.image), *(self.patch[i % 2](patch) for i, patch in enumerate(patches))]


class _PilBlur:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


class _PilSolarize:
    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if torch.rand(()) < self.probability else image


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

    def __call__(self, sample: _Sample) -> list[torch.Tensor]:
        image, neighbor = self.decode(sample.image), self.decode(sample.neighbor)
        views = [view(image) for view in self.image]
        for i, (parent, (x1, y1, x2, y2)) in enumerate(zip((image, image, image, neighbor), sample.boxes, strict=True)):
            views.append(self.patch[i % 2](parent[:, y1:y2, x1:x2]))
        return views


class _Views(torch.utils.data.Dataset[list[torch.Tensor]]):
    def __init__(self, samples: list[_Sample], views: Callable[[_Sample], list[torch.Tensor]]) -> None:
        self.samples, self.views = samples, views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return self.views(self.samples[i])


def _data_loader(samples: list[_Sample], views: Callable[[_Sample], list[torch.Tensor]], workers: int) -> Callable[[], float]:
    """A torch DataLoader, its workers kept between runs."""
    loader = torch.utils.data.DataLoader(
        _Views(samples, views), batch_size=_BATCH, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_one_thread
    )
    return partial(_drain, loader, len(samples))


def _web_dataset(samples: list[_Sample], workers: int, stack: ExitStack) -> Callable[[], float]:
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
    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).map(_WebViews(_PilViews())).batched(_BATCH)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_one_thread)
    return partial(_drain, loader, len(samples))


class _WebViews:
    def __init__(self, views: _PilViews) -> None:
        self.views = views

    def __call__(self, entry: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        import json

        return tuple(self.views(_Sample(entry["image.jpg"], entry["neighbor.jpg"], json.loads(entry["boxes.json"]))))


def _spdl(samples: list[_Sample], threads: int) -> Callable[[], float]:
    """SPDL's thread pipeline, torchvision's decoder (SPDL's own needs FFmpeg's libraries) and v2 views."""
    from spdl.pipeline import PipelineBuilder

    views = _TensorViews(_decode_torchvision)

    def load() -> float:
        builder: Any = PipelineBuilder()
        builder = builder.add_source(iter(samples)).pipe(views, concurrency=threads).aggregate(_BATCH).pipe(_stack).add_sink(2)
        pipeline = builder.build(num_threads=threads)
        with pipeline.auto_stop():
            for _ in pipeline:
                pass
        return len(samples)

    return load


def _naive_dali(samples: list[_Sample], threads: int) -> Callable[[], float]:
    """DALI's operators in the order of the recipe, one chain per view, as its examples do."""
    pipeline: Any = _naive_graph(batch_size=_BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=1, seed=0)
    batches = [samples[i : i + _BATCH] for i in range(0, len(samples), _BATCH)]

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
    return fn.crop_mirror_normalize(fn.cast(x, dtype=types.UINT8), mean=[255 * m for m in _MEAN], std=[255 * s for s in _STD])


def _drain(loader: Any, num: int) -> float:
    for _ in loader:
        pass
    return num


def _stack(batch: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(views) for views in zip(*batch, strict=True)]


def _decode_torchvision(data: bytes) -> torch.Tensor:
    image: torch.Tensor = decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), mode=ImageReadMode.RGB)
    return image


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


@contextmanager
def _pinned(cores: list[int]) -> Iterator[None]:
    """Run on these cores only; threads started meanwhile stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
