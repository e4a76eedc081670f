"""The passes a recipe may name, and how they are run one after the other."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace

from ..distill.adversarial import Adversarial
from ..distill.boot import BOOT
from ..distill.dmd2 import DMD2
from ..distill.features import Recover
from ..distill.flow import FlowGuided, Reflow
from ..distill.guidance import DistillGuidance
from ..distill.ict import ICT
from ..distill.lcm import LCM
from ..distill.lcm_lora import LCMLora
from ..distill.mmd import MMD
from ..distill.pcm import PCM
from ..distill.progressive import Progressive
from ..distill.sid import SiD
from ..distill.tdm import TDM
from ..distill.tiny_decoder import TinyDecoder
from ..model import Context, Model, Pass
from ..prune.cut_blocks import CutBlocks
from ..prune.sparsify import Sparsify
from ..prune.upsampling import SplitUpsampling
from ..prune.widths import CutWidths
from ..quant.quantize import Quantize
from ..quant.scheme import parse_scheme
from ..runtime.errors import BadInput
from ..runtime.progress import Progress, within
from ..targets import Target, read_table
from .plans import plan_of

__all__ = ["PASSES", "check_bits", "configured", "run_passes"]

PASSES: Mapping[str, type[Pass]] = {
    "cut_blocks": CutBlocks,
    "cut_widths": CutWidths,
    "recover": Recover,
    "guidance": DistillGuidance,
    "lcm": LCM,
    "lcm_lora": LCMLora,
    "pcm": PCM,
    "progressive": Progressive,
    "ict": ICT,
    "reflow": Reflow,
    "flow_guided": FlowGuided,
    "adversarial": Adversarial,
    "tdm": TDM,
    "dmd2": DMD2,
    "sid": SiD,
    "boot": BOOT,
    "mmd": MMD,
    "sparsify": Sparsify,
    "tiny_decoder": TinyDecoder,
    "split_upsampling": SplitUpsampling,
    "quantize": Quantize,
}
"""Name in a recipe -> the pass: a dataclass whose fields a table of that name sets. In the order they are run best."""


BYTES_ALONE = ("litert",)
"""Engines whose kernels take weights and inputs of 8 bits and no fewer."""


NO_INTEGERS = {
    "coreml": "weights, bits and group under [backend.options] of a --recipe: packages store weights their own way",
    "aoti": "float16 or bfloat16: its kernels take no integers",
}
"""Engine -> what it has in the place of the quantize pass."""


def configured(target: Target) -> list[tuple[str, Pass]]:
    """The passes of the target's recipe with their fields. Raises BadInput."""
    found = []
    for name in target.recipe.passes:
        if name not in PASSES:
            raise BadInput(
                f"unknown pass {name!r} in the recipe",
                expected=" or ".join(PASSES),
                fix="take it out of [recipe] passes",
            )
        each = read_table(PASSES[name], target.recipe.options.get(name, {}), "the recipe", name)
        found.append((name, each))
    return found


def check_bits(target: Target) -> None:
    """Raises BadInput for a recipe that asks for bits the target's engine has no kernels for."""
    for _, each in configured(target):
        engine = target.backend.engine
        if isinstance(each, Quantize) and engine in NO_INTEGERS:
            raise BadInput(
                f"integers for {target.id}", expected=NO_INTEGERS[engine], fix="leave --quantize out"
            )
        if not isinstance(each, Quantize) or engine not in BYTES_ALONE:
            continue
        for text in (each.scheme, each.decoder, each.text):
            scheme = parse_scheme(text or "w8")
            if scheme.weights != 8 or scheme.inputs not in (None, 8):
                raise BadInput(
                    f"scheme {text!r} on {target.id}",
                    expected=f"w8a8 or w8: {target.backend.engine}'s kernels take weights and inputs of 8 bits",
                    fix="--quantize w8a8, or another target (fewstep targets)",
                )


def run_passes(
    model: Model, context: Context, sampler: str, steps: int | None, begin: float = 0.0, end: float = 1.0
) -> Generator[Progress, None, Model]:
    """Every pass of the recipe; what they yield lies between begin and end of the whole.

    sampler, steps  of the plan that ships: it is made anew after every pass, which may change how the model is drawn.
                    None: the number of steps the model was made for, or the target's
    The model given is the teacher of passes that train, where the context names none. Raises what the passes raise.
    """
    passes = configured(context.target)
    context = replace(context, teacher=context.teacher or model)
    for number, (name, each) in enumerate(passes):
        first, last = (begin + (end - begin) * n / len(passes) for n in (number, number + 1))
        count = steps_of(model, context.target, steps)
        model = yield from within(
            each(model, replace(context, plan=plan_of(model, sampler, count))), first, last, f"{name} "
        )
    return model


def steps_of(model: Model, target: Target, asked: int | None) -> int:
    """Steps of the plan that ships: those asked for, those the model was made for, or the target's."""
    return asked or model.steps or target.recipe.steps
