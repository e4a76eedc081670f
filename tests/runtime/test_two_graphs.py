"""Plans of two graphs: halves by hand, what is kept across the change, and who draws what is refused."""

import re
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fewstep.runtime import DiscreteVP, Pipeline, Plan, Time, plan
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.errors import BadInput, PlanError
from fewstep.runtime.manifest import Manifest, PartSpec, SampleSpec, TensorSpec
from fewstep.runtime.samplers import SAMPLERS
from fewstep.runtime.two_graphs import cutoff_for_rate, refining, route, stitched

PROCESS = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
SHAPE = (2, 1, 4, 4)


def large(z, timestep):
    return 0.6 * z / (1 + np.abs(z)) + 0.1 * timestep / 1000


def small(z, timestep):
    return 0.4 * np.tanh(z) - 0.2 * timestep / 1000


NETWORKS = {"denoiser": large, "small": small}


def by_plan(x, t):
    a, b, _ = t.call.x0
    return a * x + b * NETWORKS[t.call.graph](t.call.scale * x, t.timestep)


def start():
    return np.random.default_rng(0).standard_normal(SHAPE)


def last(table, denoise, x):
    noise = np.random.default_rng(1)
    *_, step = table.run(denoise, x, lambda: noise.standard_normal(SHAPE))
    return step.x


def by_hand(sampler, times, count, x, *, keep):
    """The sampler as a function, with the network changed after `count` calls; or two of them in a row."""
    calls = 0

    def denoise(x, t):
        nonlocal calls
        calls += 1
        row = plan("ddim", 1, PROCESS, [t, 0.0]).calls[0]
        return by_plan(x, Time(replace(row, graph="small" if calls <= count else "denoiser")))

    fresh = np.random.default_rng(1)
    pieces = [(times, len(times) - 1)] if keep else [(times, count), (times[count:], len(times) - 1 - count)]
    for piece, steps in pieces:
        run = SAMPLERS[sampler](denoise, PROCESS, x, piece, lambda: fresh.standard_normal(SHAPE))
        for step in islice(run, steps):
            x = step.x
    return x


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "unipc", "euler_ancestral"])
def test_a_stitched_plan_is_the_sampler_with_its_network_changed_on_the_way(sampler):
    times = np.linspace(1000, 0, 11)
    table = stitched(plan(sampler, 10, PROCESS, times), 0.4)
    assert [call.graph for call in table.calls] == ["small"] * 4 + ["denoiser"] * 6
    wanted = by_hand(sampler, times, 4, start(), keep=True)
    np.testing.assert_allclose(last(table, by_plan, start()), wanted, atol=1e-9)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_with_a_rest_the_solver_starts_anew_where_the_network_changes(sampler):
    times = np.linspace(1000, 0, 11)
    whole, rest = plan(sampler, 10, PROCESS, times), plan(sampler, 6, PROCESS, times[4:])
    table = Plan.from_json(stitched(whole, 0.4, rest=rest).to_json())
    wanted = by_hand(sampler, times, 4, start(), keep=False)
    np.testing.assert_allclose(last(table, by_plan, start()), wanted, atol=1e-9)
    assert table.noises == whole.noises
    if sampler == "dpmpp_2m":  # it remembers: keeping that is another run
        assert np.abs(last(stitched(whole, 0.4), by_plan, start()) - wanted).max() > 1e-4


def test_none_and_all_of_the_calls_are_the_networks_alone():
    whole = plan("dpmpp_2m", 5, PROCESS)
    assert stitched(whole, 0.0) == whole
    assert {call.graph for call in stitched(whole, 1.0).calls} == {"small"}


def test_a_step_of_two_calls_is_not_divided():
    table = stitched(plan("heun", 5, PROCESS), 0.3)  # 9 calls; 2.7 are 3, the first of the second step
    graphs = [call.graph for call in table.calls]
    assert graphs == ["small"] * 4 + ["denoiser"] * 5
    assert table.calls[3].next is not None


def test_the_example_in_the_docs_runs():
    page = (Path(__file__).parents[2] / "docs" / "how-to-stitch.md").read_text()
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], names)
    assert [call.t for call in names["anew"].calls] == [call.t for call in names["kept"].calls]
    assert names["anew"].calls[8].next != names["kept"].calls[8].next


