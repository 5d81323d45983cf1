"""What the groups of `orl-fast bench loader` share: images in memory, a DataLoader's way to load them, and ours."""

import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from benchmarks.harness import Contender, available
from orl_fast.config import Config, LoaderConfig
from orl_fast.errors import DataError
from orl_fast.methods import ORL
from orl_fast.shards import ShardIndex, ShardReader, write_shards
from orl_fast.shards.images import decode_rgb
from orl_fast.shards.pixels import write_pixels
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.draw import Mined, draw_plan
from orl_fast.views.loader import ViewLoader
from orl_fast.views.normalize import normalize
from orl_fast.views.patches import PATCH_SIDE_PX
from orl_fast.views.pixels import with_pixels
from orl_fast.views.plan import Batch, ImageSource, Renderer, Rows, ViewPlan
from orl_fast.views.sampler import Sampler
from orl_fast.views.specs import ViewSpec

BATCH = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORL_VIEWS = ORL.views(Config())
_NUM_ROIS, _NUM_NEIGHBORS = 8, 4


@dataclass(frozen=True, kw_only=True)
class Data:
    """JPEGs in memory (beyond them: stored patches), drawn RoIs, and neighbors that are never in the same batch."""

    jpegs: list[bytes]
    arrays: list[np.ndarray[Any, Any]]
    heights: np.ndarray[Any, Any]
    widths: np.ndarray[Any, Any]
    rois: BoxTable
    pairs: PairTable
    patch_rows: np.ndarray[Any, Any] | None = None

    @classmethod
    def of(cls, jpegs: list[bytes]) -> "Data":
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

    def with_patches(self) -> "Data":
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

    def plan(self, rows: Rows, epoch: int, specs: Sequence[ViewSpec] = ORL_VIEWS) -> ViewPlan:
        mined = _Packed(rois=self.rois, pairs=self.pairs, stored=self.patch_rows)
        return draw_plan(rows, specs, seed=0, epoch=epoch, heights=self.heights, widths=self.widths, mined=mined)

    def samples(self, num: int) -> "list[Sample]":
        """What a common data set would hand out: two files and four boxes."""
        samples: list[Sample] = []
        for start in range(0, num, BATCH):
            rows = np.arange(start, min(start + BATCH, num)) % max(1, len(self) // 2)
            crops = self.plan(rows, start).crops
            boxes = crops.box.astype(int).reshape(6, len(rows), 4)[2:]
            neighbors = crops.source.reshape(6, len(rows))[5]
            samples += [
                Sample(self.jpegs[rows[b]], self.jpegs[neighbors[b]], [tuple(box[b].tolist()) for box in boxes]) for b in range(len(rows))
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
class Sample:
    """What a common data set hands out."""

    image: bytes
    neighbor: bytes
    boxes: list[tuple[int, int, int, int]]  # xyxy: RoI, jittered RoI, query, partner


def ours(
    name: str,
    data: Data,
    renderer: Renderer,
    stack: ExitStack,
    num_samples: int,
    *,
    workers: int,
    specs: Sequence[ViewSpec] = ORL_VIEWS,
) -> Contender:
    """Views on the renderer's device; on one core without the loader's own threads, else by a ViewLoader as training does."""
    stack.callback(renderer.close)
    half = max(1, len(data) // 2)

    def load() -> float:
        if not workers:
            for start in range(0, num_samples, BATCH):
                renderer.render(data.plan(np.arange(start, start + BATCH) % half, start, specs))
        else:
            draw: Callable[[Rows, int], ViewPlan] = lambda rows, epoch: data.plan(rows % half, epoch, specs)  # noqa: E731
            sampler = Sampler(num_images=max(half, BATCH), batch_size=BATCH, seed=0)
            loader = ViewLoader(_Kept(renderer), draw, sampler=sampler, num_steps=num_samples // BATCH)
            with loader:
                for _ in loader:
                    pass
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return num_samples

    return Contender(name=name, run=load)


def store_pixels(data: Data, stack: ExitStack) -> ShardIndex:
    """The same images as pixel shards on this machine's disk, as `orl-fast shard --pixels` writes them."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for i, jpeg in enumerate(data.jpegs):
        (folder / f"{i:06d}.jpg").write_bytes(jpeg)
    write_shards(folder, folder.with_suffix(".shards"), num_workers=1)
    stack.callback(shutil.rmtree, folder.with_suffix(".shards"))
    index = ShardIndex.open(folder.with_suffix(".shards"))
    write_pixels(index, num_workers=1)
    return index


def pixel_source(index: ShardIndex) -> ImageSource:
    """The stored pixels, mapped."""
    return with_pixels(ShardReader(index), index, LoaderConfig(pixels="always"), shrunken=False)


@dataclass(frozen=True)
class Normalized:
    """Views as the reference's path hands them out: normalized floats, computed on the CPU. (Ours go to the device as bytes.)"""

    renderer: Renderer

    def render(self, plan: ViewPlan) -> Batch:
        batch = self.renderer.render(plan)
        return replace(batch, views={name: normalize(view) for name, view in batch.views.items()})

    def close(self) -> None:
        self.renderer.close()


@dataclass(frozen=True)
class _Kept:
    """A renderer that outlives its loader."""

    renderer: Renderer

    def render(self, plan: ViewPlan) -> Batch:
        return self.renderer.render(plan)

    def close(self) -> None:
        """It is closed when its group is done."""


class PilBlur:
    """PIL's blur of a sigma from 0.1 to 2, as the reference implementation and solo-learn have it."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.probability:
            return image
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))


class PilSolarize:
    """PIL's solarization."""

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image) if torch.rand(()) < self.probability else image


class _Views(torch.utils.data.Dataset[list[torch.Tensor]]):
    def __init__(self, samples: list[Sample], views: Callable[[Sample], list[torch.Tensor]]) -> None:
        self.samples, self.views = samples, views

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        return self.views(self.samples[i])


def data_loader(samples: list[Sample], views: Callable[[Sample], list[torch.Tensor]], workers: int) -> Callable[[], float]:
    """A torch DataLoader, its workers kept between runs."""
    loader = torch.utils.data.DataLoader(
        _Views(samples, views), batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0, worker_init_fn=one_thread
    )
    return partial(drain, loader, len(samples))


def drain(loader: Any, num: int) -> float:
    for _ in loader:
        pass
    return num


def torchcodec_is_there() -> bool:
    """If not, a line says what is skipped, once."""
    remedy = "pip install 'orl-fast[bench]'"
    return available("torchcodec.decoders", needed_by="torchvision v2 on tensors, SPDL", remedy=remedy)


def decode_tensor(data: bytes) -> torch.Tensor:
    """[3, H, W] uint8, by torchcodec (its image decoders need no FFmpeg); the pixels are PIL's."""
    from torchcodec import decoders

    decode: Any = decoders.decode_jpeg  # type: ignore[attr-defined]
    image: torch.Tensor = decode(data, mode="RGB")
    return image


def one_thread(_worker: int) -> None:
    torch.set_num_threads(1)


@contextmanager
def pinned(cores: list[int]) -> Iterator[None]:
    """Run on these cores only; threads started meanwhile stay there."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
