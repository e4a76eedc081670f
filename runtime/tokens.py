"""Samplers over tokens, for masked, uniform and Gaussian diffusion.

The same spirit as plan.py: a sampler is compiled to a table, one row a step, and one loop runs every table. Those whose
times depend on what is drawn (first hitting, decoding by confidence) are loops of their own.

    denoise  (tokens [batch, length] int64, t [batch]) -> logits [batch, length, vocabulary] of the clean tokens
    uniform  shape -> float64 in [0, 1), `Noise(seed).rand` for one

Probabilities are float64 throughout: float32 sampling quietly lowers the temperature (Zheng et al. 2024,
arXiv:2409.02908).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from .discrete import Gaussian, Masked, Tokens, Uniform, Uniforms, need
from .errors import BadInput, FewstepError, PlanError
from .process import Array

__all__ = [
    "Row",
    "TokenPlan",
    "TokenStep",
    "ancestral",
    "by_confidence",
    "first_hitting",
    "in_blocks",
    "remdm",
    "remdm_loop",
]

TokenDenoise = Callable[[Tokens, Array], Array]

MAX_ROWS = 10_000
"""ReMDM's longest published run has 4096."""


@dataclass(frozen=True, slots=True)
class Row:
    """One step from t to s."""

    t: float
    s: float
    remask: float = 0.0
    """Probability that a token already there is masked again (ReMDM's sigma)."""
    scale: float = 1.0
    """What the probability of unmasking is multiplied with: a number to learn (LSD's Phi)."""
    hold: float | None = None
    """alpha that stays the same over this step, whatever t and s are (ReMDM's loop)."""


@dataclass(frozen=True, slots=True)
class TokenStep:
    index: int
    tokens: Tokens
    calls: int
    """Network calls so far."""


@dataclass(frozen=True)
class TokenPlan:
    """A table of steps over tokens."""

    process: Masked | Uniform | Gaussian
    rows: tuple[Row, ...]
    confidence: bool = False
    """Whether remasking is shared out by softmax(-p), p the probability a token had when it was drawn."""

    def run(
        self,
        denoise: TokenDenoise,
        tokens: Tokens,
        uniform: Uniforms,
        *,
        time_free: bool = False,
        top_p: float = 1.0,
        temperature: float = 1.0,
    ) -> Iterator[TokenStep]:
        """Sample, from `process.start` or from a prompt: what is not [MASK] at the start stays.

        time_free  the network ignores t, so a step that changed no token needs no new call (MDLM's cache)
        top_p      nucleus: only the likeliest tokens up to this probability, in all, are drawn
        Two uniforms a token are drawn each step, whatever happens. FewstepError for logits with NaN or a wrong shape.
        """
        process = self.process
        mask = process.mask if isinstance(process, Masked) else None
        tokens = _checked(tokens).copy()
        free, sure = tokens == mask, np.zeros(tokens.shape)
        p, calls = None, 0
        for index, row in enumerate(self.rows):
            move, draw = uniform(tokens.shape), uniform(tokens.shape)
            if p is None:
                p = _predict(denoise, tokens, np.full(len(tokens), row.t), mask, top_p, temperature)
                calls += 1
            if isinstance(process, Masked):
                a_t, a_s = process.alpha([row.t, row.s]) if row.hold is None else (row.hold, row.hold)
                hidden, sigma = tokens == mask, np.full(tokens.shape, row.remask)
                if self.confidence:
                    weight = np.where(free & ~hidden, np.exp(-sure), 0.0)
                    sigma *= weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
                shown = (a_s - (1 - sigma) * a_t) / (1 - a_t) * row.scale + (a_s == 1)  # the last shows all
                reveal, hide = hidden & (move < shown), free & ~hidden & (move < sigma)
                changed = bool(reveal.any() or hide.any())
                tokens = np.where(hide, process.mask, tokens)
                tokens[reveal], sure[reveal] = _draw(p[reveal], draw[reveal])
            else:
                before, likely = tokens, process.posterior(tokens, p, row.t, row.s)
                tokens, _ = _draw(likely, draw)
                changed = bool((tokens != before).any())
            if changed or not time_free:
                p = None
            yield TokenStep(index, tokens.copy(), calls)

    def scaled(self, factors: Sequence[float]) -> TokenPlan:
        """The plan with one learned factor a row. LSD, "learned sampler distillation" (2025)."""
        need(len(factors) == len(self.rows), f"{len(factors)} factors", f"{len(self.rows)}, one a row")
        return replace(
            self, rows=tuple(replace(r, scale=float(f)) for r, f in zip(self.rows, factors, strict=True))
        )

    def to_json(self) -> dict[str, Any]:
        kind = self.process
        process = {f.name: getattr(kind, f.name) for f in fields(kind) if f.init} | {"kind": kind.kind}
        return {"process": process, "rows": [asdict(row) for row in self.rows], "confidence": self.confidence}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TokenPlan:
        """Read what `to_json` wrote. Raises BadInput naming what is damaged."""
        kinds = {kind.kind: kind for kind in (Masked, Uniform, Gaussian)}
        try:
            process = {**data["process"]}
            made: Any = kinds[process.pop("kind")](**process)
            rows = tuple(Row(**row) for row in data["rows"])
            need(len(data) == 3, f"a token plan with {sorted(data)}", "process, rows and confidence")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise PlanError(f"a token plan that cannot be read ({error})") from None
        for k, row in enumerate(rows):
            numbers = [v for f in fields(row) if (v := getattr(row, f.name)) is not None or f.name != "hold"]
            good = all(type(v) in (int, float) and math.isfinite(v) for v in numbers)
            good = good and 0 <= row.s < row.t <= made.t_max and 0 <= row.remask <= 1 and row.scale >= 0
            good = good and (row.hold is None or 0 < row.hold < 1)
            need(good, f"row {k} of a token plan: {row}", "probabilities, and t above s")
        good = 1 <= len(rows) <= MAX_ROWS and type(data["confidence"]) is bool
        need(good, f"a token plan of {len(rows)} rows", f"1 to {MAX_ROWS} rows, confidence true or false")
        return cls(made, rows, data["confidence"])


