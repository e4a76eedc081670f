"""The tiny network: diffusers' where it is diffusers', how far it sees, how it is chosen and kept."""

import json
import shutil

import numpy as np
import pytest
import torch

from fewstep.distill.tiny_files import read_network
from fewstep.distill.tiny_network import TinyNetwork, TinyShape
from fewstep.distill.tiny_shape import choose_shape, multiplications
from fewstep.model import load
from fewstep.runtime.errors import BadInput
from fewstep.runtime.tiling import tiling

TAESD = TinyShape((64,) * 4, (3, 3, 3, 1), factor=8, latent_channels=4, channels=3)
SHAPES = [
    TinyShape((8, 8, 8), (1, 2, 0), 4, 4, 3),
    TinyShape((12, 8), (2, 1), 4, 4, 3),  # the last doubling by rearrangement
    TinyShape((8,), (1,), 8, 4, 3),
    TinyShape((8, 4, 4, 4), (1, 1, 1, 1), 8, 4, 3),
]


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load(tiny_sd)


def network(shape):
    torch.manual_seed(0)
    return TinyNetwork(shape).eval().requires_grad_(False)


def test_taesds_shape_is_diffusers_decoder_with_its_weights():
    from diffusers.models.autoencoders.vae import DecoderTiny

    torch.manual_seed(1)
    theirs = DecoderTiny(4, 3, (3, 3, 3, 1), (64,) * 4, 2, "relu", "nearest").eval().requires_grad_(False)
    ours = network(TAESD)
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(ours(z), theirs(z))
    assert sum(p.numel() for p in ours.parameters()) == 1_222_531
    assert TAESD.margin == 19


def test_latents_are_taken_as_the_replaced_decoder_takes_them():
    plain = network(SHAPES[0])
    scaled = TinyNetwork(SHAPES[0], scaling_factor=0.5, shift_factor=0.25).eval()
    scaled.load_state_dict(plain.state_dict())
    z = torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(scaled(z / 0.5 + 0.25), plain(z))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_pixel_sees_further_than_the_margin(shape):
    z = torch.randn(1, 4, 1, 41, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 3, -1)
    changed = z.clone()
    changed[..., 20] += 1
    differs = (network(shape)(z) != network(shape)(changed)).any(0).any(0).any(0).nonzero().flatten()
    reach = [20 - int(differs.min()) // shape.factor, int(differs.max()) // shape.factor - 20]
    assert max(reach) <= shape.margin
    assert max(reach) >= shape.margin - 1  # and the margin wastes little


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", [(33, 47), (60, 21)])
def test_windows_with_the_margin_give_the_whole_picture(shape, sides):
    z = np.random.default_rng(0).standard_normal((1, 4, *sides)).astype(np.float32)
    decode = network(shape)
    whole = decode(torch.from_numpy(z)).numpy()
    windows = tiling((2 * shape.margin + 5) * shape.factor, shape.factor, shape.margin)
    tiled = windows.decode(lambda part: decode(torch.from_numpy(part)).numpy(), z, shape.factor)
    assert np.abs(tiled - whole).max() < 1e-5


def test_multiplications_are_those_of_the_formula():
    shape = SHAPES[1]
    stages = [256 * (9 * 4 * 12 + 2 * 27 * 12**2), 1024 * (9 * 12 * 8 + 27 * 8**2 + 9 * 8 * 12)]
    assert multiplications(network(shape), 4) == sum(stages)


def test_the_shape_is_chosen_by_what_it_saves(model):
    shape, work = choose_shape(model, (), ())
    assert work <= 0.25
    assert shape.factor == model.sample.factor
    wide, more = choose_shape(model, (16,), (1,))
    assert wide.widths == (16,)
    before = multiplications(model.parts["vae_decoder"].module, 4)
    assert more == pytest.approx(multiplications(network(wide), 4) / before)


@pytest.mark.parametrize(
    ("widths", "blocks", "said"),
    [
        ((256, 256), (3, 3), "of the work"),
        ((8,), (), "as many"),
        ((8, 8, 8), (1, 1, 1), "1 to 2 stages"),
        ((0,), (1,), "at least 1 channel"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(model, widths, blocks, said):
    with pytest.raises(BadInput) as caught:
        choose_shape(model, widths, blocks)
    assert said in str(caught.value)


@pytest.fixture
def taesd(tmp_path):
    """A diffusers AutoencoderTiny of random weights for a factor of 2, saved by diffusers."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    vae.save_pretrained(tmp_path / "taesd")
    return vae, tmp_path / "taesd"


def test_a_taesd_folder_of_diffusers_is_read(model, taesd):
    vae, folder = taesd
    read, config = read_network(folder, model)
    assert config["_class_name"] == "AutoencoderTiny"
    z = torch.randn(1, 4, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(
            read(z / model.sample.scaling_factor), vae.decode(z).sample, atol=1e-5, rtol=1e-4
        )


def test_a_folder_that_does_not_fit_is_refused(model, taesd, tmp_path):
    _, folder = taesd

    def refused(said, **changes):
        copy = shutil.copytree(folder, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(BadInput) as caught:
            read_network(copy, model)
        assert said in str(caught.value)

    refused("holds a AutoencoderKL", _class_name="AutoencoderKL")
    refused("cannot be read", decoder_block_out_channels=[16, 16])
    refused("cannot be read", num_decoder_blocks=None)
    wide = {"decoder_block_out_channels": [8, 8, 8], "num_decoder_blocks": [1, 1, 1]}
    refused("cannot be read", **wide)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refused("cannot be read")
    with pytest.raises(BadInput):
        read_network(tmp_path / "nowhere", model)


def test_a_decoder_of_other_latents_is_refused(model, tmp_path):
    from safetensors.torch import save_file

    from fewstep.distill.tiny_files import FILES

    def stored(shape, **more):
        folder = tmp_path / f"stored-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        config = {
            "_class_name": "TinyDecoder",
            "widths": shape.widths,
            "blocks": shape.blocks,
            "factor": shape.factor,
        }
        config |= {"latent_channels": 4, "channels": 3, **more}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(TinyNetwork(shape).state_dict(), folder / FILES["TinyDecoder"])
        return folder

    good = TinyShape((8,), (1,), 2, 4, 3)
    assert read_network(stored(good), model)[0].shape == good
    with pytest.raises(BadInput, match="8 pixels a cell"):
        read_network(stored(TinyShape((8,), (1,), 8, 4, 3)), model)
    with pytest.raises(BadInput, match="taught by another VAE"):
        read_network(stored(good, teacher="0" * 32), model)
