"""The cuts of BK-SDM (Kim et al. 2023, arXiv:2305.15798, section 3.1), made by hand: smaller configurations of the same
U-Net, with the weights of the blocks that stay.

base   one pair of residual block and transformer less in every stage: the last of those going down, the middle one of
       those coming up, whose inputs come from the same place
small  base, and no middle block
tiny   small, and no innermost stage
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model.libraries import quiet, torch
from ..model.model import Part
from ..model.structure import network_of, part_with, removable, structure_of
from ..runtime.errors import BadInput

__all__ = ["BK_SDM", "bk_sdm_part", "by_hand", "smaller_config"]

BK_SDM = ("bk_sdm_base", "bk_sdm_small", "bk_sdm_tiny")


def bk_sdm_part(part: Part, cut: str) -> Part:
    """The part with one of BK_SDM's cuts: a plain network of diffusers with a shorter configuration.

    Stages of one pair, which base would leave nothing to take from, stay as they are. Raises BadInput for another
    network than a U-Net, one that was cut already, or one that has nothing of the kind to cut.
    """
    network = network_of(part)
    kind = type(network).__name__
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise BadInput(f"{cut} of a {kind}", expected="a U-Net of diffusers")
    if structure_of(network).removed:
        raise BadInput(f"{cut} of a network that blocks were cut out of", expected="one that is whole")
    config, names = smaller_config(network, cut)
    with quiet(), torch().device("meta"):
        smaller = type(network).from_config(config)
    weights = network.state_dict()
    state = {name: weights[_origin(name, names)].clone() for name in smaller.state_dict()}
    smaller.load_state_dict(state, assign=True)
    return part_with(part, smaller)


def by_hand(part: Part) -> tuple[str, ...]:
    """Every unit in the order BK-SDM would take it out, for a cut of any size: second pairs of a stage, the middle
    block, then stages from the innermost outwards; what a unit holds comes with it. Raises BadInput for no U-Net.
    """
    network = network_of(part)
    if not hasattr(network, "down_blocks"):
        raise BadInput(f"BK-SDM's order of a {type(network).__name__}", expected="a U-Net")
    kinds = [
        path for path, kind in removable(network).items() if kind in ("residual", "transformer", "attention")
    ]
    outer = [path for path in kinds if ".transformer_blocks." not in path]
    stages = len(network.down_blocks)

    def rank(path: str) -> tuple[int, int, int]:
        words = path.split(".")
        if words[0] == "mid_block":
            return (1, 0, int(words[2]))
        stage, number = int(words[1]), int(words[3])
        up = words[0] == "up_blocks"
        depth = stage if up else stages - 1 - stage  # 0 is the innermost
        pairs = len(getattr(network, words[0])[stage].resnets)
        second = 0 < number < pairs - 1 if up else number > 0
        return (0 if second else 2, depth, number)

    return tuple(sorted(outer, key=rank))


def smaller_config(network: Any, cut: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration, and by prefix where the names of its weights differ from the old network's."""
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    stages = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    layers = [layers] * stages if isinstance(layers, int) else list(layers)
    fewer = [max(1, n - 1) for n in layers]
    lost = 1 if cut == "bk_sdm_tiny" else 0
    if cut == "bk_sdm_base" and fewer == layers:
        raise BadInput(f"{cut} of a network with {layers[0]} layer a block", expected="2 or more")
    if cut != "bk_sdm_base":
        if network.mid_block is None and not lost:
            raise BadInput(f"{cut} of a network without a middle block", expected="a network that has one")
        config["mid_block_type"] = None
    if lost:
        width = list(config["block_out_channels"])
        if stages < 3 or width[-1] != width[-2]:
            raise BadInput(
                f"{cut} of a network of {' '.join(map(str, width))} channels",
                expected="three stages or more, the innermost two of equal width",
                fix="laptop at the ratio you want, or by_hand",
            )
    names: dict[str, str] = {}
    for stage in range(stages - lost):
        number = stages - 1 - lost - stage  # the stage going down that this one coming up belongs to
        old = stage + lost
        for new in range(fewer[number] + 1):
            last = new == fewer[number]
            for what in ("resnets", "attentions"):
                from_ = layers[number] if last else new
                names[f"up_blocks.{stage}.{what}.{new}."] = f"up_blocks.{old}.{what}.{from_}."
        names[f"up_blocks.{stage}.upsamplers."] = f"up_blocks.{old}.upsamplers."
    keep = stages - lost
    for key, value in config.items():
        if isinstance(value, list | tuple) and len(value) == stages:
            # coming up is the other way round
            config[key] = list(value[lost:] if key == "up_block_types" else value[:keep])
    config["layers_per_block"] = fewer[0] if len(set(fewer[:keep])) == 1 else fewer[:keep]
    return config, names


def _origin(name: str, names: Mapping[str, str]) -> str:
    for mine, theirs in names.items():
        if name.startswith(mine):
            return theirs + name.removeprefix(mine)
    return name
