"""Which stage comes next, and what it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import StaleError
from orl_fast.models import load_encoder
from orl_fast.shards import ShardIndex
from orl_fast.tables import PairTable, RoiTable, TableInfo, open_info, table_info
from orl_fast.views.sources import PatchStore

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class Mined:
    """The tables of stage 2 that views are drawn from, with their fingerprints; partner patches where they were packed."""

    rois: RoiTable
    pairs: PairTable
    patches: PatchStore | None
    fingerprints: Mapping[str, str]


def next_method(index: ShardIndex, mined: Path) -> tuple[str, str]:
    """("byol" or "orl", why): ORL once pairs of these images are there.

    Raises:
        StaleError: there are pairs, but of other images.
    """
    if table_info(mined / "pairs") is None:
        return "byol", f"nothing is mined yet in {mined}"
    _open_pairs(index, mined)
    return "orl", f"pairs are there in {mined}"


def mined_overrides(mined: Path) -> list[str]:
    """What the pairs were mined with, as "key=value": the default of a run whose recipe nobody named."""
    info = table_info(mined / "pairs")
    settings = info.settings if info else {}
    return [f"mining.{key}={settings[key]}" for key in ("num_neighbors", "pair_ratio") if key in settings]


def warn_if_mined_elsewhere(mined: Path, checkpoint: Path) -> None:
    """Say so where the pairs come from another encoder than this checkpoint's: trained again since, or mined from another run."""
    info = table_info(mined / "pairs")
    encoder = info.made_from.get("encoder") if info else None
    if encoder is not None and checkpoint.is_file() and load_encoder(checkpoint).fingerprint != encoder:
        log.warning("%s: mined from another encoder than %s; orl-fast mine renews the pairs", mined / "pairs", checkpoint)


def open_mined(index: ShardIndex, mined: Path, config: Config) -> Mined:
    """Open RoIs and pairs, and limit the pairs to the neighbors and the ratio that the configuration asks for.

    Raises:
        MissingStageError: nothing is mined yet. StaleError: mined from other images, or less than asked for.
    """
    info = _open_pairs(index, mined)
    remedy = f"orl-fast mine {index.path}"
    rois_info = open_info(mined / "rois", "rois", made_from={"index": index.fingerprint}, remedy=remedy)
    if info.made_from.get("rois", rois_info.fingerprint) != rois_info.fingerprint:
        raise StaleError(f"{mined / 'pairs'}: made from RoIs {info.made_from['rois']}, they are {rois_info.fingerprint} now; run {remedy}")
    rois, pairs = RoiTable.open(mined / "rois"), PairTable.open(mined / "pairs")
    made_from = {"rois": rois_info.fingerprint, "pairs": info.fingerprint}
    patches_info = table_info(mined / "patches") if config.loader.use_patches else None
    return Mined(
        rois=rois,
        pairs=_limited(pairs, rois, info, config, where=mined / "pairs", remedy=remedy),
        patches=PatchStore.open(mined / "patches", made_from=made_from) if patches_info else None,
        fingerprints=made_from | ({"patches": patches_info.fingerprint} if patches_info else {}),
    )


def _open_pairs(index: ShardIndex, mined: Path) -> TableInfo:
    return open_info(mined / "pairs", "pairs", made_from={"index": index.fingerprint}, remedy=f"orl-fast mine {index.path}")


def _limited(pairs: PairTable, rois: RoiTable, info: TableInfo, config: Config, *, where: Path, remedy: str) -> PairTable:
    """The pairs that mining with this configuration would have given, where the table holds at least those."""
    ratio, compat = info.settings.get("pair_ratio", config.mining.pair_ratio), info.settings.get("compat", config.compat)
    found = {"num_neighbors": pairs.neighbors.shape[1], "pair_ratio": ratio, "compat": compat}
    # Few images have few neighbors: all that there are is as many as can be asked for.
    num_neighbors = min(config.mining.num_neighbors, pairs.neighbors.shape[0] - 1)
    wanted = {"num_neighbors": num_neighbors, "pair_ratio": config.mining.pair_ratio, "compat": config.compat}
    if wanted == found:
        return pairs
    fewer_pairs = config.mining.pair_ratio > ratio or (compat, config.compat) == ("official", "paper")
    if num_neighbors > pairs.neighbors.shape[1] or fewer_pairs:
        raise StaleError(f"{where}: mined with {found}, this run asks for {wanted}; run {remedy} with these settings, or train with those")
    log.info("of the pairs mined with %s, those that %s gives are used", found, wanted)
    return pairs.limited(rois, num_neighbors=num_neighbors, pair_ratio=config.mining.pair_ratio, compat=config.compat)
