"""The tables of stage 2 that a run draws its views from."""

from collections.abc import Mapping
from pathlib import Path

from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import StaleError
from orl_fast.models import load_encoder
from orl_fast.provenance import TableInfo, find_table, open_info, table_info
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.draw import Mined
from orl_fast.views.patches import PatchStore


def mined_overrides(mined: Path) -> list[str]:
    """What the pairs were mined with, as "key=value": the default of a new run whose recipe nobody named."""
    info = table_info(mined / "pairs")
    settings = info.settings if info else {}
    return [f"mining.{key}={settings[key]}" for key in ("num_neighbors", "pair_ratio") if key in settings]


def warn_if_mined_elsewhere(mined: Path, checkpoint: Path) -> None:
    """Warn where the pairs come from another encoder than this checkpoint's: trained again since, or mined from another run."""
    info = table_info(mined / "pairs")
    encoder = info.made_from.get("encoder") if info else None
    if encoder is not None and checkpoint.is_file() and load_encoder(checkpoint).fingerprint != encoder:
        log.warning("%s: mined from another encoder than %s; orl-fast mine renews the pairs", mined / "pairs", checkpoint)


def open_mined(index: ShardIndex, mined: Path, config: Config, *, recorded: Mapping[str, str] | None = None) -> Mined:
    """Open RoIs, pairs and patches, and limit the pairs to the neighbors and the ratio that the configuration asks for.

    Args:
        recorded: the fingerprints of the tables that a run began with; it is resumed with those, whatever was mined since.
    Raises:
        MissingStageError: nothing is mined yet. StaleError: mined from other images, less than asked for, or not there any more.
    """
    remedy = f"orl-fast mine {index.path}"
    folders = {kind: _folder(mined, kind, recorded) for kind in ("rois", "pairs", "patches")}
    made_from = {"index": index.fingerprint}
    info, rois_info = (open_info(folders[kind], kind, made_from=made_from, remedy=remedy) for kind in ("pairs", "rois"))
    if info.made_from.get("rois", rois_info.fingerprint) != rois_info.fingerprint:
        raise StaleError(f"{folders['pairs']}: made from RoIs {info.made_from['rois']}, they are {rois_info.fingerprint} now; run {remedy}")
    rois, pairs = BoxTable.open(folders["rois"]), PairTable.open(folders["pairs"])
    made_from = {"rois": rois_info.fingerprint, "pairs": info.fingerprint}
    with_patches = config.loader.use_patches and (recorded is None or "patches" in recorded)
    patches_info = table_info(folders["patches"]) if with_patches else None
    return Mined(
        rois=rois,
        pairs=_limited(pairs, rois, info, config),
        patches=PatchStore.open(folders["patches"], made_from=made_from) if patches_info else None,
        fingerprints=made_from | ({"patches": patches_info.fingerprint} if patches_info else {}),
    )


def _folder(mined: Path, kind: str, recorded: Mapping[str, str] | None) -> Path:
    if recorded is None or kind not in recorded:
        return mined / kind
    found = find_table(mined, kind, recorded[kind])
    if found is None:
        raise StaleError(
            f"{mined}: the {kind} that this run began with ({recorded[kind]}) are not there any more; mine them again with the same "
            "settings, or start from scratch with --restart"
        )
    return found


def _limited(pairs: PairTable, rois: BoxTable, info: TableInfo, config: Config) -> PairTable:
    """The pairs that mining with this configuration would have given."""
    # Few images have few neighbors: all that there are is as many as can be asked for.
    num_neighbors, pair_ratio = min(config.mining.num_neighbors, len(rois) - 1), config.mining.pair_ratio
    asked = {"num_neighbors": num_neighbors, "pair_ratio": pair_ratio, "compat": config.variant}
    if all(info.settings.get(name, value) == value for name, value in asked.items()) and num_neighbors == pairs.neighbors.shape[1]:
        return pairs
    return pairs.limited(rois, num_neighbors=num_neighbors, pair_ratio=pair_ratio, variant=config.variant)
