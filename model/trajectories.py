"""The shipped plan run on the torch modules: what every network is fed on the way, and where the way ends.

Distillation trains on the latents at the end, quantization calibrates on the inputs in between; neither needs data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.denoiser import Denoiser, by_graph, network_inputs
from ..runtime.errors import BadInput
from ..runtime.manifest import PartSpec
from ..runtime.noise import Noise
from ..runtime.plan import Plan
from ..runtime.two_graphs import SMALL
from .libraries import quiet, torch, transformers
from .model import Model, Part

__all__ = ["PROMPTS", "Trajectory", "conditions_of", "run_part", "text_inputs", "trajectories"]

Array = NDArray[Any]

PROMPTS = (
    *("a red apple", "a cat", "a house by the sea", "a portrait of a woman", "a green tree", "a blue car"),
    *(
        "a mountain at night",
        "a bowl of fruit",
        "a yellow flower",
        "a dog on a beach",
        "an old book",
        "a bridge",
    ),
    *("a white bird", "a cup of coffee", "a city street", "a smiling face"),
)
"""Where none are given: short, since a small tokenizer may spend a token on every letter."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One batch on its way from noise to data."""

    seeds: tuple[int, ...]
    """Sample i starts from the noise of seeds[i], as Pipeline's do."""
    subjects: tuple[str | int | None, ...]
    """Prompt or class label of each sample."""
    texts: tuple[Mapping[str, Array], ...]
    """What the text encoder was fed for this batch, one [1, length] each; () without text."""
    calls: tuple[Mapping[str, Array], ...]
    """What the denoiser was fed at each network call, by input name: [batch, ...], or [2 batch, ...] under guidance,
    the unconditional half first. Call k is row k of the plan."""
    latent: Array
    """[batch, channels, height, width]: the clean sample in the denoiser's scale, before / scaling_factor."""


