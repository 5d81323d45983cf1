"""What can be configured, with the paper's numbers as defaults; a recipe (TOML) and `--set key=value` override them.

Defaults are stage 1 and stage 3 of ORL for a ResNet-50 on COCO, as the published tables were produced (`compat = "official"`).
"""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from orl_fast.errors import ConfigError

Compat = Literal["official", "paper"]
Renderer = Literal["auto", "cpu", "gpu", "reference", "dali-cpu"]
RENDERERS: tuple[str, ...] = typing.get_args(Renderer)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True)
class Range:
    """What a number, or each number of a pair, may be; a pair must ascend where `ascending`."""

    low: float = 0
    high: float = math.inf
    above: bool = False  # the low end itself is not allowed
    ascending: bool = False

    def check(self, value: Any, name: str) -> None:
        parts = value if isinstance(value, tuple) else (value,)
        wording = f"use {'above ' if self.above else ''}{self.low:g}" + (" or more" if self.high == math.inf else f" to {self.high:g}")
        _check(
            all(self.low <= part <= self.high and not (self.above and part == self.low) for part in parts), f"{name} = {value}: {wording}"
        )
        _check(not self.ascending or list(parts) == sorted(parts), f"{name} = {value}: write the smaller number first")


Count = Annotated[int, Range(1)]
SizePx = Annotated[int, Range(8, 2048)]
Prob = Annotated[float, Range(0, 1)]
ProbPair = Annotated[tuple[float, float], Range(0, 1)]
Span = Annotated[tuple[float, float], Range(above=True, ascending=True)]
Weight = Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


