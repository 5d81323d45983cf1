"""Backbones out of files that other toolkits wrote: their names are matched with those of an architecture, and nothing is left to chance.

A file may hold several networks (student and teacher, query and key encoder) in nested containers under prefixes; where the backbone
lies is found by the names and shapes that match. A backbone is whole or refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from orl_fast.console import log
from orl_fast.errors import ConfigError, DataError
from orl_fast.models.backbone import TIMM, Backbone, TimmBackbone, build_backbone, resnet_skeletons
from orl_fast.models.encoder import Encoder
from orl_fast.models.weights_file import WeightsFile, read_weights

ARCHITECTURE = "architecture"  # of the metadata of safetensors that `orl-fast export` writes
_COUNTER = "num_batches_tracked"  # of batch norm; features do not depend on it, and older files lack it
_RECOMPUTED = (_COUNTER, "relative_position_index", "attn_mask", "relative_coords_table")  # what models keep besides weights
_HEADS = {
    "fc", "head", "heads", "classifier", "logits", "linear", "online_classifier", "projector", "projection_head", "predictor", "prototypes",
    "neck",
}  # fmt: skip
# Of several networks in a file, those named so come first and last; all others, students and query encoders among them, in between.
_FIRST = re.compile(r"(^|[._])(teacher|state_dict_ema|model_ema)")
_LAST = re.compile(r"momentum|target|encoder_k|key_encoder|(?<!state_dict)(?<!model)_ema|^ema")
_LISTED = 6


@dataclass(frozen=True, kw_only=True)
class Match:
    """A backbone under a prefix of a file, by the names of one layout: `names` maps those of the file to those of the backbone."""

    prefix: str  # ends with a dot, or is empty
    layout: str
    names: Mapping[str, str]
    missing: Sequence[str] = ()  # names that the file should have
    differing: Sequence[str] = ()  # names with both shapes
    foreign: Sequence[str] = ()  # names of the file in parts of the backbone that the architecture does not have
    unused: Sequence[str] = ()  # other names under the prefix

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.differing or self.foreign)

    @property
    def faults(self) -> str:
        """What does not match, by name."""
        parts = {"missing": self.missing, "of another shape or kind": self.differing, "not of this architecture": self.foreign}
        return "; ".join(f"{what}: {listed(names)}" for what, names in parts.items() if names)


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An encoder out of a file of another toolkit, and where in the file it was."""

    encoder: Encoder
    prefix: str
    layout: str = field(default="own")


def load_foreign(path: Path, *, backbone: str | None = None, prefix: str | None = None, verbose: bool = True) -> Foreign:
    """Load a backbone out of a file of any toolkit (docs/export.md), without a projector, in float32, on the CPU.

    Args:
        backbone: its architecture, as `build_backbone` names it. None: that of the file's metadata, or the ResNet that its shapes fit.
        prefix: of its names in the file, or dotted parts of it. None: found, see `_choose`.
        verbose: log what was taken, and what of the file is not used.
    Raises:
        DataError: the file cannot be read, or the backbone is not whole in it, or not finite. ConfigError: no such architecture, or no
            such prefix.
    """
    file = read_weights(path)
    name = backbone or file.metadata.get(ARCHITECTURE) or _deduced(file, prefix)
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        model = build_backbone(name)
    expected = model.state_dict()
    match = _choose(file, _matches(file.tensors, _layouts(model), expected), name=name, prefix=prefix, verbose=verbose)
    values = {ours: file.tensors[match.prefix + theirs].reshape(expected[ours].shape) for theirs, ours in match.names.items()}
    values = {ours: value.to(expected[ours].dtype) for ours, value in values.items()}
    if damaged := [ours for ours, value in values.items() if not torch.isfinite(value).all()]:
        raise DataError(f"{path}: holds weights that are not finite ({listed(damaged)}); use an earlier checkpoint, or download it again")
    model.load_state_dict(values, strict=False)  # all but counters of batches are there
    if verbose:
        _log_match(file, match, name)
    return Foreign(encoder=Encoder(model, None, name=name), prefix=match.prefix, layout=match.layout)


def detectron2_name(name: str) -> str:
    """Detectron2's name of a weight of torchvision's ResNet: layerN → res(N + 1), bnK → convK.norm, downsample → shortcut, and the stem."""
    stem = "" if name.startswith("layer") else "stem."
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return stem + name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def is_resnet(backbone: Backbone) -> bool:
    """Whether its names are those of torchvision's ResNet."""
    return hasattr(backbone, "conv1") and hasattr(backbone, "bn1") and hasattr(backbone, "layer4")


