"""A picture decoded in windows is the picture decoded whole, where the decoder allows it."""

import numpy as np
import pytest

from fewstep.runtime import Pipeline
from fewstep.runtime.errors import BadInput
from fewstep.runtime.tiling import Tiling, tiling

FACTOR = 2


def blur(image, radius):
    """Mean over (2 radius + 1)^2 with zeros outside, as a convolution pads."""
    padded = np.pad(image, ((0, 0), (0, 0), (radius, radius), (radius, radius)))
    h, w = image.shape[2:]
    side = range(2 * radius + 1)
    return sum(padded[:, :, i : i + h, j : j + w] for i in side for j in side) / len(side) ** 2


def local(latent):
    """Twice the size, each pixel a function of the cells up to 3 away from its own, not only of their sum."""
    return np.tanh(blur(blur(latent, 2).repeat(FACTOR, 2).repeat(FACTOR, 3), 2))


def latent(height, width):
    return np.random.default_rng(0).standard_normal((1, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize("margin", [0, 1, 4])
@pytest.mark.parametrize("window", [9, 10, 16, 64])
@pytest.mark.parametrize("size", [1, 9, 10, 11, 29, 64, 65])
def test_kept_spans_part_the_side_and_lie_a_margin_inside_their_windows(size, window, margin):
    spans = Tiling(window, margin).along(size)
    assert [kept[0] for _, kept in spans] == [0, *(kept[1] for _, kept in spans[:-1])]
    assert spans[-1][1][1] == size
    for seen, kept in spans:
        assert seen[1] - seen[0] == min(window, size)
        assert 0 <= seen[0] <= seen[1] <= size
        assert seen[0] == 0 or kept[0] - seen[0] >= margin
        assert seen[1] == size or seen[1] - kept[1] >= margin
        assert kept[1] > kept[0]


def test_no_window_more_than_needed():
    assert len(Tiling(10, 2).along(10)) == 1
    assert len(Tiling(10, 2).along(16)) == 2  # 10 + 6 new cells
    assert len(Tiling(10, 2).along(17)) == 3


@pytest.mark.parametrize(("height", "width"), [(20, 33), (9, 41), (10, 10), (5, 4)])
def test_a_local_decoder_is_exact_with_its_margin(height, width):
    z = latent(height, width)
    np.testing.assert_allclose(Tiling(10, 3).decode(local, z, FACTOR), local(z), atol=1e-6)


def test_a_margin_too_small_shows():
    z = latent(20, 33)
    assert np.abs(Tiling(10, 1).decode(local, z, FACTOR) - local(z)).max() > 1e-3


def test_windows_of_equal_pictures_blend_into_the_same():
    z = latent(20, 33)
    double = z.repeat(FACTOR, 2).repeat(FACTOR, 3)
    tiled = Tiling(12, None).decode(lambda part: part.repeat(FACTOR, 2).repeat(FACTOR, 3), z, FACTOR)
    np.testing.assert_allclose(tiled, double, atol=1e-6)


def test_windows_that_differ_blend_linearly_over_what_overlaps():
    """Two windows of 8 cells side by side on 14 overlap by 2: 0 on the left, 1 on the right, a ramp between."""
    seen = []

    def constant(part):
        seen.append(part.shape)
        return np.full((1, 1, part.shape[2] * FACTOR, part.shape[3] * FACTOR), len(seen) - 1, np.float32)

    tiled = Tiling(8, None).decode(constant, latent(8, 14), FACTOR)
    assert seen == [(1, 3, 8, 8)] * 2
    ramp = (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(tiled[0, 0], np.tile([0] * 12 + [*ramp] + [1] * 12, (16, 1)), atol=1e-6)


def test_every_window_has_one_shape_so_that_an_engine_prepares_once():
    shapes = set()

    def seen(part):
        shapes.add(part.shape)
        return local(part)

    Tiling(12, None).decode(seen, latent(50, 31), FACTOR)
    Tiling(12, 3).decode(seen, latent(50, 31), FACTOR)
    assert shapes == {(1, 3, 12, 12)}


@pytest.mark.parametrize(
    ("tile", "margin", "said"),
    [
        (100, None, "multiple of 8"),
        (16, None, "from 32 on"),
        (152, 19, "try 312"),
        (True, None, "multiple"),
        (64.0, None, "multiple"),
        (0, None, "from 32"),
    ],
)
def test_a_tile_that_cannot_be_is_refused(tile, margin, said):
    with pytest.raises(BadInput) as caught:
        tiling(tile, 8, margin)
    assert said in str(caught.value)


def test_the_smallest_tile_is_one_cell_and_its_margins():
    assert tiling(8 * 39, 8, 19) == Tiling(39, 19)


def test_a_pipeline_decodes_in_windows_and_says_what_it_does_not(tiny_bundle):
    z = latent(16, 24)[:, [0, 1, 2, 0]]
    with Pipeline.from_pretrained(tiny_bundle) as pipeline:
        assert pipeline.manifest.parts["vae_decoder"].margin is None  # group norms see the whole latent
        whole = pipeline.decode(z)
        assert np.array_equal(pipeline.decode(z, tile=48), whole)  # one window is the whole picture
        tiled = pipeline.decode(z, tile=16)
        assert tiled.shape == whole.shape
        assert 0 < np.abs(tiled - whole).mean() < 0.2  # alike, and not the same
        with pytest.raises(BadInput, match="tiles of 7 pixels"):
            pipeline("a cat", tile=7)
        drawn = pipeline("a cat", tile=8, num_inference_steps=1, height=32, width=16, output_type="np").images
    assert drawn.shape == (1, 32, 16, 3)


def test_a_pixel_model_has_nothing_to_decode_in_windows():
    from types import SimpleNamespace

    pipeline = Pipeline(SimpleNamespace(manifest=SimpleNamespace(parts={}, sample=None)))
    with pytest.raises(BadInput, match="decodes nothing"):
        pipeline.decode(latent(4, 4), tile=64)