def ancestral(process: Masked | Uniform | Gaussian, steps: int) -> TokenPlan:
    """Ancestral sampling in even times. MDLM, section 3.2.2; D3PM, equation 4, with the exact Bayes average."""
    need(
        type(steps) is int and 1 <= steps <= min(MAX_ROWS, getattr(process, "levels", MAX_ROWS)),
        f"{steps!r} steps",
        f"1 to {MAX_ROWS}, and no more than levels",
    )
    times = np.linspace(process.t_max, 0, steps + 1)
    times = (np.round(times) if isinstance(process, Gaussian) else times).tolist()
    return TokenPlan(process, tuple(Row(t, s) for t, s in pairwise(times)))


def remdm(
    process: Masked,
    steps: int,
    *,
    strategy: str = "rescale",
    eta: float = 0.02,
    switch: float = 1.0,
    confidence: bool = False,
) -> TokenPlan:
    """ReMDM: tokens can be masked again, and the marginals stay MDLM's. Wang et al. 2025 <arXiv:2503.00307>.

    strategy    cap: sigma = min(eta, sigma_max). rescale: eta sigma_max. sigma_max = min(1, (1 - alpha_s) / alpha_t)
    switch      remask only from this time on
    confidence  share the remasking out by confidence (with rescale and eta 1, the paper's ReMDM-conf; marginals then
                hold only roughly, as published)
    """
    need(
        strategy in ("cap", "rescale") and 0 <= eta <= 1,
        f"{strategy!r} with eta {eta!r}",
        "cap or rescale, 0 to 1",
    )
    rows = []
    for row in ancestral(process, steps).rows:
        a_t, a_s = map(float, process.alpha([row.t, row.s]))
        most = min(1.0, (1 - a_s) / a_t) if a_t > 0 else 1.0
        sigma = min(eta, most) if strategy == "cap" else eta * most
        rows.append(replace(row, remask=sigma if row.t <= switch else 0.0))
    return TokenPlan(process, tuple(rows), confidence)


def remdm_loop(
    process: Masked,
    steps: int,
    *,
    eta: float = 0.02,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
) -> TokenPlan:
    """ReMDM's loop: decode up to alpha_on, remask and draw again at that alpha, finish. The authors' values.

    Of the steps, those above t_on decode, those at t_off and below finish, the others loop.
    """
    need(0 < t_off < t_on < 1 and 0 < alpha_on < 1, f"t_on {t_on!r}, t_off {t_off!r}", "0 < t_off < t_on < 1")
    share = np.interp(np.linspace(1, 0, steps + 1), [0, t_off, t_on, 1], [0, 1 - alpha_on, 1 - alpha_on, 1])
    rows, sigma = [], min(eta, (1 - alpha_on) / alpha_on)
    for t, s in process.t_of_masked(np.stack([share[:-1], share[1:]], axis=1)).tolist():
        looping = t - s < 1e-9  # the same share masked, but for rounding
        rows.append(Row(t, 0.0, sigma, hold=alpha_on) if looping else Row(t, s))
    return TokenPlan(process, tuple(rows))


