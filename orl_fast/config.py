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
from typing import Any, Literal

from orl_fast.errors import ConfigError

Compat = Literal["official", "paper"]
RENDERERS = ("auto", "cpu", "gpu", "reference", "dali-cpu")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """How views are drawn (paper, appendix A). Probabilities and ranges hold two values: (first view, second view)."""

    image_size_px: int = 224
    patch_size_px: int = 96
    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip_prob: float = 0.5
    jitter_prob: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_prob: float = 0.2
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    blur_prob: tuple[float, float] = (1.0, 0.1)
    solarize_prob: tuple[float, float] = (0.0, 0.2)
    roi_shift: float = 0.5  # of the RoI's sides, to either side
    roi_area: tuple[float, float] = (0.5, 2.0)  # of the RoI's area
    roi_aspect: tuple[float, float] = (0.5, 2.0)  # absolute, not relative to the RoI's own
    roi_min_iou: float = 0.5  # not asked for with compat = "paper"
    roi_attempts: int = 200

    def __post_init__(self) -> None:
        _check(8 <= self.image_size_px <= 2048, f"views.image_size_px = {self.image_size_px}: use 8 to 2048 px")
        _check(8 <= self.patch_size_px <= 2048, f"views.patch_size_px = {self.patch_size_px}: use 8 to 2048 px")
        for name in ("flip_prob", "jitter_prob", "grayscale_prob", "blur_prob", "solarize_prob", "roi_min_iou"):
            value = getattr(self, name)
            parts = value if isinstance(value, tuple) else (value,)
            _check(all(0 <= part <= 1 for part in parts), f"views.{name} = {value}: use 0 to 1")
        for name in ("crop_area", "crop_aspect", "roi_area", "roi_aspect", "blur_sigma_px"):
            low, high = getattr(self, name)
            _check(0 < low <= high, f"views.{name} = {(low, high)}: use two positive numbers, the smaller first")
        _check(self.crop_area[1] <= 1, f"views.crop_area = {self.crop_area}: a crop cannot exceed the image (1.0)")
        for name in ("brightness", "contrast", "saturation", "roi_shift"):
            _check(0 <= getattr(self, name) <= 1, f"views.{name} = {getattr(self, name)}: use 0 to 1")
        _check(0 <= self.hue <= 0.5, f"views.hue = {self.hue}: use 0 to 0.5 turns")
        _check(self.blur_sigma_px[1] <= 8, f"views.blur_sigma_px = {self.blur_sigma_px}: use at most 8 px")
        _check(self.roi_attempts >= 1, f"views.roi_attempts = {self.roi_attempts}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone (any torchvision classifier that gives a feature map) and the widths of the heads."""

    backbone: str = "resnet50"
    projector_hidden: int = 4096
    projector_out: int = 256
    predictor_hidden: int = 4096

    def __post_init__(self) -> None:
        for name in ("projector_hidden", "projector_out", "predictor_hidden"):
            _check(getattr(self, name) >= 1, f"model.{name} = {getattr(self, name)}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class OrlConfig:
    """Loss weights of the three terms (paper, equation 5). A term whose weight is 0 is neither drawn nor computed."""

    image_weight: float = 1.0
    intra_weight: float = 1.0
    inter_weight: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.image_weight, self.intra_weight, self.inter_weight)
        _check(all(weight >= 0 for weight in weights), f"orl: weights {weights} must not be negative")
        _check(any(weights), "orl: image_weight, intra_weight and inter_weight are all 0, so nothing would be learnt; set one")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD with linear warm-up and cosine decay, and the momentum of the target network."""

    lr_per_256: float = 0.2  # learning rate = lr_per_256 * global batch / 256
    momentum: float = 0.9
    weight_decay: float = 1e-4  # on all parameters, batch norm and biases included
    warmup_epochs: float = 4.0
    cosine: Literal["epoch", "step"] = "epoch"  # the reference steps its cosine once per epoch
    ema_momentum: float = 0.99  # at step 0; rises to 1 at the last step

    def __post_init__(self) -> None:
        _check(self.lr_per_256 > 0, f"optim.lr_per_256 = {self.lr_per_256}: use a positive number")
        _check(0 <= self.momentum < 1, f"optim.momentum = {self.momentum}: use 0 to below 1")
        _check(self.weight_decay >= 0, f"optim.weight_decay = {self.weight_decay}: use 0 or more")
        _check(self.warmup_epochs >= 0, f"optim.warmup_epochs = {self.warmup_epochs}: use 0 or more")
        _check(0 <= self.ema_momentum <= 1, f"optim.ema_momentum = {self.ema_momentum}: use 0 to 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run: length, batch, numerics, checkpoints and logs."""

    epochs: int = 800
    batch_size: int = 512  # global: over all ranks and accumulated micro-batches
    accumulate: int = 1  # micro-batches per optimiser step and rank
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on the CPU
    channels_last: bool = True
    compile: bool = False
    sync_bn: bool = True  # batch statistics over all ranks
    joined_views: bool = False  # one forward pass per view size; departs from the paper: batch statistics are shared by both views
    log_every_steps: int = 50
    checkpoint_every_epochs: int = 10
    keep_every_epochs: int = 0  # also keep epoch-NNNN.pt this often; 0: only the latest

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every_steps", "checkpoint_every_epochs"):
            _check(getattr(self, name) >= 1, f"train.{name} = {getattr(self, name)}: use 1 or more")
        _check(self.keep_every_epochs >= 0, f"train.keep_every_epochs = {self.keep_every_epochs}: use 0 or more")
        _check(0 <= self.seed < 2**32, f"train.seed = {self.seed}: use 0 to 2**32 - 1")
        _check(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size = {self.batch_size} is not a multiple of train.accumulate = {self.accumulate}; change one",
        )


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Who renders the views and with how many hands. Nothing here changes what is rendered, only how fast."""

    renderer: Literal["auto", "cpu", "gpu", "reference", "dali-cpu"] = "auto"
    num_threads: int = 0  # 0: the cores of this process, shared among its node's ranks
    prefetch: int = 2  # batches rendered ahead
    hw_decoder_load: float = 0.65  # share of JPEGs for the GPU's hardware decoder
    use_patches: bool = True  # partner patches from patches-*.tar where they were packed

    def __post_init__(self) -> None:
        _check(self.num_threads >= 0, f"loader.num_threads = {self.num_threads}: use 0 (automatic) or more")
        _check(self.prefetch >= 1, f"loader.prefetch = {self.prefetch}: use 1 or more")
        _check(0 <= self.hw_decoder_load <= 1, f"loader.hw_decoder_load = {self.hw_decoder_load}: use 0 to 1")


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Stage 2: correspondence discovery (paper, section 3.2; appendix B)."""

    resize_px: int = 256  # image features: Resize, then CenterCrop
    crop_px: int = 224
    num_neighbors: int = 10
    proposals: Literal["fast", "opencv", "coco-annotations"] = "fast"
    min_side_px: int = 96
    max_aspect: float = 3.0
    max_iou: float = 0.5
    max_rois: int = 100
    roi_size_px: int = 224  # RoI features
    pair_ratio: float = 0.1
    encode_batch: int = 256  # views encoded at once
    proposal_seed: int = 0  # of the order of proposals

    def __post_init__(self) -> None:
        for name in ("resize_px", "crop_px", "num_neighbors", "min_side_px", "max_rois", "roi_size_px", "encode_batch"):
            _check(getattr(self, name) >= 1, f"mining.{name} = {getattr(self, name)}: use 1 or more")
        _check(self.crop_px <= self.resize_px, f"mining.crop_px = {self.crop_px} exceeds mining.resize_px = {self.resize_px}")
        _check(self.max_aspect >= 1, f"mining.max_aspect = {self.max_aspect}: use 1 or more")
        _check(0 <= self.max_iou <= 1, f"mining.max_iou = {self.max_iou}: use 0 to 1")
        _check(0 < self.pair_ratio <= 1, f"mining.pair_ratio = {self.pair_ratio}: use above 0 to 1")
        _check(0 <= self.proposal_seed < 2**32, f"mining.proposal_seed = {self.proposal_seed}: use 0 to 2**32 - 1")


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
