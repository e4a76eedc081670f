"""From a bundle and a prompt to images: the loop an app embeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .backends import Opener, Session, open_session
from .bundle import Bundle
from .conditioning import conditions, encode_text, open_tokenizer, token_ids
from .denoiser import Denoiser, by_graph, network_inputs
from .errors import Cancelled, MissingExtra
from .given import bring, encode
from .grids import Grid
from .manifest import Manifest
from .noise import Noise
from .plan import Plan
from .process import Array
from .request import check, check_graphs, choose_plan, guidance_of, shape_of, subjects_of
from .step import Step
from .tiling import Tiling, tiling

__all__ = ["Output", "Pipeline", "StepDone"]


@dataclass(frozen=True)
class Output:
    images: Any
    """output_type "pil": list of PIL.Image; "np": float32 [n, height, width, channels] in 0..1; "latent": float32
    [n, channels, ...], the clean sample before decoding."""
    timings: dict[str, Any]
    """Seconds: load, text, denoise, decode, total, and step, a list."""
    seeds: tuple[int, ...]
    plan: Plan


@dataclass(frozen=True)
class StepDone:
    """What `Pipeline.generate` yields after each step."""

    index: int
    steps: int
    timestep: float
    x: Array
    x0: Array
    """The network's guess of the clean sample, [n, channels, ...]: decode it for a preview."""


Callback = Callable[["Pipeline", int, float, dict[str, Array]], Any]