def first_hitting(
    process: Masked,
    denoise: TokenDenoise,
    tokens: Tokens,
    uniform: Uniforms,
    *,
    parallel: int = 1,
    top_p: float = 1.0,
    temperature: float = 1.0,
) -> Iterator[TokenStep]:
    """First-hitting sampler: no idle step, one call a token. Zheng et al. 2024, algorithm 1 <arXiv:2409.02908>.

    Of n masked tokens the next is unmasked when the share masked has fallen to share * u^(1/n); which one is even odds.
    parallel  tokens unmasked by a call; above 1 they are drawn independently, at the time the last of them is due
    With an exact network and one token a call the samples follow the data exactly.
    """
    need(type(parallel) is int and parallel >= 1, f"{parallel!r} tokens a call", "1 or more")
    tokens = _checked(tokens).copy()
    share, rows = np.full(len(tokens), 1 - float(process.alpha(1.0))), np.arange(len(tokens))[:, None]
    for index in range(-(-tokens.shape[1] // parallel)):
        hidden = tokens == process.mask
        left = hidden.sum(1)
        if not left.any():
            return
        for j, u in enumerate(uniform((parallel, len(tokens)))):
            share = share * np.where(left > j, u ** (1 / np.maximum(left - j, 1)), 1.0)
        p = _predict(denoise, tokens, process.t_of_masked(share), process.mask, top_p, temperature)
        key, draw = uniform((2, *tokens.shape))
        chosen = np.argsort(np.where(hidden, key, 2.0), axis=1)[:, :parallel]
        reveal = np.zeros_like(hidden)
        reveal[rows, chosen] = True
        reveal &= hidden
        tokens[reveal], _ = _draw(p[reveal], draw[reveal])
        yield TokenStep(index, tokens.copy(), index + 1)


def by_confidence(
    process: Masked, denoise: TokenDenoise, tokens: Tokens, *, threshold: float = 0.9
) -> Iterator[TokenStep]:
    """Greedy decoding of every token surer than the threshold, at least one a call. Fast-dLLM, Wu et al. 2025.

    <arXiv:2505.22618>; 0.9 is the authors' threshold, version 2's too.
    """
    tokens = _checked(tokens).copy()
    for index in range(tokens.shape[1]):
        hidden = tokens == process.mask
        if not hidden.any():
            return
        p = _predict(denoise, tokens, process.t_of_masked(hidden.mean(1)), process.mask, 1.0, 1.0)
        sure = np.where(hidden, p.max(-1), -1.0)
        reveal = hidden & ((sure > threshold) | (sure == sure.max(1, keepdims=True)))
        tokens[reveal] = p.argmax(-1)[reveal]
        yield TokenStep(index, tokens.copy(), index + 1)


def in_blocks(
    sample: Callable[[TokenDenoise, Tokens], Iterator[TokenStep]],
    denoise: TokenDenoise,
    tokens: Tokens,
    size: int,
) -> Iterator[TokenStep]:
    """Block diffusion: left to right, each block sampled given all before it. BD3LM, Arriola et al. 2025.

    <arXiv:2503.09573>  sample is any sampler here with its other arguments bound. `denoise` sees blocks up to the
    current one, so a network with a key-value cache computes finished ones once.
    """
    index = calls = 0
    tokens = _checked(tokens).copy()
    for begin in range(0, tokens.shape[1], size):
        before, base = tokens[:, :begin], calls

        def inside(block: Tokens, t: Array, before: Tokens = before) -> Array:
            return denoise(np.concatenate([before, block], axis=1), t)[:, before.shape[1] :]

        for step in sample(inside, tokens[:, begin : begin + size]):
            tokens[:, begin : begin + size], calls = step.tokens, base + step.calls
            yield TokenStep(index, tokens.copy(), calls)
            index += 1


def _predict(
    denoise: TokenDenoise, tokens: Tokens, t: Array, mask: int | None, top_p: float, temperature: float
) -> Array:
    """Probabilities of the clean tokens, [batch, length, vocabulary] float64; none for [MASK]."""
    logits = np.array(denoise(tokens, t), dtype=np.float64)
    if logits.shape[:-1] != tokens.shape:
        raise FewstepError(
            f"logits of shape {logits.shape} for tokens {tokens.shape}", expected="one row a token"
        )
    if mask is not None and mask < logits.shape[-1]:
        logits[..., mask] = -np.inf
    top = logits.max(-1, keepdims=True)
    if not np.isfinite(top).all():
        fix = "a layer overflows in this precision; export that part in float32"
        raise FewstepError(f"the logits at t = {t.flat[0]:g} hold NaN or infinity", fix=fix)
    p = np.exp((logits - top) / temperature)
    p /= p.sum(-1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-p, axis=-1, kind="stable")
        ranked = np.take_along_axis(p, order, -1)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0.0  # the one that crosses top_p stays
        np.put_along_axis(p, order, ranked / ranked.sum(-1, keepdims=True), -1)
    return np.asarray(p)


def _draw(p: Array, u: Array) -> tuple[Tokens, Array]:
    """Invert the cumulative distribution at u: the tokens, and the probability each had. p need not sum to 1."""
    total = p.cumsum(-1)
    token = (total > (u * total[..., -1])[..., None]).argmax(-1)
    return token, np.take_along_axis(p, token[..., None], -1)[..., 0] / total[..., -1]


def _checked(tokens: Tokens) -> Tokens:
    tokens = np.asarray(tokens)
    good = tokens.ndim == 2 and tokens.size > 0 and np.issubdtype(tokens.dtype, np.integer)
    need(good, f"tokens of shape {tokens.shape} and type {tokens.dtype}", "[batch, length] whole numbers")
    return tokens.astype(np.int64)