def listed(names: Sequence[str]) -> str:
    """The first names of many, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _layouts(backbone: Backbone) -> dict[str, dict[str, str]]:
    """How toolkits call the weights of a backbone: by layout, their name → ours."""
    ours = list(backbone.state_dict())
    if isinstance(backbone, TimmBackbone):
        return {"own": {name.removeprefix("trunk."): name for name in ours}}
    found = {"own": {name: name for name in ours}}
    if is_resnet(backbone):
        found["detectron2"] = {detectron2_name(name): name for name in ours}
    # nn.Sequential(*list(model.children())[:-1]), as lightly's examples and others have it
    place = {child: str(i) for i, (child, _) in enumerate(backbone.named_children())}
    found["sequential"] = {".".join([place[child], *rest]): name for name in ours for child, *rest in [name.split(".")]}
    return found


def _matches(tensors: Mapping[str, Tensor], layouts: Mapping[str, Mapping[str, str]], expected: Mapping[str, Tensor]) -> list[Match]:
    """What lies under each prefix, by each layout, the most names first."""
    found = []
    for layout, names in layouts.items():
        under: dict[str, dict[str, str]] = {}  # by prefix, the names of the layout that are there
        for full in tensors:
            parts = full.split(".")
            for i in range(len(parts)):
                if (tail := ".".join(parts[i:])) in names:
                    under.setdefault(full[: len(full) - len(tail)], {})[tail] = full
        most = max(map(len, under.values()), default=0)  # many prefixes hold a few names: parts of a network
        found += [_match(tensors, prefix, layout, names, expected, set(there)) for prefix, there in under.items() if 2 * len(there) >= most]
    return sorted(found, key=lambda match: len(match.missing) + len(match.differing))


def _match(
    tensors: Mapping[str, Tensor], prefix: str, layout: str, names: Mapping[str, str], expected: Mapping[str, Tensor], there: set[str]
) -> Match:
    parts = {name.split(".")[0] for name in names}
    others = [full.removeprefix(prefix) for full in tensors if full.startswith(prefix)]
    others = [name for name in others if name not in there and not name.endswith(_RECOMPUTED)]
    foreign = [name for name in others if name.split(".")[0] in parts and not _HEADS & set(name.split("."))]
    pairs = {name: (tensors[prefix + name], expected[names[name]]) for name in names if name in there}
    fits = {name: _fits(*pair) for name, pair in pairs.items()}
    return Match(
        prefix=prefix,
        layout=layout,
        names={name: names[name] for name, is_same in fits.items() if is_same},
        missing=[name for name in names if name not in there and not name.endswith(_COUNTER)],
        differing=[f"{name} {_shape(pairs[name][0])} in place of {_shape(pairs[name][1])}" for name in fits if not fits[name]],
        foreign=foreign,
        unused=[name for name in others if name not in foreign],
    )


def _fits(value: Tensor, expected: Tensor) -> bool:
    same_shape = value.shape == expected.shape or value.numel() == expected.numel() == 1  # counters: [] or [1]
    return not _kind(value) and same_shape and value.is_floating_point() == expected.is_floating_point()


def _kind(value: Tensor) -> str:
    """What a tensor is that is not a plain array of real numbers; empty for one that is."""
    if value.layout != torch.strided:
        return str(value.layout).removeprefix("torch.")
    return "without values (meta)" if value.is_meta else "quantized" if value.is_quantized else "complex" if value.is_complex() else ""


def _shape(value: Tensor) -> str:
    dtype = "" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
    return " ".join(filter(None, (f"[{', '.join(map(str, value.shape))}]", dtype, _kind(value))))


def _choose(file: WeightsFile, matches: Sequence[Match], *, name: str, prefix: str | None, verbose: bool) -> Match:
    """The one whole backbone of a file.

    Of several, a teacher's or a moving average's of timm is taken first, a target's, momentum or key encoder's last (each as its authors
    evaluate it); equal ones count once. ConfigError if the choice is not clear, DataError if there is none.
    """
    path, asked = file.path, None if prefix is None else prefix.strip(".")
    if asked is not None:
        under = _under(matches, asked)
        if not under:
            there = dict.fromkeys(match.prefix for match in matches if match.is_whole) or _groups(file.tensors)
            raise ConfigError(f"{path}: nothing of {name} under --prefix {asked!r}; there are {listed([repr(each) for each in there])}")
        matches = under
    whole = [match for match in matches if match.is_whole]
    if not whole:
        if not matches or 2 * len(matches[0].names) < len(matches[0].missing):
            raise DataError(
                f"{path}: nothing, or almost nothing, of {name} in it; it holds {listed(list(file.tensors))}; "
                "name its architecture with --backbone"
            )
        where = f" under {matches[0].prefix!r}" if matches[0].prefix else ""
        _list(path, matches[0])
        raise DataError(f"{path}: does not fit {name}{where}; {matches[0].faults}; name another --backbone, or give another file")
    ranked = sorted(whole, key=lambda match: (_rank(match.prefix), len(match.prefix)))
    best = [match for match in ranked if _rank(match.prefix) == _rank(ranked[0].prefix)]
    unlike = [match for match in best[1:] if not _equal(file.tensors, best[0], match)]
    if unlike:
        names = ", ".join(repr(match.prefix) for match in (best[0], *unlike))
        raise ConfigError(f"{path}: holds several backbones ({names}); choose one with --prefix")
    others = dict.fromkeys(match.prefix for match in ranked if match.prefix != best[0].prefix)
    if others and verbose:
        log.info("%s: taking %r; also there: %s (--prefix)", path, best[0].prefix, ", ".join(map(repr, others)))
    return best[0]


def _under(matches: Sequence[Match], prefix: str | None) -> Sequence[Match]:
    """Those of this prefix or, where there are none, with these parts in it."""
    if prefix is None:
        return matches
    whole, asked = [match for match in matches if match.prefix.strip(".") == prefix.strip(".")], f".{prefix.strip('.')}."
    return whole or [match for match in matches if asked.strip(".") and asked in f".{match.prefix}"]


def _rank(prefix: str) -> int:
    return 0 if _FIRST.search(prefix) else 2 if _LAST.search(prefix) else 1


def _equal(tensors: Mapping[str, Tensor], a: Match, b: Match) -> bool:
    if a.names.keys() != b.names.keys():  # of one layout, or counters that one lacks
        return {*a.names.values()} == {*b.names.values()} and a.prefix == b.prefix
    return all(torch.equal(tensors[a.prefix + name], tensors[b.prefix + name]) for name in a.names)


def _deduced(file: WeightsFile, prefix: str | None) -> str:
    """The ResNet whose names and shapes a file holds (under a prefix), all of them and no others."""
    best: tuple[float, str, Match] | None = None
    found: list[str] = []
    asked = (prefix or "").strip(".")
    if asked and not any(f".{asked}." in f".{name}." for name in file.tensors):
        raise ConfigError(f"{file.path}: has nothing under --prefix {asked!r}; it holds {listed(_parts(file.tensors))}")
    for name, skeleton in resnet_skeletons():
        matches = _under(_matches(file.tensors, _layouts(skeleton), skeleton.state_dict()), prefix)
        if matches and all(match.is_whole for match in matches):
            return name
        found += [name] if any(match.is_whole for match in matches) else []
        for match in matches[:1]:
            share = len(match.names) / (len(match.names) + len(match.missing) + len(match.differing) + len(match.foreign))
            best = max(best or (share, name, match), (share, name, match), key=lambda entry: entry[0])
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{file.path}: holds several architectures ({', '.join(found)}); name one with --backbone")
    near = ""
    if best and best[0] > 0.5:
        _list(file.path, best[2])
        near = f" The nearest is {best[1]}; {best[2].faults}."
    raise DataError(
        f"{file.path}: not a whole ResNet of torchvision, so its architecture is not known: name it with --backbone, for example "
        f"{TIMM}vit_small_patch16_224.{near} It holds {listed(list(file.tensors))}"
    )


def _list(path: Path, match: Match) -> None:
    for what, names in (("missing", match.missing), ("another shape", match.differing), ("not of this architecture", match.foreign)):
        for name in names:
            log.debug("%s: %s: %s%s", path, what, match.prefix, name)


def _log_match(file: WeightsFile, match: Match, name: str) -> None:
    """What was taken, and what of the file was left, by name."""
    dtypes = {str(file.tensors[match.prefix + theirs].dtype).removeprefix("torch.") for theirs in match.names} - {"float32", "int64"}
    converted = f", converted from {', '.join(sorted(dtypes))}" if dtypes else ""
    layout = {"own": "", "detectron2": " by Detectron2's names", "sequential": " by the positions of its layers"}[match.layout]
    under = f" under {match.prefix!r}" if match.prefix else ""
    log.info("%s: %s%s%s, %d tensors%s", file.path, name, layout, under, len(match.names), converted)
    heads = [name for name in match.unused if _HEADS & set(name.split("."))]
    if left := [name for name in match.unused if name not in heads]:
        log.info("%s: not used: %s", file.path, listed(_groups(left)))
    if heads:
        log.info("%s: heads, not used: %s", file.path, listed(_groups(heads)))


def _parts(names: Iterable[str]) -> list[str]:
    """The first three parts of names, once each (state_dict.module.encoder_q)."""
    return list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))


def _groups(names: Mapping[str, Tensor] | Sequence[str]) -> list[str]:
    """The names up to their last part, once each, with their number."""
    found: dict[str, int] = {}
    for name in names:
        key = name.rpartition(".")[0] or name
        found[key] = found.get(key, 0) + 1
    return [f"{name} ({count})" if count > 1 else name for name, count in found.items()]
