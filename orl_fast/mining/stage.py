"""Stage 2, correspondence discovery, as a chain of steps (paper, section 3.2).

    features → neighbors ─┐
    proposals → rois ─────┴→ pairs (RoI features first) → patches (on request)

Each step makes one table below `mined/`, shard by shard, and is skipped when its table is up to date. What it builds on must be there and
made from the same images and the same checkpoint.
"""

import fcntl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orl_fast.config import Config
from orl_fast.console import human_time, log, log_to_file, progress
from orl_fast.errors import DataError, StaleError
from orl_fast.mining.features import FeatureWriter
from orl_fast.mining.neighbors import EXACT_LIMIT, find_neighbors
from orl_fast.mining.objects import annotation_files, digest_files, object_boxes
from orl_fast.mining.pairs import PairMiner, RoiFeatures
from orl_fast.mining.parts import Finish, Share, Work, array_writer, join_arrays, make_table, open_part
from orl_fast.mining.patches import join_patches, pack_shards
from orl_fast.mining.rois import COUNTS, filter_shards, join_boxes, propose_shards, save_shards
from orl_fast.models import Encoder, load_encoder
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, NeighborTable, PairTable, TableInfo, new_table, open_array, open_info, table_info
from orl_fast.views.plan import PATCH_SIDE_PX

