"""Which run a command is about: its method, configuration, folder, and the tables of stage 2 that its views are cut from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orl_fast.checkpoint import CHECKPOINT
from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import ConfigError, StaleError
from orl_fast.methods import METHODS
from orl_fast.models import load_encoder
from orl_fast.places import mined_folder, run_folder, stage_1_checkpoint
from orl_fast.recipe import config_from_dict, load_config, with_overrides
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, PairTable, TableInfo, find_table, open_info, table_info
from orl_fast.train.saving import earlier_run
from orl_fast.views.mined import Mined
from orl_fast.views.patches import PatchStore

RECIPE = "recipe.toml"
_STAGES = {"byol": "stage 1, BYOL", "orl": "stage 3, ORL"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to start or to resume. `mined` holds the tables that its views are cut from, where its method needs them."""

    method: str
    config: Config
    folder: Path
    mined: Mined | None = None


def choose_run(
    index: ShardIndex,
    *,
    method: str | None = None,  # by default the stage that comes next
    recipe: str | None = None,  # a shipped one or a TOML file
    overrides: Sequence[str] = (),  # "key=value"
    folder: Path | None = None,  # by default runs/NAME/METHOD
    mined: Path | None = None,  # by default SHARDS/mined
    restart: bool = False,
    announce: Callable[..., None],  # receives what was chosen, and why, as log messages
) -> Run:
    """The run that a command names, completed by what lies on disk.

    An earlier run in the folder is resumed with its own configuration and tables. A new one takes the recipe of stage 1 where it draws from
    mined pairs, else its method's, with the neighbors and the ratio of the mined pairs. Raises as `load_config` and `open_mined`.
    """
    mined = mined or mined_folder(index.path)
    if method is None:
        method, reason = next_method(index, mined)
        announce("%s: %s", _STAGES[method], reason)
        if method == "orl":
            warn_if_mined_elsewhere(mined, stage_1_checkpoint(index.path))
    if method not in METHODS:
        raise ConfigError(f"--method {method}: use one of {', '.join(METHODS)}")
    folder = folder or run_folder(index.path, method)
    earlier = None if restart else earlier_run(folder)
    if recipe is None and earlier is not None:
        config = with_overrides(config_from_dict(earlier["config"], where=str(folder / CHECKPOINT)), overrides)
        origin = f"configuration: of the run in {folder}"
    else:
        if recipe is None:
            recipe = METHODS[method].recipe
            if needs_pairs(method, Config()):
                stage_1 = stage_1_checkpoint(index.path).parent / RECIPE
                recipe = str(stage_1) if stage_1.is_file() else recipe
                overrides = [*mined_overrides(mined), *overrides]
        config = load_config(recipe, overrides=overrides)
        origin = f"recipe: {recipe}"
    announce("%s%s", origin, f", with {', '.join(overrides)}" if overrides else "")
    recorded: Mapping[str, Any] | None = earlier["mined"] if earlier is not None and earlier["method"] == method else None
    tables = open_mined(index, mined, config, recorded=recorded) if needs_pairs(method, config) else None
    return Run(method=method, config=config, folder=folder, mined=tables)


def next_method(index: ShardIndex, mined: Path) -> tuple[str, str]:
    """("byol" or "orl", why): ORL once pairs of these images are there; StaleError if they are of other images."""
    if table_info(mined / "pairs") is None:
        return "byol", f"nothing is mined yet in {mined}"
    open_info(mined / "pairs", "pairs", made_from={"index": index.fingerprint}, remedy=f"orl-fast mine {index.path}")
    return "orl", f"pairs are there in {mined}"


def needs_pairs(method: str, config: Config) -> bool:
    """Whether some view of the method is cut from mined RoIs or pairs."""
    return any(spec.needs_rois for spec in METHODS[method].views(config))


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

    A run is resumed with the tables that it began with, whose fingerprints are `recorded`, whatever was mined since. MissingStageError if
    nothing is mined yet; StaleError if mined from other images, less than asked for, or not there any more.
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