def test_a_stitched_plan_survives_json():
    table = stitched(plan("dpmpp_2m", 5, PROCESS), 0.4)
    assert Plan.from_json(table.to_json()) == table


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(PlanError, match="expected a share from 0 to 1"):
        stitched(plan("ddim", 5, PROCESS), share)


def test_a_rest_from_another_time_is_refused():
    with pytest.raises(PlanError, match="begins at time 500; expected time 600, where the graphs change"):
        stitched(plan("ddim", 5, PROCESS), 0.4, rest=plan("ddim", 2, PROCESS, [500, 200, 0]))


@pytest.mark.parametrize("graph", ["", "../unet", "a b", 3])
def test_a_graph_without_a_proper_name_is_refused(graph):
    data = plan("ddim", 2, PROCESS).to_json()
    data["calls"][1]["graph"] = graph
    with pytest.raises(PlanError, match="call 1 of a plan; expected graph as a name"):
        Plan.from_json(data)


# in a pipeline


@dataclass
class Toy:
    """A session that counts, and says what it was fed first."""

    network: object
    fed: list = field(default_factory=list)
    closed: bool = False

    def run(self, feeds, outputs=None):
        assert not self.closed
        self.fed.append(feeds)
        return {"out": self.network(feeds["sample"], feeds["timestep"][:, None, None, None])}

    def close(self):
        self.closed = True


def bundle(*names, plans, tmp_path):
    sample = TensorSpec("sample", "float32", ("batch", 1, "height", "width"))
    inputs = (sample, TensorSpec("timestep", "float32", ("batch",)))
    part = PartSpec("onnxruntime", "x.onnx", inputs, (replace(sample, name="out"),))
    manifest = Manifest(
        name="toy",
        task="class-conditional",
        process=PROCESS.to_json(),
        prediction="epsilon",
        denoiser="unet",
        parts=dict.fromkeys(names, part),
        sample=SampleSpec(4, 4, 1),
        plans={name: table.to_json() for name, table in plans.items()},
        sampler="ddim",
        classes=10,
    )
    return Bundle(tmp_path, manifest)


@pytest.fixture
def toys():
    return {"unet": Toy(large), "small": Toy(small)}


def opened(plans, toys, tmp_path, monkeypatch, **options):
    """A pipeline whose sessions are the toys, and the names of what it opened, in order."""
    order = []

    def open_toy(self, name):
        if name not in self._sessions:
            order.append(name)
            toys[name].closed = False
            self._sessions[name] = toys[name]
        return self._sessions[name]

    monkeypatch.setattr(Pipeline, "_open", open_toy)
    return Pipeline(bundle(*toys, plans=plans, tmp_path=tmp_path), **options), order


PLANS = {
    "default": stitched(plan("ddim", 5, PROCESS), 0.4),
    "full": plan("ddim", 5, PROCESS),
}
ASKED = {"class_labels": [1, 2], "output_type": "latent"}


def test_a_pipeline_calls_the_graph_of_each_row(toys, tmp_path, monkeypatch):
    pipeline, _ = opened(PLANS, toys, tmp_path, monkeypatch)
    x = start().astype(np.float32)
    drawn = pipeline(**ASKED, latents=x).images
    assert (len(toys["small"].fed), len(toys["unet"].fed)) == (2, 3)
    table = PLANS["default"]
    np.testing.assert_allclose(drawn, last(table, by_plan, table.start(x)), atol=1e-4)


def test_the_second_graph_is_opened_only_for_a_plan_that_calls_it(toys, tmp_path, monkeypatch):
    pipeline, order = opened(PLANS, toys, tmp_path, monkeypatch)
    pipeline(**ASKED, plan="full")
    assert order == ["unet"]


def test_with_low_memory_one_graph_is_open_at_a_time(toys, tmp_path, monkeypatch):
    pipeline, order = opened(PLANS, toys, tmp_path, monkeypatch, low_memory=True)
    run = pipeline.generate(**ASKED)
    for _ in range(3):
        next(run)
    assert order == ["small", "unet"]
    assert toys["small"].closed
    assert not toys["unet"].closed


def test_other_numbers_of_steps_are_stitched_at_the_same_time(toys, tmp_path, monkeypatch):
    pipeline, _ = opened(PLANS, toys, tmp_path, monkeypatch)
    graphs = [call.graph for call in pipeline.plan(20).calls]
    assert graphs == sorted(graphs, reverse=True)
    assert graphs.count("small") == 8  # down to 600, where the default plan changes


