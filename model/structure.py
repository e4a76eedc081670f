"""What a pruned network has lost beside its configuration, and how to build it again without code in its folder.

A diffusers config.json describes networks that diffusers can build. One key more, `_structure`, says what was cut out
of such a network; diffusers ignores keys that begin with "_". How wide each layer is says its stored weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..runtime.errors import BadInput, CheckpointError
from .libraries import quiet, torch
from .model import Part

__all__ = [
    "KEY",
    "Structure",
    "bypass",
    "bypassed",
    "network_of",
    "part_with",
    "removable",
    "restructure",
    "shadow",
    "structure_of",
    "without",
]

KEY = "_structure"


@dataclass(frozen=True)
class Structure:
    """What differs from the network that config.json describes. Plain data, checked where it is read."""

    removed: tuple[str, ...] = ()
    """Paths of blocks in the diffusers network that are bypassed; none lies inside another."""
    heads: Mapping[str, int] = field(default_factory=dict)
    """Path of an attention -> its heads, where there are fewer."""
    groups: Mapping[str, int] = field(default_factory=dict)
    """Path of a group norm -> its groups, where there are others."""

    def to_json(self) -> dict[str, Any]:
        return {"removed": list(self.removed), "heads": dict(self.heads), "groups": dict(self.groups)}

    @classmethod
    def from_json(cls, data: Any) -> Structure:
        """Raises BadInput for anything but what to_json writes."""
        fields = {"removed": list, "heads": dict, "groups": dict}
        if not isinstance(data, Mapping) or not all(
            key in fields and isinstance(value, fields[key]) for key, value in data.items()
        ):
            raise BadInput(f"{KEY} is {str(data)[:120]}", expected=f"an object of {', '.join(fields)}")
        removed, heads, groups = data.get("removed", []), data.get("heads", {}), data.get("groups", {})
        if not all(isinstance(path, str) for path in removed):
            raise BadInput(f"{KEY}: removed is {str(removed)[:120]}", expected="paths of blocks")
        for name, counts in (("heads", heads), ("groups", groups)):
            if not all(type(count) is int and count > 0 for count in counts.values()):
                raise BadInput(f"{KEY}: {name} is {str(counts)[:120]}", expected="a number for each path")
        return cls(tuple(sorted(removed)), dict(heads), dict(groups))

    def without(self, removed: Sequence[str]) -> Structure:
        """The same with more blocks removed."""
        return replace(self, removed=_outermost((*self.removed, *removed)))


def network_of(part: Part) -> Any:
    """The diffusers network inside a denoiser. Raises BadInput for a module of another kind."""
    network = getattr(part.module, "network", None)
    if network is None or not hasattr(network, "register_to_config"):
        raise BadInput(
            f"{part.name} is a {type(part.module).__name__}",
            expected="a UNet2DConditionModel, UNet2DModel or DiTTransformer2DModel of diffusers",
            fix="prune a module of your own in your own code, and wrap what is left",
        )
    return network


def structure_of(network: Any) -> Structure:
    return Structure.from_json(network.config.get(KEY, {}))


def part_with(part: Part, network: Any, structure: Structure | None = None) -> Part:
    """The part around another network, whose configuration then says how it is to be built.

    structure  None where `network.config` already describes it
    """
    from .families import plain_config
    from .wrappers import LabelledDenoiser

    if structure is not None:
        network.register_to_config(**{KEY: structure.to_json()})
    old = part.module
    module = (
        LabelledDenoiser(network, old.channels) if isinstance(old, LabelledDenoiser) else type(old)(network)
    )
    return replace(part, module=module.eval(), config=plain_config(network), quantized=None)


def without(part: Part, removed: Sequence[str]) -> Part:
    """The part with some blocks bypassed: a new network with weights of its own. Raises BadInput like `bypassed`."""
    network = network_of(part)
    smaller = shadow(network)
    bypass(smaller, removed)
    smaller = copy.deepcopy(smaller)  # only what is left is copied
    return part_with(part, smaller, structure_of(network).without(removed))


def shadow(network: Any) -> Any:
    """The layers of a network anew, on the same weights."""
    shared = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, shared)


def removable(network: Any) -> dict[str, str]:
    """Path -> kind of every block that can be bypassed, in the network's order, outer ones before what they hold.

    Kinds: residual, transformer, block, attention, feed-forward. Down- and upsamplers, the convolutions of skip paths
    and the ends of the network are never among them.
    """
    found: dict[str, str] = {}
    inside: tuple[str, ...] = ()
    for path, module in network.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D" and module.upsample is None and module.downsample is None:
            found[path] = "residual"
        elif kind == "Transformer2DModel" and path:
            found[path] = "transformer"
            inside = (*inside, path) if len(module.transformer_blocks) == 1 else inside
        elif kind == "Attention" and module.residual_connection:
            found[path] = "attention"
        elif _is_block(module):
            if path.rpartition(".transformer_blocks.")[0] not in inside:
                found[path] = "block"
            names = [name for name in ("attn1", "attn2", "ff") if getattr(module, name, None) is not None]
            if kind == "BasicTransformerBlock" or len(names) > 1:
                for name in names:
                    found[f"{path}.{name}"] = "feed-forward" if name == "ff" else "attention"
    return found


def bypass(network: Any, removed: Sequence[str]) -> None:
    """Put bypasses in place of blocks of `network`. Raises BadInput like `bypassed`."""
    for path, module in _bypasses(network, removed).items():
        network.set_submodule(path, module)


@contextmanager
def bypassed(network: Any, removed: Sequence[str]) -> Iterator[None]:
    """Inside, these blocks of `network` do nothing. Raises BadInput for a path that is no such block."""
    modules = _bypasses(network, removed)
    before = {path: network.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            network.set_submodule(path, module)
        yield
    finally:
        for path, module in before.items():
            network.set_submodule(path, module)


def restructure(network: Any, structure: Structure, shapes: Mapping[str, Sequence[int]]) -> None:
    """Turn the network that a configuration describes into the one that was stored.

    shapes  of all its weights, by name
    Raises CheckpointError where the two do not fit.
    """
    try:
        bypass(network, structure.removed)
    except BadInput as error:
        raise CheckpointError(f"{KEY}: {error.found}", expected=error.expected, fix=_AGAIN) from None
    for path, module in list(network.named_modules()):
        shape = shapes.get(f"{path}.weight")
        if shape is not None and getattr(module, "weight", None) is not None:
            shape = tuple(shape)
            groups = structure.groups.get(path)
            if shape != tuple(module.weight.shape) or groups is not None:
                network.set_submodule(path, _rebuilt(path, module, shape, groups))
    for path in structure.groups:
        _find(network, path, "GroupNorm")
    for path, heads in structure.heads.items():
        attention = _find(network, path, "Attention")
        width = attention.to_q.out_features
        if width % heads:
            raise CheckpointError(f"{KEY}: {heads} heads of {path}, {width} wide", fix=_AGAIN)
        attention.heads = heads
    for module in network.modules():  # these two hold against their input what they were built for
        if (
            type(module).__name__ in ("Downsample2D", "Upsample2D")
            and getattr(module, "conv", None) is not None
        ):
            module.channels = module.conv.in_channels
        elif type(module).__name__ == "Attention":
            module.inner_dim = module.to_q.out_features
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted({*own, *shapes}):
        if own.get(name) != (tuple(shapes[name]) if name in shapes else None):
            raise CheckpointError(
                f"{name} is {list(shapes[name]) if name in shapes else 'missing'} in the weights",
                expected=f"{list(own[name])} by config.json"
                if name in own
                else "no such weight by config.json",
                fix=_AGAIN,
            )


_AGAIN = f"take config.json and its {KEY} from where the weights came from"


def _bypasses(network: Any, removed: Sequence[str]) -> dict[str, Any]:
    """Path -> the module to put there."""
    with quiet():
        from . import bypass as kinds

    known = removable(network)
    kept: dict[str, set[str]] = {}
    modules: dict[str, Any] = {}
    for path in _outermost(removed):
        if path not in known:
            raise BadInput(
                f"{path[:120]!r} is no block of {type(network).__name__} that can be taken out",
                expected=f"one of {', '.join(list(known)[:6])}, ..."
                if known
                else "a network with such blocks",
            )
        module, (above, _, name) = network.get_submodule(path), path.rpartition(".")
        if known[path] == "residual":
            modules[path] = kinds.SkipPath(module)
        elif known[path] == "transformer":
            modules[path] = kinds.NoTransformer()
        elif known[path] == "block":
            shared = path == "transformer_blocks.0" and _modulated(
                module
            )  # whose embedding DiT's output layer reads
            modules[path] = kinds.ThinModulatedBlock(module, frozenset()) if shared else kinds.NoBlock()
        elif name in kinds.HALVES:
            block = network.get_submodule(above)
            kept.setdefault(above, {n for n in kinds.HALVES if getattr(block, n, None) is not None}).discard(
                name
            )
        else:
            modules[path] = kinds.NoAttention(module)
    for path, names in kept.items():
        block = network.get_submodule(path)
        if not _modulated(block):
            modules[path] = kinds.ThinBlock(block, frozenset(names))
        elif names or path == "transformer_blocks.0":
            modules[path] = kinds.ThinModulatedBlock(block, frozenset(names))
        else:
            modules[path] = kinds.NoBlock()
    return {path: module.train(network.training) for path, module in modules.items()}


def _is_block(module: Any) -> bool:
    kind = type(module).__name__
    if kind == "BasicTransformerBlock":
        return module.norm_type in ("layer_norm", "ada_norm_zero") and module.pos_embed is None
    return kind in ("ThinBlock", "ThinModulatedBlock")


def _modulated(block: Any) -> bool:
    return (
        getattr(block, "norm_type", None) == "ada_norm_zero" or type(block).__name__ == "ThinModulatedBlock"
    )


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    """Sorted, without those inside another."""
    found = set(paths)
    inside = {path for path in found if any(path.startswith(other + ".") for other in found)}
    return tuple(sorted(found - inside))


def _find(network: Any, path: str, kind: str) -> Any:
    try:
        module = network.get_submodule(path)
    except AttributeError:
        module = None
    if type(module).__name__ != kind:
        raise CheckpointError(f"{KEY}: {path[:120]!r} is no {kind} of this network", fix=_AGAIN)
    return module


def _rebuilt(path: str, module: Any, shape: tuple[int, ...], groups: int | None) -> Any:
    """A layer of the same kind for a weight of that shape. Raises CheckpointError where there is none."""
    nn = torch().nn
    kind = type(module).__name__
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    bias = getattr(module, "bias", None) is not None
    rank = {"Conv2d": 4, "Linear": 2, "GroupNorm": 1, "LayerNorm": 1}.get(kind)
    if rank is None or rank != len(shape) or min(shape) < 1 or (kind == "Conv2d" and module.groups != 1):
        raise CheckpointError(
            f"{path}.weight is {list(shape)}",
            expected=f"{list(module.weight.shape)}, of a {kind}",
            fix=_AGAIN,
        )
    if kind == "Linear":
        return nn.Linear(shape[1], shape[0], bias, **like)
    if kind == "LayerNorm":
        return nn.LayerNorm(shape, module.eps, module.elementwise_affine, bias, **like)
    if kind == "GroupNorm":
        groups = groups or module.num_groups
        if shape[0] % groups:
            raise CheckpointError(f"{path}: {shape[0]} channels in {groups} groups", fix=_AGAIN)
        return nn.GroupNorm(groups, shape[0], module.eps, module.affine, **like)
    place = module.stride, module.padding, module.dilation
    return nn.Conv2d(shape[1], shape[0], shape[2:], *place, 1, bias, module.padding_mode, **like)