@dataclass
class Pipeline:
    """A bundle ready to draw. Parts are opened when first used; a context manager, or call `close`.

    pipeline = Pipeline.from_pretrained("emoji-64-bundle")
    pipeline("a rooster", num_inference_steps=20, seed=1).images[0].save("rooster.png")
    """

    bundle: Bundle
    low_memory: bool = False
    """Close each part as soon as its stage is over, so that the largest part bounds memory, not their sum."""
    threads: int | None = None
    _sessions: dict[str, Session] = field(default_factory=dict)
    _openers: Mapping[str, Opener] = field(default_factory=dict)
    _tokenizer: Any = None
    _load_s: float = 0.0
    _stop: bool = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str],
        *,
        low_memory: bool = False,
        threads: int | None = None,
        check: Literal["hash", "size"] = "hash",
    ) -> Pipeline:
        """Open a bundle folder.

        threads  cores for one network call; None lets the engine take all
        check    "hash" reads every file once and compares; "size" trusts files of the right size
        Raises BundleError naming the file at fault.
        """
        start = time.perf_counter()
        opened = cls(Bundle.open(Path(path), check=check), low_memory, threads)
        opened._load_s = time.perf_counter() - start
        return opened

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Array | None = None,
        output_type: str = "pil",
        sampler: str | None = None,
        times: str | Grid | ArrayLike | None = None,
        plan: str | Plan | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        observation: Any = None,
        tile: int | None = None,
        callback_on_step_end: Callback | None = None,
    ) -> Output:
        """Draw images; the arguments are diffusers' own.

        Image i of the call starts from `seed + i`, exactly as diffusers does with one generator per image, so each
        can be drawn again alone. `sampler` and `times` name a sampler and a time grid (SAMPLERS and GRIDS of the
        runtime; `times` may also be a function like those in GRIDS, or the times themselves); `plan` is one of the
        bundle's plans by name, or a Plan, in their stead. `latents` replaces the starting noise (standard normal,
        [n, channels, h, w]).
        `image` (pictures, or clean samples [n, channels, h, w]) is noised as far as `strength` says and drawn from
        there (0.8 unless said otherwise); with `mask_image`, light where to paint, the rest of it is kept (strength 1).
        `observation` is what a restoration model is given, in the same forms.
        `tile` decodes the picture in windows of that many pixels a side, see `decode`.
        `callback_on_step_end(pipeline, index, timestep, {"latents": x})` is called after each step.
        Raises BadInput for arguments the bundle cannot serve, Cancelled after `interrupt`.
        """
        running = self.generate(
            prompt,
            negative_prompt,
            class_labels=class_labels,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            seed=seed,
            latents=latents,
            output_type=output_type,
            sampler=sampler,
            times=times,
            plan=plan,
            image=image,
            strength=strength,
            mask_image=mask_image,
            observation=observation,
            tile=tile,
        )
        while True:
            try:
                done = next(running)
            except StopIteration as end:
                output: Output = end.value
                return output
            if callback_on_step_end is not None:
                callback_on_step_end(self, done.index, done.timestep, {"latents": done.x})

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        *,
        class_labels: int | Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        seed: int = 0,
        latents: Array | None = None,
        output_type: str = "pil",
        sampler: str | None = None,
        times: str | Grid | ArrayLike | None = None,
        plan: str | Plan | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        observation: Any = None,
        tile: int | None = None,
    ) -> Generator[StepDone, None, Output]:
        """The same, step by step: yields after each step and returns the Output. Stop iterating to cancel."""
        begin = time.perf_counter()
        self._stop = False
        if image is None:
            check(strength is None and mask_image is None, "strength or mask_image without image", "an image")
        else:
            check(plan is None or strength is None, "a plan and a strength", "one: a plan has its own start")
            if strength is None and plan is None:
                strength = 0.8 if mask_image is None else 1.0  # as diffusers
        table = (
            plan
            if isinstance(plan, Plan)
            else self.plan(
                num_inference_steps,
                sampler,
                times,
                plan,
                height=height,
                width=width,
                strength=strength,
                guidance_scale=guidance_scale,
            )
        )
        check_graphs(self.manifest, table)
        starts = image is None or table.givens > (observation is not None)
        check(starts, "an image for a plan that starts from noise", "one or the other")
        prompts, labels = subjects_of(self.manifest, prompt, class_labels, num_images_per_prompt)
        n = len(prompts or labels or range(num_images_per_prompt))
        scale = guidance_of(self.manifest, guidance_scale)
        shape = shape_of(self.manifest, height, width)
        check(output_type in ("pil", "np", "latent"), f"output_type {output_type!r}", "pil, np or latent")
        self._tiling(tile)  # refuses what cannot be before the denoiser runs
        streams = [Noise(seed + i) for i in range(n)]
        if latents is None:
            latents = _draw(streams, shape)
        latents = np.asarray(latents, dtype=np.float32)
        check(latents.shape == (n, *shape), f"latents of shape {latents.shape}", str((n, *shape)))

        loaded = self._load_s
        text_start = time.perf_counter()
        condition, unconditional = self._condition(prompts, negative_prompt, labels, n, guided=scale != 1.0)
        self._release("text_encoder")
        text_s = time.perf_counter() - text_start - (self._load_s - loaded)

        brought = bring(image, mask_image, observation, n, shape, self.manifest.sample, self._encode_image)
        self._release("vae_encoder")
        parts, graphs = self.manifest.parts, self.manifest.graphs
        takes_observation = "observation" in network_inputs(parts[self.manifest.denoiser])
        for inputs in (condition, unconditional):
            if inputs is not None and brought.observation is not None and takes_observation:
                inputs["observation"] = brought.observation
        wanted = {graphs[call.graph] for call in table.calls}

        def denoiser_of(graph: str) -> Denoiser:
            name = graphs[graph]
            for other in wanted - {name}:
                self._release(other)
            return Denoiser(
                self._open(name), parts[name], condition, unconditional, scale, brought.observation
            )

        for name in wanted if not self.low_memory else {graphs[table.calls[0].graph]}:
            self._open(name)
        denoise = by_graph(denoiser_of)
        loaded = self._load_s
        denoise_start = mark = time.perf_counter()
        timesteps = [call.timestep for call in table.calls if call.next is not None]
        step_s = []
        step = Step(0, latents, latents)
        x, given = table.start(latents, brought.arrays), brought.arrays
        noise = partial(_draw, streams, shape)
        for step in table.run(brought.keep(denoise), x, noise, given):
            step_s.append(time.perf_counter() - mark)
            yield StepDone(step.index, table.states, timesteps[step.index], step.x, step.x0)
            if self._stop:
                raise Cancelled(f"interrupted after step {step.index + 1} of {table.states}")
            mark = time.perf_counter()
        denoise_s = time.perf_counter() - denoise_start - (self._load_s - loaded)
        del denoise
        for name in wanted:
            self._release(name)

        loaded_2 = self._load_s
        decode_start = time.perf_counter()
        x = brought.finish(step.x)
        images: Any = x if output_type == "latent" else self.decode(x, tile)
        if output_type == "pil":
            images = _to_pil(images)
        self._release("vae_decoder")
        decode_s = time.perf_counter() - decode_start - (self._load_s - loaded_2)
        timings = {
            "load": self._load_s,
            "text": text_s,
            "denoise": denoise_s,
            "decode": decode_s,
            "total": time.perf_counter() - begin,
            "step": step_s,
        }
        return Output(images, timings, tuple(seed + i for i in range(n)), table)

    def plan(
        self,
        steps: int | None = None,
        sampler: str | None = None,
        times: str | Grid | ArrayLike | None = None,
        name: str | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        strength: float | None = None,
        guidance_scale: float | None = None,
    ) -> Plan:
        """The plan a call with these arguments runs: one of the bundle's, or one traced for other steps or, where the
        model's grid depends on it, another size. Sampler "auto" is "auto_guided" for a call with guidance.

        Raises PlanError for unknown names, and for a named plan with steps, a sampler or a grid beside it.
        """
        if sampler == "auto" and guidance_of(self.manifest, guidance_scale) != 1.0:
            sampler = "auto_guided"
        return choose_plan(
            self.manifest, steps, sampler, times, name, height=height, width=width, strength=strength
        )

    def decode(self, x0: Array, tile: int | None = None) -> Array:
        """Clean samples to images. [n, channels, h, w] -> float32 [n, height, width, channels] in 0..1.

        For previews too. One image at a time: on a CPU a batch is no faster and needs n times the memory.
        `tile` bounds the memory: windows of that many pixels a side, one after the other. The same picture where the
        bundle's decoder is a small one of convolutions alone; of a VAE's own, windows are blended, and differ a little.
        """
        sample, windows = self.manifest.sample, self._tiling(tile)
        if "vae_decoder" in self.manifest.parts:
            spec = self.manifest.parts["vae_decoder"]
            session = self._open("vae_decoder")
            latent = (x0 / sample.scaling_factor + sample.shift_factor).astype(spec.inputs[0].dtype)
            feed, out = spec.inputs[0].name, spec.outputs[0].name

            def run(one: Array) -> Array:
                return session.run({feed: one}, [out])[out]

            each = [latent[i : i + 1] for i in range(len(latent))]
            x0 = np.concatenate(
                [windows.decode(run, one, sample.factor) if windows else run(one) for one in each]
            )
        return np.clip(x0.transpose(0, 2, 3, 1).astype(np.float32) / 2 + 0.5, 0, 1)

    def _tiling(self, tile: int | None) -> Tiling | None:
        """Windows of `tile` pixels for this bundle's decoder. Raises BadInput where it has none, or takes one size."""
        if tile is None:
            return None
        part = self.manifest.parts.get("vae_decoder")
        check(part is not None, f"tiles of {tile!r} pixels for a bundle that decodes nothing", "no tile")
        assert part is not None
        only = "no tile: a decoder of fixed sizes draws its one picture whole"
        check(
            all(isinstance(axis, str) for axis in part.inputs[0].shape[2:]), f"tiles of {tile!r} pixels", only
        )
        return tiling(tile, self.manifest.sample.factor, part.margin)

    def _encode_image(self, pixels: Array) -> Array:
        """[n, 3, height, width] in -1..1 to clean samples."""
        if "vae_decoder" not in self.manifest.parts:
            return pixels
        found, fix = "a picture for a bundle without a vae_encoder", "give clean samples [n, channels, h, w]"
        check("vae_encoder" in self.manifest.parts, found, "a bundle that has one", fix)
        return encode(
            self._open("vae_encoder"), self.manifest.parts["vae_encoder"], self.manifest.sample, pixels
        )

    def interrupt(self) -> None:
        """Stop the running call after its current step (from a callback or another thread)."""
        self._stop = True

    def close(self) -> None:
        """Free every loaded part. The pipeline can be used again; it reopens what it needs."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, name: str) -> Session:
        if name not in self._sessions:
            start = time.perf_counter()
            spec = self.manifest.parts[name]
            opener = self._openers.get(name) or partial(open_session, threads=self.threads)
            self._sessions[name] = opener(self.bundle.file(spec.graph), spec)
            self._load_s += time.perf_counter() - start
        return self._sessions[name]

    def _release(self, name: str) -> None:
        if self.low_memory and name in self._sessions:
            self._sessions.pop(name).close()

    def _condition(
        self,
        prompts: list[str] | None,
        negative: str | None,
        labels: list[int] | None,
        n: int,
        *,
        guided: bool,
    ) -> tuple[dict[str, Array], dict[str, Array] | None]:
        """See `conditions`."""
        return conditions(self.manifest, prompts, negative, labels, n, self._encode, guided=guided)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Array]:
        """Each distinct prompt to float [1, tokens, features]."""
        spec = self.manifest.tokenizer
        assert spec is not None, "subjects_of refuses prompts for bundles without a tokenizer"
        if self._tokenizer is None:
            start = time.perf_counter()
            self._tokenizer = open_tokenizer(self.bundle.file(spec.file), spec)
            self._load_s += time.perf_counter() - start
        tokens = token_ids(self._tokenizer, spec, prompts)  # refuses a prompt before a part is opened for it
        return encode_text(self._open("text_encoder"), self.manifest.parts["text_encoder"], tokens)


def _draw(streams: Sequence[Noise], shape: Sequence[int]) -> Array:
    return np.stack([stream.randn(shape) for stream in streams])


def _to_pil(images: Array) -> list[Any]:
    try:
        to_image = import_module(".backends.PIL", __package__).to_image
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise MissingExtra.of("pillow", "onnx") from None
    return [to_image(pixels) for pixels in np.rint(images * 255).astype(np.uint8)]