class _Section:
    """Checks every field that is annotated with a Range."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            for limit in getattr(hint, "__metadata__", ()):
                limit.check(getattr(self, name), f"{section}.{name}")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(_Section):
    """How views are drawn (paper, appendix A). Probabilities hold two values: for the first view and for the second."""

    image_size_px: SizePx = 224
    patch_size_px: SizePx = 96
    crop_area: Annotated[tuple[float, float], Range(0, 1, above=True, ascending=True)] = (0.08, 1.0)
    crop_aspect: Span = (3 / 4, 4 / 3)
    flip_prob: Prob = 0.5
    jitter_prob: Prob = 0.8
    brightness: Prob = 0.4
    contrast: Prob = 0.4
    saturation: Prob = 0.2
    hue: Annotated[float, Range(0, 0.5)] = 0.1  # turns
    grayscale_prob: Prob = 0.2
    blur_sigma_px: Annotated[tuple[float, float], Range(0, 8, above=True, ascending=True)] = (0.1, 2.0)
    blur_prob: ProbPair = (1.0, 0.1)
    solarize_prob: ProbPair = (0.0, 0.2)
    roi_shift: Prob = 0.5  # of the RoI's sides, to either side
    roi_area: Span = (0.5, 2.0)  # of the RoI's area
    roi_aspect: Span = (0.5, 2.0)  # absolute, not relative to the RoI's own
    roi_min_iou: Prob = 0.5  # not asked for with compat = "paper"
    roi_attempts: Count = 200


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """Backbone (any torchvision classifier that gives a feature map) and the widths of the heads."""

    backbone: str = "resnet50"
    projector_hidden: Count = 4096
    projector_out: Count = 256
    predictor_hidden: Count = 4096


@dataclass(frozen=True, kw_only=True)
class OrlConfig(_Section):
    """Loss weights of the three terms (paper, equation 5). A term whose weight is 0 is neither drawn nor computed."""

    image_weight: Weight = 1.0
    intra_weight: Weight = 1.0
    inter_weight: Weight = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        some = any((self.image_weight, self.intra_weight, self.inter_weight))
        _check(some, "orl: image_weight, intra_weight and inter_weight are all 0, so nothing would be learnt; set one")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Section):
    """SGD with linear warm-up and cosine decay, and the momentum of the target network."""

    lr_per_256: Annotated[float, Range(0, above=True)] = 0.2  # learning rate = lr_per_256 * global batch / 256
    momentum: Prob = 0.9
    weight_decay: Weight = 1e-4  # on all parameters, batch norm and biases included
    warmup_epochs: Weight = 4.0
    cosine: Literal["epoch", "step"] = "epoch"  # the reference steps its cosine once per epoch
    ema_momentum: Prob = 0.99  # at step 0; rises to 1 at the last step


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """The run: length, batch, numerics, checkpoints and logs."""

    epochs: Count = 800
    batch_size: Count = 512  # global: over all ranks and accumulated micro-batches
    accumulate: Count = 1  # micro-batches per optimizer step and rank
    seed: Seed = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on the CPU
    channels_last: bool = True
    compile: bool = False
    sync_bn: bool = True  # batch statistics over all ranks
    joined_views: bool = False  # one forward pass per view size; departs from the paper: batch statistics are shared by both views
    log_every_steps: Count = 50
    checkpoint_every_epochs: Count = 10
    keep_every_epochs: Annotated[int, Range(0)] = 0  # also keep epoch-NNNN.pt this often; 0: only the latest

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = self.batch_size % self.accumulate
        _check(not odd, f"train.batch_size = {self.batch_size} is not a multiple of train.accumulate = {self.accumulate}; change one")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(_Section):
    """Who renders the views and with how many hands. Nothing here changes what is rendered, only how fast."""

    renderer: Renderer = "auto"
    num_threads: Annotated[int, Range(0)] = 0  # 0: the cores of this process, shared among its node's ranks
    prefetch: Count = 2  # batches rendered ahead
    hw_decoder_load: Prob = 0.65  # share of JPEGs for the GPU's hardware decoder
    use_patches: bool = True  # partner patches from patches-*.tar where they were packed


@dataclass(frozen=True, kw_only=True)
class MiningConfig(_Section):
    """Stage 2: correspondence discovery (paper, section 3.2; appendix B)."""

    resize_px: SizePx = 256  # image features: Resize, then CenterCrop
    crop_px: SizePx = 224
    num_neighbors: Count = 10
    proposals: Literal["fast", "opencv", "coco-annotations"] = "fast"
    min_side_px: Count = 96
    max_aspect: Annotated[float, Range(1)] = 3.0
    max_iou: Prob = 0.5
    max_rois: Count = 100
    roi_size_px: SizePx = 224  # RoI features
    pair_ratio: Annotated[float, Range(0, 1, above=True)] = 0.1
    encode_batch: Count = 256  # views encoded at once
    proposal_seed: Seed = 0  # of the order of proposals

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.crop_px <= self.resize_px, f"mining.crop_px = {self.crop_px} exceeds mining.resize_px = {self.resize_px}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run's whole configuration; a recipe's sections bear these names."""

    compat: Compat = "official"  # "paper": pairs are a share of all entries, jittered RoIs need no overlap, cosine per step
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    orl: OrlConfig = field(default_factory=OrlConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)


