"""Any torch.nn.Module that denoises, as a Model: self-trained networks of any architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..runtime.errors import BadInput, CheckpointError
from ..runtime.grids.levels import is_discrete
from ..runtime.manifest import PREDICTIONS, GuidanceSpec, SampleSpec, TensorSpec
from ..runtime.process import Process
from .libraries import torch
from .model import Example, Model, Part

__all__ = ["from_module"]

AXES = ("height", "width")


def from_module(
    module: Any,
    *,
    sample_shape: tuple[int, ...],
    process: Process,
    prediction: str,
    name: str,
    classes: int | None,
    call: Callable[..., Any] | None,
    dynamic: tuple[str, ...],
    guidance: float,
    license: str,
) -> Model:
    """Wrap a network for export.

    module        called as module(sample, timestep) or module(sample, timestep, class_labels); sample float32
                  [batch, *sample_shape], timestep float32 [batch], class_labels int64 [batch]
    sample_shape  (channels, height, width), (channels, length) or (size,), without the batch; the bundle's own input
                  is always [batch, channels, height, width], with sizes of 1 for what is not there
    process       how the training added noise; the network's timestep is process.timestep(t). For one with an
                  observation (runtime/conditional.py) the module is called with it, of the sample's shape, in the
                  third place: module(sample, timestep, observation[, class_labels])
    prediction    what it was trained to output: epsilon, v_prediction, sample or flow; score, residual or resnoise
    classes       how many class labels there are; None for a model without
    call          for a network with another signature: (module, sample, timestep[, class_labels]) -> output.
                  A tensor, a tuple whose first is one, or an object with `.sample`
    dynamic       "height", "width" or both, where the network takes images of any size; the batch is always free
    guidance      default classifier-free guidance; above 1 the label `classes` has to mean "no class"
    license       in words
    Raises BadInput for arguments that contradict each other, CheckpointError for NaN weights or a wrong output shape.
    """
    _check_arguments(sample_shape, prediction, classes, dynamic, guidance)
    _check_weights(module, name)
    from .wrappers import Adapted, ObservingAdapted

    # channels, height, width, whatever the rank: [8, 32] travels as [8, 1, 32], so that one runtime draws them all
    channels, *rest = sample_shape
    height, width = {0: (1, 1), 1: (1, rest[-1] if rest else 1), 2: tuple(rest[-2:])}[len(rest)]
    axes: tuple[int | str, ...] = (
        "height" if "height" in dynamic else height,
        "width" if "width" in dynamic else width,
    )
    inputs = [
        TensorSpec("sample", "float32", ("batch", channels, *axes)),
        TensorSpec("timestep", "float32", ("batch",)),
    ]
    if hasattr(process, "gamma"):
        inputs.append(TensorSpec("observation", "float32", ("batch", channels, *axes)))
    ranges = {"timestep": _times(process)}
    if classes is not None:
        inputs.append(TensorSpec("class_labels", "int64", ("batch",)))
        ranges["class_labels"] = (0, classes)
    sizes: dict[str, tuple[int, ...]] = {"batch": (2, 3)}
    # other sizes that stay multiples of what they were: a network may halve its sample several times
    sizes |= {"height": (height, 2 * height)} if "height" in dynamic else {}
    sizes |= {"width": (width, 3 * width)} if "width" in dynamic else {}
    part = Part(
        name="unet",
        module=(ObservingAdapted if hasattr(process, "gamma") else Adapted)(
            module, call, None if len(sample_shape) == 3 else sample_shape
        ).eval(),
        inputs=tuple(inputs),
        outputs=(TensorSpec("out_sample", "float32", ("batch", channels, *axes)),),
        example=Example(sizes, ranges),
        portable=False,
    )
    _try(part)
    return Model(
        name=name,
        task="unconditional" if classes is None else "class-conditional",
        denoiser="unet",
        parts={"unet": part},
        process=process,
        prediction=prediction,
        sample=SampleSpec(height, width, channels, fixed=not {"height", "width"} <= set(dynamic)),
        guidance=GuidanceSpec("cfg", guidance) if guidance != 1.0 else GuidanceSpec(),
        classes=classes,
        license=license,
    )


def _check_arguments(
    shape: tuple[int, ...], prediction: str, classes: int | None, dynamic: tuple[str, ...], guidance: float
) -> None:
    if not 1 <= len(shape) <= 3 or not all(type(size) is int and size > 0 for size in shape):
        raise BadInput(
            f"sample_shape {shape!r}", expected="(channels, height, width), (channels, length) or (size,)"
        )
    if prediction not in PREDICTIONS:
        raise BadInput(f"prediction {prediction!r}", expected=" or ".join(PREDICTIONS))
    if classes is not None and (type(classes) is not int or classes < 1):
        raise BadInput(f"{classes!r} classes", expected="a whole number above 0, or None")
    if set(dynamic) - set(AXES) or (dynamic and len(shape) != 3):
        raise BadInput(f"dynamic {dynamic!r}", expected="height, width or both, and only for images")
    if guidance != 1.0 and classes is None:
        raise BadInput(f"guidance {guidance!r} without classes", expected="1, or a class-conditional model")


def _check_weights(module: Any, name: str) -> None:
    """Raises CheckpointError naming the first tensor with NaN or infinity, and how many."""
    for tensor_name, tensor in _tensors(module):
        bad = int((~torch().isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise CheckpointError(
                f"{name}: tensor {tensor_name} has {bad:,} NaN or infinite values out of {tensor.numel():,}",
                expected="finite weights",
                fix="take an earlier checkpoint of the training",
            )


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _times(process: Process) -> tuple[float, float]:
    """The smallest and largest timestep the network was trained on."""
    low = 1.0 if is_discrete(process) else process.t_max * 1e-3
    return float(process.timestep(low)), float(process.timestep(process.t_max))


def _try(part: Part) -> None:
    """Call the network once. Raises CheckpointError when it cannot be, or answers in another shape."""
    th = torch()
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0)
    try:
        with th.no_grad():
            output = part.module(*(th.from_numpy(array) for array in feeds.values()))
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the network cannot be called with {', '.join(feeds)} ({type(error).__name__}: {line})",
            expected="module(sample, timestep[, observation][, class_labels])",
            fix="say how with call=lambda module, sample, timestep: ...",
        ) from error
    wanted = feeds["sample"].shape
    if tuple(getattr(output, "shape", ())) != wanted:
        raise CheckpointError(
            f"the network's output has shape {tuple(getattr(output, 'shape', ()))}",
            expected=f"{wanted}, as its sample",
            fix="cut or reshape it in call=",
        )
