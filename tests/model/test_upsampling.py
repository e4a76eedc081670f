"""Doubling and convolving in one, against doing both."""

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from fewstep.export.plans import plan_of  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.model import Context  # noqa: E402
from fewstep.model.upsampling import SplitUpsample, split_upsampling  # noqa: E402
from fewstep.prune.upsampling import SplitUpsampling  # noqa: E402
from fewstep.targets import load_target  # noqa: E402


def doubled(**options):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 5, 3, **{"padding": 1, **options})
    return torch.nn.Sequential(torch.nn.Upsample(scale_factor=2), conv)


@pytest.mark.parametrize("bias", [True, False])
def test_four_small_convolutions_do_what_doubling_and_a_large_one_do(bias):
    net = doubled(bias=bias)
    x = torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        wanted = net(x)
        assert split_upsampling(net) == 1
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-6)


def test_each_kernel_adds_up_the_taps_that_see_the_same_cell():
    net = doubled(bias=False)
    with torch.no_grad():
        net[1].weight.fill_(1)
        split_upsampling(net)
    first = net[1].places[0].weight[0, 0]
    assert first.tolist() == [[1, 2], [2, 4]]
    assert net[1].places[3].weight[0, 0].tolist() == [[4, 2], [2, 1]]


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2, "padding": 2}, {"padding": 0}, {"padding_mode": "reflect"}]
)
def test_convolutions_that_see_otherwise_are_left_alone(options):
    net = doubled(**options)
    assert split_upsampling(net) == 0


def test_a_doubling_by_anything_but_nearest_neighbours_is_left_alone():
    net = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2, mode="bilinear"), doubled()[1])
    assert split_upsampling(net) == 0


def test_an_odd_size_is_refused_and_not_drawn_wrongly():
    with pytest.raises(ValueError, match="no multiple"):
        SplitUpsample(doubled()[1])(torch.zeros(1, 3, 4, 4), (7, 7))


def test_the_pass_leaves_the_original_as_it_was_and_shares_its_weights(tmp_path):
    model = load(Path(__file__).parents[2] / "models/emoji-64")
    before = copy.deepcopy(model.parts["vae_decoder"].module)
    plan = plan_of(model, "model", 2)
    context = Context(load_target("laptop-cpu"), plan, work=tmp_path, store=tmp_path)
    work = SplitUpsampling()(model, context)
    try:
        while True:
            next(work)
    except StopIteration as stop:
        changed = stop.value
    assert [record["pass"] for record in changed.history] == ["SplitUpsampling"]
    old, new = model.parts["vae_decoder"].module, changed.parts["vae_decoder"].module
    assert sum(isinstance(layer, SplitUpsample) for layer in new.modules()) == 2
    assert not any(isinstance(layer, SplitUpsample) for layer in old.modules())
    assert next(new.parameters()).data_ptr() == next(old.parameters()).data_ptr()
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(new(z), before(z), rtol=1e-4, atol=1e-5)