STEPS = ("features", "neighbors", "proposals", "rois", "pairs")
IMPORTED = "imported"  # a setting of tables that `orl-fast import` wrote; mining keeps them
# The imported tables that make a step needless.
_SPARED_BY = {step: (step,) for step in STEPS} | {"features": ("neighbors",), "proposals": ("proposals", "rois")}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What stage 2 works on and with.

    Attributes:
        folder: where the tables go, `mined/` of the shard folder.
        config: `mining`, `compat` and `loader` are used.
        checkpoint: of stage 1; proposals and RoIs do without.
        annotations: file for the proposals "coco-annotations"; None: the one recorded when the images were packed.
        keep_imported: leave imported proposals and RoIs as they are; False: replace them by proposals of our own.
        exact_limit: more images than this are searched by an approximate index.
        share: this process among several.
    """

    index: ShardIndex
    folder: Path
    config: Config
    checkpoint: Path
    annotations: Path | None = None
    keep_imported: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_workers: int = 1
    exact_limit: int = EXACT_LIMIT
    share: Share = field(default_factory=Share)
    times_s: dict[str, float] = field(default_factory=dict)

    @cached_property
    def num_neighbors(self) -> int:
        """As configured, but all others where there are fewer images."""
        wanted, there = self.config.mining.num_neighbors, len(self.index) - 1
        if there < 1:
            raise DataError(f"{self.index.path}: one image has no neighbors; pack more images")
        if wanted > there and self.share.rank == 0:
            log.warning("%d images: each has %d neighbors, not %d", there + 1, there, wanted)
        return min(wanted, there)

    @cached_property
    def encoder(self) -> Encoder:
        return load_encoder(self.checkpoint).to(self.device)

    def run(self, steps: Sequence[str] = STEPS) -> None:
        """Make the tables of these steps, in order; "patches" may be among them.

        Raises:
            MissingStageError, StaleError: what a step builds on is missing or made from other inputs.
        """
        with self._alone_here():
            for step in steps:
                start_s = time.monotonic()
                if imported := self._imported_for(step):
                    log.info("%s: not made, the imported %s are kept", step, imported)
                else:
                    getattr(self, f"_make_{step}")()
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
        made_from = {"index": self.index.fingerprint}
        found = table_info(self.folder / step)
        if found is not None and IMPORTED in found.settings:
            return open_info(self.folder / step, step, made_from=made_from, remedy="orl-fast import again")
        if step in ("features", "neighbors"):
            made_from["encoder"] = self.encoder.fingerprint
        if step == "rois" and table_info(self.folder / "proposals") is not None:
            made_from["proposals"] = self.info("proposals").fingerprint
        if step == "pairs":
            made_from |= {name: self.info(name).fingerprint for name in ("neighbors", "rois")}
        return open_info(self.folder / step, step, made_from=made_from, remedy=f"orl-fast mine {step}")

    def _make_features(self) -> None:
        mining, folder = self.config.mining, self.folder / "features"
        parts = (open_part(folder, "features", shard) for shard in range(self.index.num_shards))
        info = self._describe("features", {"encoder": self.encoder.fingerprint}, resize_px=mining.resize_px, crop_px=mining.crop_px)
        self._make(info, self._feature_writer(folder).write_images, partial(join_arrays, folder / "features.npy", parts))

    def _make_neighbors(self) -> None:
        features, exact = self.info("features"), len(self.index) <= self.exact_limit
        made_from = {"encoder": features.made_from["encoder"], "features": features.fingerprint}
        info = self._describe("neighbors", made_from, num_neighbors=self.num_neighbors, exact=exact)
        is_current = _serves(table_info(self.folder / "neighbors"), info)
        self.share.barrier()  # all have looked
        if is_current:
            log.info("neighbors: up to date")
        elif self.share.rank == 0:
            self._write_neighbors(info)
        self.share.barrier()

    def _write_neighbors(self, info: TableInfo) -> None:
        features, use_gpu = open_array(self.folder / "features", "features"), self.device.type == "cuda"
        found = find_neighbors(
            features, num_neighbors=self.num_neighbors, exact_limit=self.exact_limit, use_gpu=use_gpu, num_threads=self.num_workers
        )
        with (
            new_table(self.folder / "neighbors", info) as folder,
            array_writer(folder / "neighbors.npy") as write_neighbors,
            array_writer(folder / "similarities.npy") as write_similarities,
            progress("neighbors", total=len(features), unit="images") as advance,
        ):
            for block in found:
                write_neighbors(block.neighbors)
                write_similarities(block.similarities)
                advance(len(block.neighbors))

    def _make_proposals(self) -> None:
        mining, folder = self.config.mining, self.folder / "proposals"
        if mining.proposals == "coco-annotations":
            files = annotation_files(self.index, self.annotations)
            info = self._describe("proposals", {"annotations": digest_files(files)}, backend=mining.proposals)
            self._make(info, lambda shards, _: save_shards(folder, shards, object_boxes(self.index, files), index=self.index), last=COUNTS)
            return
        backend, seed = mining.proposals, mining.proposal_seed
        work = partial(propose_shards, folder, index=self.index, backend=backend, seed=seed, num_workers=self.num_workers)
        self._make(self._describe("proposals", {}, backend=backend, seed=seed), work, last=COUNTS)

    def _make_rois(self) -> None:
        folder, proposals = self.folder / "rois", self.folder / "proposals"
        limits = {name: getattr(self.config.mining, name) for name in ("min_side_px", "max_aspect", "max_iou", "max_rois")}
        work = partial(filter_shards, folder, index=self.index, source=proposals, limits=limits, num_threads=self.num_workers)
        info = self._describe("rois", {"proposals": self.info("proposals").fingerprint}, **limits)
        self._make(info, work, partial(join_boxes, folder, num_shards=self.index.num_shards), last=COUNTS)

    def _make_pairs(self) -> None:
        mining, compat, folder = self.config.mining, self.config.compat, self.folder / "pairs"
        neighbors, rois = self.info("neighbors"), self.info("rois")
        there = int(neighbors.settings["num_neighbors"])
        if there < self.num_neighbors:
            raise StaleError(
                f"{self.folder / 'neighbors'}: holds {there} neighbors, {self.num_neighbors} are asked for; "
                f"run orl-fast mine neighbors --neighbors {self.num_neighbors}"
            )
        made_from = {"encoder": self.encoder.fingerprint, "neighbors": neighbors.fingerprint, "rois": rois.fingerprint}
        sizes = {"roi_size_px": mining.roi_size_px, "num_neighbors": self.num_neighbors, "pair_ratio": mining.pair_ratio}
        info = self._describe("pairs", made_from, **sizes, compat=compat)
        found = table_info(folder)
        if found is not None and _serves(found, info):
            info = found
        else:
            self._make_roi_features(rois)
        table = BoxTable.open(self.folder / "rois")
        miner = PairMiner(
            folder=folder,
            index=self.index,
            rois=table,
            neighbors=NeighborTable.open(self.folder / "neighbors").neighbors[:, : self.num_neighbors],
            features=RoiFeatures(self.folder / "roi-features", self.index, table),
            pair_ratio=mining.pair_ratio,
            compat=compat,
            device=self.device,
        )
        self._make(info, miner.mine, miner.join)

    def _make_roi_features(self, rois: TableInfo) -> None:
        table = BoxTable.open(self.folder / "rois")
        work = partial(self._feature_writer(self.folder / "roi-features").write_rois, rois=table)
        made_from = {"encoder": self.encoder.fingerprint, "rois": rois.fingerprint}
        self._make(self._describe("roi-features", made_from, roi_size_px=self.config.mining.roi_size_px), work, rois=table)

    def _feature_writer(self, folder: Path) -> FeatureWriter:
        index, encoder, device = self.index, self.encoder, self.device
        return FeatureWriter(folder=folder, index=index, encoder=encoder, config=self.config, device=device, num_workers=self.num_workers)

    def _make_patches(self) -> None:
        folder, made_from = self.folder / "patches", {name: self.info(name).fingerprint for name in ("rois", "pairs")}
        rois, pairs = BoxTable.open(self.folder / "rois"), PairTable.open(self.folder / "pairs")
        work = partial(pack_shards, folder, index=self.index, rois=rois, pairs=pairs, num_workers=self.num_workers)
        finish = partial(join_patches, folder, num_shards=self.index.num_shards)
        self._make(self._describe("patches", made_from, side_px=PATCH_SIDE_PX), work, finish)

    def _describe(self, kind: str, made_from: dict[str, str], **settings: Any) -> TableInfo:
        return TableInfo(kind=kind, made_from={"index": self.index.fingerprint, **made_from}, settings=settings)

    def _make(
        self, info: TableInfo, work: Work, finish: Finish | None = None, *, last: str | None = None, rois: BoxTable | None = None
    ) -> None:
        """Make a table shard by shard, see `make_table`; `rois`: they are what progress counts."""
        size, unit = (len, "images") if rois is None else (rois.num_of, "RoIs")
        sizes = [size(self.index.shard_rows(shard)) for shard in range(self.index.num_shards)]
        make_table(self.folder / info.kind, info, work, finish, last=last or info.kind, sizes=sizes, unit=unit, share=self.share)

    def _imported_for(self, step: str) -> str | None:
        """The imported table that makes a step needless, checked as by `info`; None where there is none."""
        for name in _SPARED_BY.get(step, ()):
            found = table_info(self.folder / name)
            if found is None or IMPORTED not in found.settings or not (self.keep_imported or name == "neighbors"):
                continue
            there = int(self.info(name).settings.get("num_neighbors", self.num_neighbors))
            if there < self.num_neighbors:
                raise StaleError(
                    f"{self.folder / name}: imported with {there} neighbors, {self.num_neighbors} are asked for; "
                    f"use --neighbors {there}, or remove the folder and mine"
                )
            return name
        return None

    @contextmanager
    def _alone_here(self) -> Iterator[None]:
        """Hold the folder for this run, and keep its log in mine.log."""
        if self.share.rank > 0:
            yield
            return
        file = self.folder / "mine.log"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}); choose another folder with --out") from error
        try:
            with log_to_file(file), file.open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise DataError(f"{self.folder}: another orl-fast mine is writing here; wait for it to end") from error
                yield
        finally:
            if file.exists() and file.stat().st_size == 0:  # refused before anything was done: leave no trace
                file.unlink()
                with suppress(OSError):
                    self.folder.rmdir()


def _serves(found: TableInfo | None, wanted: TableInfo) -> bool:
    """Whether a table holds at least what is wanted, which is then a prefix of each of its entries (see `PairTable.limited`)."""
    if found is None:
        return False
    have = dict(found.settings)
    for name in {"num_neighbors", "pair_ratio"} & have.keys() & wanted.settings.keys():
        have[name] = min(have[name], wanted.settings[name])
    if have.get("compat") == "paper":  # a share of all entries includes the official share
        have["compat"] = wanted.settings["compat"]
    return replace(found, settings=have) == wanted
