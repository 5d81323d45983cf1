"""Which run a command is about: its method, configuration, folder and tables of stage 2; and resuming it from its checkpoints alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

import orl_fast
from orl_fast.checkpoint import CHECKPOINT, earlier_run, readable_checkpoints
from orl_fast.config import Config
from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError, StaleError
from orl_fast.methods import METHODS, Method
from orl_fast.models import load_encoder
from orl_fast.places import mined_folder, run_folder, stage_1_checkpoint
from orl_fast.recipe import config_from_dict, config_to_dict, load_config, with_overrides
from orl_fast.shards import ShardIndex
from orl_fast.tables import BoxTable, PairTable, TableInfo, find_table, open_info, table_info
from orl_fast.views.draw import Mined
from orl_fast.views.patches import PatchStore

RECIPE = "recipe.toml"
# What may change between the parts of a run, since it changes no result. The renderer, and patches, have checks of their own.
_FREE = {
    *("train.log_every_steps", "train.checkpoint_every_epochs", "train.checkpoint_every_min", "train.keep_every_epochs"),
    *(f"loader.{key}" for key in ("renderer", "num_threads", "prefetch", "source", "pixels", "pixels_dir", "use_patches")),
}
_LIMITS = {"mining.num_neighbors", "mining.pair_ratio"}  # of the mined pairs in use; the rest of `mining` is in the tables' fingerprints
_REMEDY = "start from scratch with --restart, or use another folder with --out"
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


def run_header(run: Run, method: Method, *, index: str, renderer: str, num_steps: int) -> dict[str, Any]:
    """What makes this run this run: the header of its checkpoints (see `orl_fast.checkpoint`), before the first step."""
    prefix = next(name for name, module in method.named_modules() if module is method.online)
    return {
        "method": run.method,
        "step": 0,
        "num_steps": num_steps,
        "encoder": {**method.online.description, "prefix": f"{prefix}."},
        "config": config_to_dict(run.config),
        "index": index,
        "mined": dict(run.mined.fingerprints) if run.mined else {},
        "renderer": renderer,
        "versions": {
            "orl-fast": orl_fast.__version__,
            "torch": torch.__version__.split("+")[0],
            "torchvision": torchvision.__version__.split("+")[0],
        },
    }


def restore(folder: Path, header: Mapping[str, Any], *, method: Method, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest state that is not damaged into method and optimizer; returns the steps done, 0 where there is none.

    StaleError if the checkpoint is of a run with another header, DataError if both checkpoints are damaged.
    """
    for values, path in readable_checkpoints(folder):
        _check_same_run(path, values, header)
        try:
            method.load_state_dict(values["model"])
            optimizer.load_state_dict(values["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise DataError(f"{path}: does not fit the model ({str(error).splitlines()[0]}); train again with --restart") from error
        return int(values["step"])
    return 0


def _check_same_run(path: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if then["method"] != now["method"]:
        raise StaleError(f"{path}: holds a {then['method']} run, this is {now['method']}; {_REMEDY}")
    if then["index"] != now["index"]:
        raise StaleError(f"{path}: trained on shards {then['index']}, these are {now['index']}; {_REMEDY}")
    for name in sorted(then["mined"].keys() | now["mined"].keys()):
        if then["mined"].get(name) != now["mined"].get(name):
            raise StaleError(f"{path}: trained with {name} {then['mined'].get(name)}, now {now['mined'].get(name)}; {_REMEDY}")
    if then["renderer"] != now["renderer"]:
        how = f"its views are rendered by {then['renderer']}, {now['renderer']} is asked for"
        raise StaleError(f"{path}: {how}; leave --renderer out, or {_REMEDY}")
    try:
        recorded = _flat(config_to_dict(config_from_dict(then["config"], where=str(path))))
    except ConfigError as error:
        raise StaleError(f"{path}: its configuration is of another version of orl-fast ({error}); {_REMEDY}") from error
    asked = _flat(now["config"])
    changed = [
        f"{key} = {recorded[key]} then, {asked[key]} now" for key in recorded if recorded[key] != asked[key] and not _is_free(key, now)
    ]
    if changed:
        raise StaleError(f"{path}: the run was configured differently ({'; '.join(changed)}); {_REMEDY}")
    for name, version in now["versions"].items():
        former = then["versions"].get(name)
        if former != version:
            log.warning("%s: written by %s %s, this is %s; results may differ in last digits", path, name, former, version)


def _is_free(key: str, header: Mapping[str, Any]) -> bool:
    if key.startswith("mining."):
        return not header["mined"] or key not in _LIMITS
    return key in _FREE or (key == "loader.hw_decoder_load" and header["renderer"] != "gpu")


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if isinstance(value, dict) else {name: value}
    return flat