def test_a_plan_that_calls_what_the_bundle_has_not_is_refused(toys, tmp_path, monkeypatch):
    pipeline, _ = opened(PLANS, {"unet": toys["unet"]}, tmp_path, monkeypatch)
    with pytest.raises(PlanError, match="calls the graph 'small'; expected denoiser; fix: .* --stitch"):
        pipeline(**ASKED)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": "full"}, "an image for a plan that starts from noise; expected one or the other"),
        ({"plan": "refine", "strength": 0.5}, "a plan and a strength"),
    ],
)
def test_a_plan_starts_from_a_sample_only_where_it_says_so(options, said, toys, tmp_path, monkeypatch):
    plans = {**PLANS, "refine": refining("ddim", 3, PROCESS)}
    pipeline, _ = opened(plans, toys, tmp_path, monkeypatch)
    x = start().astype(np.float32)
    with pytest.raises(BadInput, match=said):
        pipeline(**ASKED, image=x, **options)
    assert toys["unet"].fed == []


# routing


def test_refining_begins_at_the_noise_level_asked_for():
    table = refining("ddim", 4, PROCESS, level=0.6)
    begin = table.calls[0].t
    assert float(PROCESS.sigma(begin)) == pytest.approx(0.6, abs=1e-3)
    assert {kind: c for kind, _, c in table.init} == pytest.approx(
        {"z": float(PROCESS.sigma(begin)), "y": float(PROCESS.alpha(begin))}
    )
    times = [call.t for call in table.calls]
    np.testing.assert_allclose(times, np.linspace(begin, 0, 5)[:4], atol=1.0)  # begin and all are whole
    assert times == [round(t) for t in times]


@pytest.mark.parametrize("level", [0, 1, -0.5])
def test_a_level_that_is_all_or_nothing_is_refused(level):
    with pytest.raises(PlanError, match="expected above 0, below 1"):
        refining("ddim", 4, PROCESS, level=level)


def test_the_cutoff_refuses_the_wanted_share_of_the_scores():
    scores = np.random.default_rng(0).permutation(100) / 7
    for rate in (0.0, 0.25, 0.6, 1.0):
        assert np.mean(scores < cutoff_for_rate(list(scores), rate)) == pytest.approx(rate)
    with pytest.raises(PlanError, match="rate 2"):
        cutoff_for_rate([1.0], 2)


def test_what_scores_below_the_cutoff_is_refined_and_the_rest_is_the_students(toys, tmp_path, monkeypatch):
    student = stitched(plan("ddim", 2, PROCESS), 1.0)
    plans = {"default": student, "student": student, "refine": refining("ddim", 3, PROCESS)}
    pipeline, _ = opened(plans, toys, tmp_path, monkeypatch)
    scores = [0.2, 0.9, 0.5]
    routed = route(pipeline, lambda picture, i: scores[i], 0.5, class_labels=[1, 2, 3], seed=4)
    alone = pipeline(class_labels=[1, 2, 3], plan="student", seed=4, output_type="np").images
    assert routed.refined == (True, False, False)
    assert (routed.scores, routed.rate) == (tuple(scores), pytest.approx(1 / 3))
    assert routed.cost == pytest.approx(routed.student + routed.teacher / 3)
    np.testing.assert_array_equal(routed.images[1:], alone[1:])
    assert np.abs(routed.images[0] - alone[0]).max() > 1e-3
    # the teacher saw one sample, first at the refining plan's first time, with the student's x0 inside
    fed = toys["unet"].fed
    assert [len(feeds["sample"]) for feeds in fed] == [1, 1, 1]
    assert fed[0]["timestep"][0] == plans["refine"].calls[0].timestep


def test_a_picture_at_the_cutoff_is_accepted_and_a_score_of_nan_is_not(toys, tmp_path, monkeypatch):
    student = stitched(plan("ddim", 1, PROCESS), 1.0)
    plans = {"default": student, "student": student, "refine": refining("ddim", 1, PROCESS)}
    pipeline, _ = opened(plans, toys, tmp_path, monkeypatch)
    scores = [0.5, float("nan")]
    routed = route(pipeline, lambda picture, i: scores[i], 0.5, class_labels=[1, 2])
    assert routed.refined == (False, True)
