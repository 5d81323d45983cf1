"""Recipes: TOML files with the sections of a configuration. Defaults, then a recipe, then `key=value` overrides, checked."""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError, create_model

from orl_fast.checkpoint import checkpoint_path, read_header
from orl_fast.config import Config
from orl_fast.errors import ConfigError
from orl_fast.methods import METHODS

_OWN: dict[str, Any] = {name: (method.Settings, method.Settings()) for name, method in METHODS.items() if method.Settings.model_fields}
_Full = create_model("Config", __base__=Config, **_OWN)
_RECIPES = Path(__file__).with_name("recipes")
_RENAMED = {"compat": "variant"}  # earlier names of keys


def load_config(recipe: str | Path | None = None, *, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a run; ConfigError if the recipe is missing or malformed, or a key or value is wrong (with the nearest key).

    Args:
        recipe: the name of a shipped recipe ("coco-r50", "tiny", …) or the path of a TOML file; None: the defaults.
        overrides: "train.epochs=2", or "epochs=2" where only one section has such a key.
    """
    values = _read_recipe(recipe) if recipe is not None else {}
    return with_overrides(config_from_dict(values, where=str(recipe)), overrides)


def trained_config(checkpoint: Path, *, recipe: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """The recipe's configuration; without one, that of the run of a checkpoint; the defaults where there is no checkpoint."""
    if recipe is not None or not checkpoint_path(checkpoint).exists():
        return load_config(recipe, overrides=overrides)
    header = read_header(checkpoint_path(checkpoint))
    return with_overrides(config_from_dict(header["config"], where=str(checkpoint)), overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of `config` with "key=value" pairs applied (see `load_config`)."""
    values = config_to_dict(config)
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--set {override}: write key=value, for example train.epochs=2")
        section, key = _find_key(name.strip())
        (values[section] if section else values)[key] = _parse_value(text.strip())
    return config_from_dict(values, where="--set")


def config_from_dict(values: Mapping[str, Any], *, where: str) -> Config:
    """Build a checked Config from nested mappings; unknown keys and wrong values are ConfigErrors that name `where`."""
    try:
        return _Full.model_validate({_RENAMED.get(key, key): value for key, value in values.items()})
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explained(error)}") from error


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars (JSON and TOML can hold them)."""
    return config.model_dump(mode="json")


def config_to_toml(config: Config) -> str:
    """The configuration as a recipe that reproduces it."""
    return tomli_w.dumps(config_to_dict(config))


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.toml"))


def _read_recipe(recipe: str | Path) -> dict[str, Any]:
    file = _RECIPES / f"{recipe}.toml" if str(recipe) in recipe_names() else Path(recipe)
    if not file.is_file():
        hint = difflib.get_close_matches(str(recipe), recipe_names(), n=1)
        known = f"did you mean {hint[0]!r}?" if hint else f"shipped recipes: {', '.join(recipe_names())}"
        raise ConfigError(f"recipe {str(recipe)!r}: neither a shipped recipe nor a TOML file; {known}")
    try:
        return tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {recipe}: not UTF-8 text ({error}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe}: not valid TOML ({error})") from error


def _keys() -> dict[str, list[str]]:
    """The keys of each section; none for a plain key."""
    return {name: list(getattr(field.annotation, "model_fields", ())) for name, field in _Full.model_fields.items()}


def _find_key(name: str) -> tuple[str, str]:
    """(section or "", key) of a dotted key, or of a bare one that only one section has."""
    name, sections = _RENAMED.get(name, name), _keys()
    if not sections.get(name, [""]):
        return "", name
    section, _, key = name.rpartition(".")
    if key in sections.get(section, ()):
        return section, key
    owners = [] if section else [owner for owner, keys in sections.items() if name in keys]
    if len(owners) == 1:
        return owners[0], name
    if owners:
        raise ConfigError(f"--set {name}: several sections have it; write one of {', '.join(f'{owner}.{name}' for owner in owners)}")
    raise ConfigError(f"--set {name}: no such key; {_suggest(name, _all_keys())}")


def _all_keys() -> list[str]:
    return [f"{section}.{key}" for section, keys in _keys().items() for key in keys] + [name for name, keys in _keys().items() if not keys]


def _suggest(name: str, known: Iterable[str]) -> str:
    """Name the nearest key; a bare name is compared with the last part of dotted keys."""
    by_tail = {key.rpartition(".")[2]: key for key in sorted(known)}
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    tail = difflib.get_close_matches(name.rpartition(".")[2], by_tail, n=1, cutoff=0.5)
    hit = close[0] if close else by_tail[tail[0]] if tail else None
    return f"did you mean {hit!r}?" if hit else f"known keys: {', '.join(sorted(known))}"


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string; (a, b) and a,b are lists."""
    candidate = text
    if text.startswith("(") and text.endswith(")"):
        candidate = f"[{text[1:-1]}]"
    elif "," in text and not text.startswith("["):
        candidate = f"[{text}]"
    try:
        return tomllib.loads(f"value = {candidate}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explained(error: ValidationError) -> str:
    """The first fault: key, value, and what to write instead."""
    fault = error.errors(include_url=False)[0]
    name, value = ".".join(str(part) for part in fault["loc"] if not isinstance(part, int)), fault["input"]
    if fault["type"] == "extra_forbidden":
        *section, key = fault["loc"]
        known = _keys()[str(section[0])] if section else [*_keys(), *_all_keys()]
        return f"unknown key {name!r}; {_suggest(str(key), known)}"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{name} is a section; write [{name}] and its keys below"
    message = str(fault["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] in ("tuple_type", "too_long", "missing"):
        message = "write two numbers, for example [0.5, 1.0]"
    if fault["type"] == "literal_error":
        choices = [choice.strip(" '") for choice in str(fault["ctx"]["expected"]).replace(" or ", ", ").split(",")]
        near = difflib.get_close_matches(str(value), choices, n=1)
        message += f"; did you mean {near[0]!r}?" if near else ""
    return f"{name}: {message}" if isinstance(value, dict) else f"{name} = {value!r}: {message}"
