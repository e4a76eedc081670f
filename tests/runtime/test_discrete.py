"""Diffusion over tokens, against a small joint distribution whose ideal network is a table."""

import itertools
import json
from functools import partial

import numpy as np
import pytest

from fewstep.runtime import Noise
from fewstep.runtime.discrete import Gaussian, Masked, Uniform
from fewstep.runtime.errors import BadInput, FewstepError
from fewstep.runtime.tokens import (
    Row,
    TokenPlan,
    ancestral,
    by_confidence,
    first_hitting,
    in_blocks,
    remdm,
    remdm_loop,
)

LENGTH, SYMBOLS, MASK = 3, 4, 4
JOINT = np.random.default_rng(7).dirichlet(np.full(SYMBOLS**LENGTH, 0.3)).reshape([SYMBOLS] * LENGTH)
"""Strongly dependent tokens: no product of marginals comes near."""
STATES = np.array(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
PROCESS = Masked(MASK)
RUNS = 20_000


def _conditionals():
    """log p(x_l | the tokens that are there), for all l and all 5^3 partly masked sequences."""
    seen = np.array(list(itertools.product(range(SYMBOLS + 1), repeat=LENGTH)))
    fits = np.all((seen[:, None] == STATES) | (seen[:, None] == MASK), axis=-1) * JOINT.reshape(-1)
    symbol = STATES[:, :, None] == np.arange(SYMBOLS)
    with np.errstate(divide="ignore"):
        logits = np.log(np.einsum("ns,slk->nlk", fits, symbol))
    return np.concatenate([logits, np.full((*logits.shape[:2], 1), 50.0)], axis=-1)  # a logit to be ignored


CONDITIONALS = _conditionals()


def ideal(tokens, t=None):
    return CONDITIONALS[tokens @ [25, 5, 1]]


def frequencies(tokens):
    counts = np.zeros_like(JOINT)
    np.add.at(counts, tuple(tokens.T), 1)
    return counts / len(tokens)


def distance(tokens):
    """Total variation to the joint."""
    return 0.5 * np.abs(frequencies(tokens) - JOINT).sum()


def chi_square(tokens):
    """Pearson's statistic per degree of freedom, over the states that should occur at least five times."""
    expected, found = len(tokens) * JOINT.reshape(-1), len(tokens) * frequencies(tokens).reshape(-1)
    often = expected >= 5
    return float(((found - expected)[often] ** 2 / expected[often]).sum() / often.sum())


def masks(batch=RUNS):
    return np.full((batch, LENGTH), MASK)


def last(steps):
    *_, step = steps
    return step


# masked diffusion


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_first_hitting_follows_the_joint_exactly_with_one_call_a_token(schedule):
    steps = list(first_hitting(Masked(MASK, schedule), ideal, masks(), Noise(0).rand))
    assert [step.calls for step in steps] == [1, 2, 3]
    assert 0.6 < chi_square(steps[-1].tokens) < 1.4  # 64 states: mean 1, standard deviation 0.18
    for step in steps:
        assert ((step.tokens != MASK).sum(1) == step.index + 1).all()


def test_first_hitting_times_are_those_of_ancestral_sampling():
    """The share masked at the first hit of n tokens is u^(1/n): the largest of n uniforms."""
    seen = []

    def network(tokens, t):
        seen.append(t)
        return ideal(tokens)

    list(first_hitting(PROCESS, network, masks(), Noise(1).rand))
    first, second, third = seen
    assert first.mean() == pytest.approx(3 / 4, abs=0.006)
    assert second.mean() == pytest.approx(2 / 4, abs=0.006)
    assert third.mean() == pytest.approx(1 / 4, abs=0.006)
    assert np.all(first > second)
    assert np.all(second > third)


def test_two_tokens_a_call_halve_the_calls_and_lose_their_dependence():
    pair = list(first_hitting(PROCESS, ideal, masks(), Noise(2).rand, parallel=2))
    assert pair[-1].calls == 2
    assert (pair[-1].tokens != MASK).all()
    assert chi_square(pair[-1].tokens) > 5
    assert (
        0.02
        < distance(pair[-1].tokens)
        < distance(last(first_hitting(PROCESS, ideal, masks(), Noise(2).rand, parallel=3)).tokens)
    )


def test_ancestral_sampling_converges_to_the_joint():
    found = [
        distance(last(ancestral(PROCESS, n).run(ideal, masks(), Noise(3).rand)).tokens) for n in (1, 4, 64)
    ]
    noise = distance(STATES[np.random.default_rng(0).choice(64, RUNS, p=JOINT.reshape(-1))])
    assert found[0] > 2 * found[1] > 4 * found[2]
    assert found[2] < 2 * noise


@pytest.mark.parametrize(
    "table",
    [
        ancestral(PROCESS, 20),
        remdm(PROCESS, 20, strategy="cap", eta=0.2),
        remdm(PROCESS, 20, strategy="rescale", eta=0.5),
        remdm(PROCESS, 20, strategy="rescale", eta=1.0, switch=0.6),
        remdm(Masked(MASK, "cosine"), 20, strategy="rescale", eta=0.7),
        remdm_loop(PROCESS, 40, eta=0.1),
    ],
    ids=["mdlm", "cap", "rescale", "switch", "cosine", "loop"],
)
def test_remasking_keeps_the_marginals(table):
    """After every step the share masked is 1 - alpha, and a token that is there is distributed as in the data."""
    for row, step in zip(table.rows, table.run(ideal, masks(), Noise(4).rand), strict=True):
        alpha = float(table.process.alpha(row.s)) if row.hold is None else row.hold
        shown = step.tokens != MASK
        assert shown.mean() == pytest.approx(alpha, abs=0.01)
        if alpha > 0.3:
            marginal = np.bincount(step.tokens[:, 0][shown[:, 0]], minlength=SYMBOLS) / shown[:, 0].sum()
            np.testing.assert_allclose(marginal, JOINT.sum((1, 2)), atol=0.02)
    assert (step.tokens != MASK).all()


def test_remasking_repairs_what_parallel_unmasking_broke():
    rough = distance(last(ancestral(PROCESS, 6).run(ideal, masks(), Noise(5).rand)).tokens)
    loop = remdm_loop(PROCESS, 60, eta=0.1, t_on=0.9, alpha_on=0.9)
    assert distance(last(loop.run(ideal, masks(), Noise(5).rand)).tokens) < rough / 2


def test_the_loop_is_the_authors_clock():
    table = remdm_loop(PROCESS, 100)
    held = [row for row in table.rows if row.hold is not None]
    assert len(table.rows) == 100
    assert len(held) == 50
    assert {(row.remask, row.hold) for row in held} == {(0.02, 0.9)}
    assert held[0].t == pytest.approx(0.1)


def test_remasking_by_confidence_spares_sure_tokens():
    """Two tokens, one drawn with probability 1 and one with 1/4: the unsure one is masked exp(3/4) times as often."""
    logits = np.zeros((1, 2, 4))
    logits[0, 0, 0] = 60.0
    rows = (Row(1.0, 0.001), Row(0.5, 0.25, remask=0.5))
    hidden = np.zeros(2)
    table, n = TokenPlan(PROCESS, rows, confidence=True), 20_000
    tokens = last(
        table.run(lambda x, t: np.repeat(logits, len(x), 0), np.full((n, 2), MASK), Noise(6).rand)
    ).tokens
    hidden = (tokens == MASK).mean(0)
    assert hidden[1] / hidden[0] == pytest.approx(np.exp(0.75), rel=0.05)
    assert hidden.sum() == pytest.approx(0.5, rel=0.05)


def test_the_cache_gives_the_same_tokens_in_fewer_calls():
    for table in (ancestral(PROCESS, 64), remdm(PROCESS, 64, eta=0.05)):
        plain = last(table.run(ideal, masks(1), Noise(8).rand))
        cached = last(table.run(ideal, masks(1), Noise(8).rand, time_free=True))
        np.testing.assert_array_equal(cached.tokens, plain.tokens)
        assert plain.calls == 64
        assert cached.calls < 16
    assert (
        last(ancestral(PROCESS, 64).run(ideal, masks(1), Noise(8).rand, time_free=True)).calls <= LENGTH + 1
    )


def test_a_prompt_stays():
    prompt = np.array([[2, MASK, MASK], [MASK, MASK, 1]])
    for steps in (
        remdm(PROCESS, 30, eta=1.0).run(ideal, prompt, Noise(0).rand),
        first_hitting(PROCESS, ideal, prompt, Noise(0).rand),
        by_confidence(PROCESS, ideal, prompt),
    ):
        for step in steps:
            assert step.tokens[0, 0] == 2
            assert step.tokens[1, 2] == 1
        assert (step.tokens != MASK).all()
    assert (prompt == MASK).sum() == 4, "the caller's array is left alone"


def test_sequences_with_unlike_prompts_follow_their_own_conditionals():
    prompt = np.tile([[2, MASK, MASK], [MASK, MASK, 1]], (RUNS // 2, 1))
    tokens = last(first_hitting(PROCESS, ideal, prompt, Noise(9).rand)).tokens
    given = JOINT[2] / JOINT[2].sum()
    found = np.zeros((SYMBOLS, SYMBOLS))
    np.add.at(found, (tokens[::2, 1], tokens[::2, 2]), 2 / RUNS)
    assert 0.5 * np.abs(found - given).sum() < 0.03
    given = JOINT[:, :, 1] / JOINT[:, :, 1].sum()
    found[:] = 0
    np.add.at(found, (tokens[1::2, 0], tokens[1::2, 1]), 2 / RUNS)
    assert 0.5 * np.abs(found - given).sum() < 0.03


def test_confident_decoding_takes_all_that_is_sure_and_at_least_one():
    def network(tokens, t):
        logits = np.zeros((*tokens.shape, 4))
        logits[:, :2, 3] = 20.0
        return logits

    steps = list(by_confidence(PROCESS, network, np.full((1, 4), MASK)))
    np.testing.assert_array_equal(steps[0].tokens[0], [3, 3, MASK, MASK])
    assert (steps[-1].tokens != MASK).all()


def test_blocks_are_sampled_left_to_right_given_what_is_before():
    seen = []

    def network(tokens, t):
        seen.append(tokens.copy())
        padded = np.concatenate([tokens, np.full((len(tokens), LENGTH - tokens.shape[1]), MASK)], axis=1)
        return ideal(padded)[:, : tokens.shape[1]]

    stream = Noise(3)

    def sample(denoise, tokens):
        return first_hitting(PROCESS, denoise, tokens, stream.rand)

    steps = list(in_blocks(sample, network, masks(), 1))
    assert [step.calls for step in steps] == [1, 2, 3]
    assert [tokens.shape[1] for tokens in seen] == [1, 2, 3]
    assert (seen[2][:, :2] != MASK).all()
    assert 0.6 < chi_square(steps[-1].tokens) < 1.4


def test_nucleus_keeps_the_likeliest_tokens_and_the_one_that_crosses():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(p)[None, None]
    counts = {}
    for top_p in (0.6, 0.75, 1.0):
        tokens = last(
            ancestral(PROCESS, 1).run(
                lambda x, t: np.broadcast_to(logits, (*x.shape, 4)), masks(), Noise(0).rand, top_p=top_p
            )
        ).tokens
        counts[top_p] = np.bincount(tokens.reshape(-1), minlength=4) / tokens.size
    np.testing.assert_allclose(counts[0.6], [5 / 8, 3 / 8, 0, 0], atol=0.01)
    np.testing.assert_allclose(counts[0.75], [5 / 8, 3 / 8, 0, 0], atol=0.01)
    np.testing.assert_allclose(counts[1.0], p, atol=0.01)


def test_temperature_divides_the_logits():
    p = np.array([0.5, 0.3, 0.2])
    run = ancestral(PROCESS, 1).run(
        lambda x, t: np.broadcast_to(np.log(p), (*x.shape, 3)), masks(), Noise(0).rand, temperature=0.5
    )
    tokens = last(run).tokens
    np.testing.assert_allclose(np.bincount(tokens.reshape(-1)) / tokens.size, p**2 / (p**2).sum(), atol=0.01)


def test_learned_factors_scale_the_probability_of_unmasking():
    table = ancestral(PROCESS, 4).scaled([0.5, 1.0, 1.0, 1.0])
    first, *_, end = table.run(ideal, masks(), Noise(0).rand)
    assert (first.tokens != MASK).mean() == pytest.approx(0.125, abs=0.01)
    assert (end.tokens != MASK).all()
    with pytest.raises(BadInput, match="3 factors"):
        ancestral(PROCESS, 4).scaled([1, 1, 1])


# uniform and Gaussian diffusion


def forward(process, s, t):
    """Q from s to t, as a matrix, from the definition."""
    if isinstance(process, Gaussian):
        return np.linalg.multi_dot(
            [np.eye(process.vocabulary)] * 2 + [process.step(i) for i in range(s + 1, t + 1)]
        )
    keep = float(process.alpha(t) / process.alpha(s))
    return keep * np.eye(process.vocabulary) + (1 - keep) / process.vocabulary


@pytest.mark.parametrize(
    ("process", "s", "t"),
    [(Uniform(5), 0.3, 0.7), (Uniform(5), 0.0, 0.4), (Gaussian(5, 10, 0.05, 0.4), 3, 7)],
)
def test_the_posterior_is_bayes_formula(process, s, t):
    bar_s, step = forward(process, 0, s), forward(process, s, t)
    rng = np.random.default_rng(0)
    tokens, p = rng.integers(0, 5, (2, 3)), rng.dirichlet(np.ones(5), (2, 3))
    got = process.posterior(tokens, p, t, s)
    for at in np.ndindex(2, 3):
        x_t = tokens[at]
        expected = np.zeros(5)
        for x0 in range(5):
            q = bar_s[x0] * step[:, x_t]
            expected += p[at][x0] * q / q.sum()
        np.testing.assert_allclose(got[at] / got[at].sum(), expected, rtol=1e-12)
        np.testing.assert_allclose(got[at].sum(), 1, rtol=1e-12)


def test_the_gaussian_matrix_is_symmetric_stochastic_and_local():
    process = Gaussian(16, 100)
    for level in (1, 50, 100):
        q = process.step(level)
        np.testing.assert_allclose(q, q.T, rtol=1e-14)
        np.testing.assert_allclose(q.sum(1), 1, rtol=1e-14)
        assert np.all(q >= 0)
        assert np.all(np.diff(q[8, 8:]) <= 0)
    beta = 0.02
    n = np.arange(-15, 16)
    expected = np.exp(-4 * 3**2 / (15**2 * beta)) / np.exp(-4 * n**2 / (15**2 * beta)).sum()
    assert process.step(100)[5, 8] == pytest.approx(expected)


@pytest.mark.parametrize(("process", "steps"), [(Uniform(4), 100), (Gaussian(4, 40, 0.05, 0.5), 40)])
def test_the_ideal_network_brings_noise_back_to_the_data(process, steps):
    data = np.array([0.5, 0.3, 0.15, 0.05])

    def network(tokens, t):
        t = round(float(t[0])) if isinstance(process, Gaussian) else float(t[0])
        weight = data[:, None] * forward(process, 0, t)  # [x0, x_t]
        with np.errstate(divide="ignore"):
            return np.log(weight.T[tokens])

    start = process.start((RUNS, 1), Noise(0).rand)
    assert np.bincount(start[:, 0], minlength=4) / RUNS == pytest.approx([0.25] * 4, abs=0.015)
    tokens = last(ancestral(process, steps).run(network, start, Noise(1).rand)).tokens
    np.testing.assert_allclose(np.bincount(tokens[:, 0], minlength=4) / RUNS, data, atol=0.012)


# randomness, files, edges


def test_uniforms_are_torchs_to_the_last_bit():
    import torch

    generator, stream = torch.Generator().manual_seed(5), Noise(5)
    for shape in ((3,), (4, 5), (1,)):
        expected = torch.rand(shape, dtype=torch.float64, generator=generator).numpy()
        np.testing.assert_array_equal(stream.rand(shape), expected)
    np.testing.assert_allclose(stream.randn((32,)), torch.randn(32, generator=generator), atol=2e-6)


@pytest.mark.parametrize(
    "table",
    [
        ancestral(Uniform(9), 5),
        ancestral(Gaussian(), 5),
        remdm(PROCESS, 5, confidence=True),
        remdm_loop(PROCESS, 9),
    ],
)
def test_json_round_trip(table):
    assert TokenPlan.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("rows"),
        lambda d: d.update(extra=1),
        lambda d: d.update(rows=[]),
        lambda d: d.update(confidence=1),
        lambda d: d["process"].update(kind="other"),
        lambda d: d["process"].update(mask=-1),
        lambda d: d["process"].update(schedule="sine"),
        lambda d: d["rows"][0].update(t=float("nan")),
        lambda d: d["rows"][0].update(t=0.1),
        lambda d: d["rows"][0].update(remask=1.5),
        lambda d: d["rows"][0].update(remask=True),
        lambda d: d["rows"][0].update(hold=1.0),
        lambda d: d["rows"][0].update(scale=None),
        lambda d: d["rows"][0].update(other=0.0),
    ],
)
def test_a_damaged_table_is_refused(change):
    data = json.loads(json.dumps(remdm(PROCESS, 4).to_json()))
    change(data)
    with pytest.raises(BadInput):
        TokenPlan.from_json(data)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(BadInput, match="steps"):
        ancestral(PROCESS, steps)


def test_logits_with_nan_or_of_a_wrong_shape_are_refused():
    run = partial(ancestral(PROCESS, 2).run, tokens=masks(2), uniform=Noise(0).rand)
    with pytest.raises(FewstepError, match="NaN"):
        next(run(lambda x, t: np.full((*x.shape, 4), np.nan)))
    with pytest.raises(FewstepError, match="shape"):
        next(run(lambda x, t: np.zeros((2, 9, 4))))
    with pytest.raises(BadInput, match="tokens"):
        next(ancestral(PROCESS, 2).run(ideal, np.zeros((2, 3)), Noise(0).rand))
