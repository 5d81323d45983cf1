"""Which run a command is about: its method, configuration, folder and tables."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orl_fast.checkpoint import CHECKPOINT
from orl_fast.config import Config
from orl_fast.errors import ConfigError
from orl_fast.methods import METHODS
from orl_fast.places import mined_folder, run_folder, stage_1_checkpoint
from orl_fast.provenance import open_info, table_info
from orl_fast.recipe import config_from_dict, load_config, with_overrides
from orl_fast.shards import ShardIndex
from orl_fast.train.mined import mined_overrides, open_mined, warn_if_mined_elsewhere
from orl_fast.train.saving import earlier_run
from orl_fast.views.draw import Mined

RECIPE = "recipe.toml"
_STAGES = {"byol": "stage 1, BYOL", "orl": "stage 3, ORL"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run to start or to resume. `mined` holds the tables that its views are cut from, where its method needs them."""

    method: str
    config: Config
    folder: Path
    mined: Mined | None


def choose_run(
    index: ShardIndex,
    *,
    method: str | None = None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    mined: Path | None = None,
    restart: bool = False,
    announce: Callable[..., None],
) -> Run:
    """The run that a command names, completed by what lies on disk.

    An earlier run in the folder is resumed with its own configuration and tables. A new one takes the recipe of stage 1 where it draws
    from mined pairs, else its method's, with the neighbors and the ratio that the pairs were mined with.

    Args:
        method: by default the stage that comes next. recipe: a shipped one or a TOML file. overrides: "key=value".
        folder: by default runs/NAME/METHOD. mined: by default SHARDS/mined.
        announce: receives what was chosen, and why, as log messages.
    Raises:
        ConfigError, MissingStageError, StaleError: see `load_config` and `open_mined`.
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
        announce("configuration: of the run in %s%s", folder, _with(overrides))
    else:
        if recipe is None:
            recipe, inherited = _default_recipe(method, index, mined)
            overrides = [*inherited, *overrides]
        config = load_config(recipe, overrides=overrides)
        announce("recipe: %s%s", recipe, _with(overrides))
    recorded: Mapping[str, Any] | None = earlier["mined"] if earlier is not None and earlier["method"] == method else None
    tables = open_mined(index, mined, config, recorded=recorded) if needs_pairs(method, config) else None
    return Run(method=method, config=config, folder=folder, mined=tables)


def next_method(index: ShardIndex, mined: Path) -> tuple[str, str]:
    """("byol" or "orl", why): ORL once pairs of these images are there.

    Raises:
        StaleError: there are pairs, but of other images.
    """
    if table_info(mined / "pairs") is None:
        return "byol", f"nothing is mined yet in {mined}"
    open_info(mined / "pairs", "pairs", made_from={"index": index.fingerprint}, remedy=f"orl-fast mine {index.path}")
    return "orl", f"pairs are there in {mined}"


def needs_pairs(method: str, config: Config) -> bool:
    """Whether some view of the method is cut from mined RoIs or pairs."""
    return any(spec.needs_rois for spec in METHODS[method].views(config))


def _default_recipe(method: str, index: ShardIndex, mined: Path) -> tuple[str, list[str]]:
    """The recipe of a new run, and the overrides that come from what was mined."""
    if not needs_pairs(method, Config()):
        return METHODS[method].recipe, []
    stage_1 = stage_1_checkpoint(index.path).parent / RECIPE
    return str(stage_1) if stage_1.is_file() else METHODS[method].recipe, mined_overrides(mined)


def _with(overrides: Sequence[str]) -> str:
    return f", with {', '.join(overrides)}" if overrides else ""