def load_config(recipe: str | Path | None = None, *, overrides: Iterable[str] = ()) -> Config:
    """Defaults, then a recipe, then `key=value` overrides, checked.

    Args:
        recipe: the name of a shipped recipe ("coco-r50", "tiny", …) or the path of a TOML file; None: the defaults.
        overrides: "train.epochs=2", or "epochs=2" where only one section has such a key.
    Raises:
        ConfigError: the recipe is missing or malformed, or a key or value cannot be used; the nearest key is suggested.
    """
    values = _read_recipe(recipe) if recipe is not None else {}
    return with_overrides(config_from_dict(values, where=str(recipe)), overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """A copy of `config` with "key=value" pairs applied (see `load_config`)."""
    values = config_to_dict(config)
    for override in overrides:
        name, separator, text = override.partition("=")
        _check(bool(separator) and bool(name.strip()), f"--set {override}: write key=value, for example train.epochs=2")
        section, key = _find_key(name.strip())
        target = values[section] if section else values
        target[key] = _parse_value(text.strip())
    return config_from_dict(values, where="--set")


def config_from_dict(values: Mapping[str, Any], *, where: str) -> Config:
    """Build a checked Config from nested mappings; unknown keys and wrong types are ConfigErrors that name `where`."""
    return typing.cast(Config, _build(Config, values, where=where, prefix=""))


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, lists and scalars (JSON and TOML can hold them)."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def config_to_toml(config: Config) -> str:
    """The configuration as a recipe that reproduces it."""
    lines: list[str] = []
    values = config_to_dict(config)
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for section, entries in values.items():
        if isinstance(entries, dict):
            lines += ["", f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("orl_fast") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def digest(value: Any) -> str:
    """A short fingerprint of plain data (dicts, lists, scalars), the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _read_recipe(recipe: str | Path) -> dict[str, Any]:
    text: str
    if str(recipe) in recipe_names():
        text = (resources.files("orl_fast") / "recipes" / f"{recipe}.toml").read_text()
    elif Path(recipe).is_file():
        text = Path(recipe).read_text()
    else:
        hint = difflib.get_close_matches(str(recipe), recipe_names(), n=1)
        known = f"did you mean {hint[0]!r}?" if hint else f"shipped recipes: {', '.join(recipe_names())}"
        raise ConfigError(f"recipe {str(recipe)!r}: neither a shipped recipe nor a TOML file; {known}")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {recipe}: not valid TOML ({error})") from error


def _sections() -> dict[str, list[str]]:
    hints = typing.get_type_hints(Config)
    return {
        name: [entry.name for entry in dataclasses.fields(hint)] if dataclasses.is_dataclass(hint) else [] for name, hint in hints.items()
    }


def _find_key(name: str) -> tuple[str, str]:
    """(section or "", key) of a dotted key, or of a bare one that only one section has."""
    sections = _sections()
    dotted = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    plain = {section for section, keys in sections.items() if not keys}
    if name in plain:
        return "", name
    if name in dotted:
        section, key = name.split(".")
        return section, key
    owners = [section for section, keys in sections.items() if name in keys]
    if len(owners) == 1:
        return owners[0], name
    _check(not owners, f"--set {name}: several sections have it; write one of {', '.join(f'{o}.{name}' for o in owners)}")
    raise ConfigError(f"--set {name}: no such key; {_suggest(name, dotted | plain)}")


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


def _build(kind: Any, values: Mapping[str, Any], *, where: str, prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            known = hints if prefix else {*hints, *(f"{s}.{k}" for s, keys in _sections().items() for k in keys)}
            raise ConfigError(f"{where}: unknown key {prefix + key!r}; {_suggest(key, known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            _check(isinstance(value, Mapping), f"{where}: {prefix + key} is a section; write [{key}] and its keys below")
            arguments[key] = _build(hint, value, where=where, prefix=f"{key}.")
        else:
            arguments[key] = _coerce(value, hint, name=f"{where}: {prefix}{key}")
    return kind(**arguments)


def _coerce(value: Any, hint: Any, *, name: str) -> Any:
    """Check one value against its annotation; an int serves as a float, a list as a tuple."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        hint_text = ", ".join(map(repr, args))
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        _check(value in args, f"{name} = {value!r}: use one of {hint_text}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return value
    if origin is tuple:
        ok = isinstance(value, list | tuple) and len(value) == len(args)
        _check(ok, f"{name} = {value!r}: use {len(args)} numbers, for example [{', '.join('0.5' for _ in args)}]")
        return tuple(_coerce(part, arg, name=name) for part, arg in zip(value, args, strict=True))
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, args[0], name=name)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        _check(math.isfinite(value), f"{name} = {value!r}: use a finite number")
        return float(value)
    _check(isinstance(value, hint) and (hint is bool or not isinstance(value, bool)), f"{name} = {value!r}: use {hint.__name__}")
    return value
