"""Stage 2, correspondence discovery, as a chain of steps (paper, section 3.2).

    features → neighbors ─┐
    proposals → rois ─────┴→ pairs (RoI features first) → patches (on request)

Each step makes one table below `mined/`, shard by shard, and is skipped when its table is up to date. What it builds on must exist and be
made from the same images and the same checkpoint.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from orl_fast.checkpoint import checkpoint_path, read_header
from orl_fast.config import Config
from orl_fast.console import human_time, log, log_to_file
from orl_fast.errors import DataError, StaleError
from orl_fast.files import human_bytes, locked, remove_leftovers, require_free_space
from orl_fast.mining.executor import Executor
from orl_fast.mining.features import renderer_setting, write_features
from orl_fast.mining.neighbors import EXACT_LIMIT, find_neighbors
from orl_fast.mining.objects import annotation_files, digest_files, has_rotated
from orl_fast.mining.pairs import PairMiner, join_patches, pack_patches
from orl_fast.mining.rois import MAX_PX, filter_shards, join_boxes, propose_shards, save_objects
from orl_fast.mining.step import Step, array_writer, join_arrays, open_part
from orl_fast.models import Encoder, load_encoder
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, NeighborTable, PairTable, TableInfo, open_array, open_info, table_info
from orl_fast.views.patches import PATCH_SIDE_PX

STEPS = ("features", "neighbors", "proposals", "rois", "pairs")
IMPORTED = "imported"  # a setting of tables that `orl-fast tables import` wrote; mining keeps them
# The imported tables that make a step needless.
_SPARED_BY = {step: (step,) for step in STEPS} | {"features": ("neighbors",), "proposals": ("proposals", "rois")}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What stage 2 works on and with."""

    index: ShardIndex
    folder: Path  # where the tables go, `mined/` of the shard folder
    config: Config  # `mining`, `variant` and `loader` are used
    checkpoint: Path  # of stage 1; proposals and RoIs do without
    own_encoder: Encoder | None = None  # in place of the checkpoint's
    annotations: Path | None = None  # file for the proposals "coco-annotations"; None: the one recorded when the images were packed
    keep_imported: bool = True  # keep imported proposals and RoIs; False: use proposals of our own in their place
    exact_limit: int = EXACT_LIMIT  # more images than this are searched by an approximate index
    executor: Executor = field(default_factory=Executor)  # does the work
    times_s: dict[str, float] = field(default_factory=dict)

    @cached_property
    def num_neighbors(self) -> int:
        """As configured, but all others where there are fewer images."""
        wanted, others = self.config.mining.num_neighbors, len(self.index) - 1
        if others < 1:
            raise DataError(f"{self.index.path}: one image has no neighbors; pack more images")
        if wanted > others and self.executor.is_main:
            log.warning("%d images: each has %d neighbors, not %d", others + 1, others, wanted)
        return min(wanted, others)

    @cached_property
    def encoder(self) -> Encoder:
        if self.own_encoder is not None:
            return self._fitting(self.own_encoder)
        header = read_header(checkpoint_path(self.checkpoint))
        if header["step"] < header["num_steps"] and self.executor.is_main:
            log.warning("%s: its training is not finished, step %d of %d", self.checkpoint, header["step"], header["num_steps"])
        return self._fitting(load_encoder(self.checkpoint))

    def _fitting(self, encoder: Encoder) -> Encoder:
        for name in ("crop_px", "roi_size_px"):
            encoder.backbone.require_size(getattr(self.config.mining, name), setting=f"mining.{name}")
        return encoder

    def run(self, steps: Sequence[str] = STEPS) -> None:
        """Make the tables of these steps, in order; "patches" may be among them. Nothing is written where all are up to date.

        Raises:
            MissingStageError, StaleError: what a step builds on is missing or made from other inputs.
            DataError: another process mines into the folder, or it cannot be written.
        """
        with ExitStack() as stack:
            is_locked = False
            for step in steps:
                start_s = time.monotonic()
                if reason := self.executor.decide(partial(self._reason_to_skip, step)):
                    log.info("%s: %s", step, reason)
                else:
                    if not is_locked:
                        stack.enter_context(self.locked())
                        is_locked = True
                    _STEPS[step](self).run(self.executor)
                self.times_s[step] = time.monotonic() - start_s

    def summary(self) -> list[str]:
        """What was mined, in a few lines."""
        lines = []
        if table_info(self.folder / "rois") is not None:
            counts = BoxTable.open(self.folder / "rois").counts
            lines.append(f"RoIs per image: {counts.mean():.1f} on average, {counts.min()} to {counts.max()}")
        if "pairs" in self.times_s and table_info(self.folder / "pairs") is not None:
            pairs = PairTable.open(self.folder / "pairs")
            similarity = float(pairs.similarities.mean(dtype=np.float64))
            lines.append(f"pairs: {len(pairs.similarities):,} with {pairs.neighbors.shape[1]} neighbors, mean similarity {similarity:.3f}")
        lines.append("time: " + ", ".join(f"{step} {human_time(time_s)}" for step, time_s in self.times_s.items()))
        return lines

    def info(self, step: str) -> TableInfo:
        """The table of a step, checked against the images, the checkpoint and the tables it was made from."""
        found = table_info(self.folder / step)
        if found is not None and IMPORTED in found.settings:
            return open_info(self.folder / step, step, made_from=self.inputs(), remedy="orl-fast tables import again")
        checked = {"features": ("encoder",), "neighbors": ("encoder",), "pairs": ("neighbors", "rois")}.get(step, ())
        if step == "rois" and table_info(self.folder / "proposals") is not None:
            checked = ("proposals",)
        return open_info(self.folder / step, step, made_from=self.inputs(*checked), remedy=f"orl-fast mine {step}")

    def inputs(self, *names: str) -> dict[str, str]:
        """The fingerprints of the images and of these: the encoder, or other tables, checked as by `info`."""
        others = {name: self.encoder.fingerprint if name == "encoder" else self.info(name).fingerprint for name in names}
        return {"index": self.index.fingerprint, **others}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, so that no other process mines or imports into it, and keep the log in mine.log."""

        def hold() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder with --out") from error
            stack.enter_context(locked(self.folder, what="orl-fast mine or tables import"))
            remove_leftovers(self.folder)
            stack.enter_context(log_to_file(self.folder / "mine.log"))

        with ExitStack() as stack:
            self.executor.decide(hold)
            yield

    @cached_property
    def images_per_shard(self) -> list[int]:
        return [len(self.index.shard_rows(shard)) for shard in range(self.index.num_shards)]

    def _reason_to_skip(self, step: str) -> str | None:
        """That an imported table, checked as by `info`, makes the step needless, or that it was made."""
        for name in _SPARED_BY.get(step, ()):
            found = table_info(self.folder / name)
            if found is None or IMPORTED not in found.settings or not (self.keep_imported or name == "neighbors"):
                continue
            imported = int(self.info(name).settings.get("num_neighbors", self.num_neighbors))
            if imported < self.num_neighbors:
                raise StaleError(
                    f"{self.folder / name}: imported with {imported} neighbors, {self.num_neighbors} are asked for; "
                    f"use --neighbors {imported}, or remove the folder and mine"
                )
            return f"not made, the imported {name} are kept"
        return "up to date" if _STEPS[step](self).is_current() else None


def _features(stage: Stage) -> Step:
    folder, mining, num_shards = stage.folder / "features", stage.config.mining, stage.index.num_shards
    settings = {"resize_px": mining.resize_px, "crop_px": mining.crop_px, **renderer_setting(stage.config.loader)}
    worker = partial(write_features, folder=folder, index=stage.index, encoder=stage.encoder, config=stage.config)
    return Step(
        mined=stage.folder,
        info=TableInfo(kind="features", made_from=stage.inputs("encoder"), settings=settings),
        work=partial(stage.executor.map_on_devices, worker),
        sizes=stage.images_per_shard,
        finish=lambda: join_arrays(folder / "features.npy", (open_part(folder, "features", shard) for shard in range(num_shards))),
    )


def _neighbors(stage: Stage) -> Step:
    """One task: the main process compares all with all."""
    folder, made_from = stage.folder / "neighbors", stage.inputs("encoder", "features")

    def work(shards: Sequence[int]) -> Iterator[int]:
        for _ in shards:
            with array_writer(folder / "neighbors.npy") as write, array_writer(folder / "similarities.npy") as write_similarities:
                for block in find_neighbors(
                    open_array(stage.folder / "features", "features"),
                    num_neighbors=stage.num_neighbors,
                    exact_limit=stage.exact_limit,
                    use_gpu=stage.executor.device.type == "cuda",
                    num_threads=stage.executor.num_workers,
                ):
                    write(block.neighbors)
                    write_similarities(block.similarities)
                    yield len(block.neighbors)

    settings = {"num_neighbors": stage.num_neighbors, "exact": len(stage.index) <= stage.exact_limit}
    info = TableInfo(kind="neighbors", made_from=made_from, settings=settings)
    return Step(mined=stage.folder, info=info, work=work, sizes=[len(stage.index)])


def _proposals(stage: Stage) -> Step:
    folder, index, executor = stage.folder / "proposals", stage.index, stage.executor
    backend, seed = stage.config.mining.proposals, stage.config.mining.proposal_seed
    if backend == "coco-annotations":
        files = annotation_files(index, stage.annotations)
        made_from = {**stage.inputs(), "annotations": digest_files(files)}
        rotated = {"rotated": True} if has_rotated(index) else {}
        info = TableInfo(kind="proposals", made_from=made_from, settings={"backend": backend, **rotated})
        work = partial(save_objects, folder, index=index, files=files)
    else:
        info = TableInfo(kind="proposals", made_from=stage.inputs(), settings={"backend": backend, "seed": seed})
        work = partial(propose_shards, folder, index=index, backend=backend, seed=seed, executor=executor)
    return Step(mined=stage.folder, info=info, work=work, last="counts", sizes=stage.images_per_shard)


def _rois(stage: Stage) -> Step:
    folder, index = stage.folder / "rois", stage.index
    limits = {name: getattr(stage.config.mining, name) for name in ("min_side_px", "max_aspect", "max_iou", "max_rois")}

    def warn_of_large_images(_: Sequence[int]) -> None:
        num_large = int((np.maximum(index.heights, index.widths) > MAX_PX).sum())
        if num_large:
            log.warning("rois: %d images have a side over %d px, where boxes end; each is proposed as a whole", num_large, MAX_PX)

    return Step(
        mined=stage.folder,
        info=TableInfo(kind="rois", made_from=stage.inputs("proposals"), settings=limits),
        work=partial(filter_shards, folder, index=index, source=stage.folder / "proposals", limits=limits),
        last="counts",
        sizes=stage.images_per_shard,
        finish=partial(join_boxes, folder, num_shards=index.num_shards),
        check=warn_of_large_images,
    )


def _roi_features(stage: Stage) -> Step:
    folder, index, rois = stage.folder / "roi-features", stage.index, BoxTable.open(stage.folder / "rois")
    num_rois = [rois.num_of(index.shard_rows(shard)) for shard in range(index.num_shards)]

    def require_space(shards: Sequence[int]) -> None:
        """For all processes together."""
        num_left = sum(num_rois[shard] for shard in shards)
        num_bytes = num_left * stage.encoder.num_features * 2
        log.info("RoI features: %s RoIs, %s in %s", f"{num_left:,}", human_bytes(num_bytes), folder)
        require_free_space(folder, num_bytes=num_bytes, purpose="RoI features")

    settings = {"roi_size_px": stage.config.mining.roi_size_px, **renderer_setting(stage.config.loader)}
    worker = partial(write_features, folder=folder, index=index, encoder=stage.encoder, config=stage.config, rois=rois)
    return Step(
        mined=stage.folder,
        info=TableInfo(kind="roi-features", made_from=stage.inputs("encoder", "rois"), settings=settings),
        work=partial(stage.executor.map_on_devices, worker),
        sizes=num_rois,
        unit="RoIs",
        check=require_space,
    )


def _pairs(stage: Stage) -> Step:
    mining, variant, num_neighbors = stage.config.mining, stage.config.variant, stage.num_neighbors
    found = int(stage.info("neighbors").settings["num_neighbors"])
    made_from = stage.inputs("encoder", "neighbors", "rois")
    if found < num_neighbors:
        raise StaleError(
            f"{stage.folder / 'neighbors'}: holds {found} neighbors, {num_neighbors} are asked for; "
            f"run orl-fast mine neighbors --neighbors {num_neighbors}"
        )
    sizes = {"roi_size_px": mining.roi_size_px, "num_neighbors": num_neighbors, "pair_ratio": mining.pair_ratio, "compat": variant}
    miner = PairMiner(
        mined=stage.folder,
        index=stage.index,
        rois=BoxTable.open(stage.folder / "rois"),
        neighbors=NeighborTable.open(stage.folder / "neighbors").neighbors[:, :num_neighbors],
        pair_ratio=mining.pair_ratio,
        variant=variant,
    )
    return Step(
        mined=stage.folder,
        info=TableInfo(kind="pairs", made_from=made_from, settings={**sizes, **renderer_setting(stage.config.loader)}),
        work=partial(stage.executor.map_on_devices, miner.mine),
        sizes=stage.images_per_shard,
        finish=miner.join,
        needs=[_roi_features(stage)],
    )


def _patches(stage: Stage) -> Step:
    folder = stage.folder / "patches"
    return Step(
        mined=stage.folder,
        info=TableInfo(kind="patches", made_from=stage.inputs("rois", "pairs"), settings={"side_px": PATCH_SIDE_PX}),
        work=partial(pack_patches, folder, index=stage.index, executor=stage.executor),
        sizes=stage.images_per_shard,
        finish=partial(join_patches, folder, num_shards=stage.index.num_shards),
    )


_STEPS: dict[str, Callable[[Stage], Step]] = {
    "features": _features,
    "neighbors": _neighbors,
    "proposals": _proposals,
    "rois": _rois,
    "pairs": _pairs,
    "patches": _patches,
}