def trajectories(
    model: Model,
    plan: Plan,
    seeds: Sequence[int],
    *,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance: float | None = None,
    batch: int = 8,
    calls: bool = True,
) -> Iterator[Trajectory]:
    """Run `plan` on the torch modules from every seed, a batch at a time, at the model's own size.

    prompts   sample i gets prompt i modulo their number; empty for PROMPTS where the model takes text
    labels    the same for class labels; empty for labels spread evenly
    guidance  None for the model's own scale
    calls     whether to keep what the denoiser is fed, which may be much
    Seed, prompt and guidance alike, the latent is that of a Pipeline on the exported bundle, but for rounding.
    Raises BadInput for prompts or labels the model does not take, a prompt too long for it, or a plan that calls a
    denoiser the model has not.
    """
    for graph in {call.graph for call in plan.calls}:
        _part(model, graph)
    subjects = _subjects(model, len(seeds), prompts, labels)
    scale = model.guidance.scale if guidance is None else guidance
    scale = 1.0 if model.guidance.kind == "none" else scale
    encode = _Encoder(model)
    part = model.parts[model.denoiser]
    spec = PartSpec("torch", "", part.inputs, part.outputs)
    sample = model.sample
    shape = (sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    for begin in range(0, len(seeds), batch):
        mine, about = tuple(seeds[begin : begin + batch]), tuple(subjects[begin : begin + batch])
        streams = [Noise(seed) for seed in mine]
        draw = partial(_draw, streams, shape)
        latent = draw().astype(np.float32)
        condition, nothing, texts = _condition(model, spec, about, encode, guided=scale != 1.0)
        observation = None
        if hasattr(model.process, "gamma"):  # a restoration model: noise stands in for what it is given
            observation = np.stack([Noise(seed + 1).randn(shape) for seed in mine]).astype(np.float32)
            for inputs in (condition, nothing):
                if inputs is not None and "observation" in network_inputs(spec):
                    inputs["observation"] = observation
        session = _Recorder(part, keep=calls)
        denoiser = Denoiser(session, spec, condition, nothing, scale, observation)
        denoise = by_graph(partial(_of_graph, model, denoiser, session))
        given = () if observation is None else (observation,)
        x = plan.start(latent, given)
        for step in plan.run(denoise, x, draw, given):
            x = step.x
        yield Trajectory(mine, about, texts, tuple(session.calls), x.astype(np.float32))


def _of_graph(model: Model, denoiser: Denoiser, session: _Recorder, graph: str) -> Denoiser:
    """The same denoiser by another graph; what is fed to all of them is kept in one list."""
    return replace(denoiser, session=replace(session, part=_part(model, graph)))


def _part(model: Model, graph: str) -> Part:
    """What a plan's row calls by that name."""
    name = model.denoiser if graph == "denoiser" else graph
    if name not in model.parts:
        raise BadInput(
            f"a plan that calls the graph {graph!r}, for {model.name}",
            expected="denoiser" + (f" or {SMALL}" if model.small else ""),
            fix="put a small model beside it (with_small)",
        )
    return model.parts[name]


def conditions_of(model: Model, subjects: Sequence[Any]) -> tuple[dict[str, Array], dict[str, Array] | None]:
    """What the denoiser is fed beside sample and timestep for each prompt or label, by name in its order.

    Returns [subjects, ...] arrays, and [1, ...] for nothing in particular; None where the model knows no nothing.
    Raises BadInput for a prompt that is too long.
    """
    part = model.parts[model.denoiser]
    spec = PartSpec("torch", "", part.inputs, part.outputs)
    guided = model.guidance.kind != "none"
    condition, nothing, _ = _condition(model, spec, subjects, _Encoder(model), guided=guided)
    return condition, None if nothing is None else {name: array[:1] for name, array in nothing.items()}


def text_inputs(model: Model, prompts: Sequence[str]) -> list[dict[str, Array]]:
    """What the text encoder is fed for each prompt, [1, length] each. Raises BadInput for one that is too long."""
    encode, name = _Encoder(model), model.parts["text_encoder"].inputs[0].name
    return [{name: encode.ids(prompt)} for prompt in prompts]


def run_part(part: Part, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The torch module's outputs by name, without gradients."""
    th = torch()
    with th.no_grad():
        outputs = part.module(*(th.from_numpy(np.ascontiguousarray(feeds[i.name])) for i in part.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {spec.name: output.numpy() for spec, output in zip(part.outputs, outputs, strict=True)}


@dataclass(frozen=True)
class _Recorder:
    """The denoiser's module behind the runtime's Session; keeps what it is fed."""

    part: Part
    calls: list[Mapping[str, Array]] = field(default_factory=list)
    keep: bool = True

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        if self.keep:
            self.calls.append({name: value.copy() for name, value in feeds.items()})
        return run_part(self.part, feeds)

    def close(self) -> None:
        """The module belongs to the model."""


def _subjects(
    model: Model, count: int, prompts: Sequence[str], labels: Sequence[int]
) -> list[str | int | None]:
    """What each sample shows."""
    if prompts and model.tokenizer is None:
        raise BadInput(f"prompts for {model.name}, a model without text", expected="no prompts")
    if labels and model.classes is None:
        raise BadInput(f"class labels for {model.name}, a model without classes", expected="no labels")
    if model.tokenizer is not None:
        given = tuple(prompts) or PROMPTS
        return [given[i % len(given)] for i in range(count)]
    if model.classes is None:
        return [None] * count
    if wrong := [label for label in labels if not 0 <= label < model.classes]:
        raise BadInput(f"class label {wrong[0]}", expected=f"0 to {model.classes - 1}")
    spread = (
        tuple(labels) or np.linspace(0, model.classes - 1, min(count, model.classes)).astype(int).tolist()
    )
    return [spread[i % len(spread)] for i in range(count)]


def _condition(
    model: Model, spec: PartSpec, about: Sequence[Any], encode: _Encoder, *, guided: bool
) -> tuple[dict[str, Array], dict[str, Array] | None, tuple[Mapping[str, Array], ...]]:
    """What the denoiser is conditioned on, the same for nothing in particular, and what the text encoder was fed."""
    wanted = network_inputs(spec)
    condition: dict[str, Array] = {}
    empty: dict[str, Array] = {}
    texts: tuple[Mapping[str, Array], ...] = ()
    if "encoder_hidden_states" in wanted:
        condition["encoder_hidden_states"] = np.concatenate([encode(text) for text in about])
        if guided:
            empty["encoder_hidden_states"] = np.repeat(encode(""), len(about), axis=0)
        texts = tuple(encode.fed[text] for text in dict.fromkeys([*about, *([""] if guided else [])]))
    if "class_labels" in wanted:
        condition["class_labels"] = np.asarray(about, dtype=np.int64)
        # the label after the last means "no class" (DiT, Peebles and Xie 2022, arXiv:2212.09748)
        empty["class_labels"] = np.full(len(about), model.classes, dtype=np.int64)
    return condition, empty if guided and empty else None, texts


class _Encoder:
    """Prompts to hidden states, each distinct one once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.fed: dict[str, Mapping[str, Array]] = {}
        self._states: dict[str, Array] = {}
        self._tokenizer: Any = None

    def __call__(self, text: str) -> Array:
        """[1, length, width]. Raises BadInput for more tokens than the model takes."""
        if text not in self._states:
            part = self.model.parts["text_encoder"]
            self.fed[text] = {part.inputs[0].name: self.ids(text)}
            self._states[text] = run_part(part, self.fed[text])[part.outputs[0].name]
        return self._states[text]

    def ids(self, text: str) -> Array:
        """int64 [1, length]: start, the prompt, end, padding."""
        files = self.model.tokenizer
        assert files is not None, "a denoiser with encoder_hidden_states comes with a tokenizer"
        if self._tokenizer is None:
            with quiet():
                kind = transformers().CLIPTokenizer
                self._tokenizer = kind.from_pretrained(str(files.folder), local_files_only=True)
        ids = self._tokenizer(text).input_ids
        if len(ids) > files.max_length:
            raise BadInput(
                f"a prompt of {len(ids)} tokens ({text[:40]!r}...)",
                expected=f"at most {files.max_length} with begin and end marks",
                fix=f"shorten it by {len(ids) - files.max_length} tokens",
            )
        return np.array([ids + [files.pad_id] * (files.max_length - len(ids))], dtype=np.int64)


def _draw(streams: Sequence[Noise], shape: Sequence[int]) -> Array:
    return np.stack([stream.randn(shape) for stream in streams])
