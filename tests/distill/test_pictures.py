"""Real pictures as training data: what is read of a folder or a zip, and what is refused."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")

from PIL import Image  # noqa: E402

from fewstep.distill.pictures import encode_pictures, pictures_for, read_pictures  # noqa: E402
from fewstep.model import load  # noqa: E402
from fewstep.model.builders import tiny_sd  # noqa: E402
from fewstep.runtime.errors import BadInput, OutputError  # noqa: E402
from fewstep.runtime.progress import Progress  # noqa: E402


def finish(work):
    """What a generator returns."""
    while True:
        try:
            assert isinstance(next(work), Progress)
        except StopIteration as stop:
            return stop.value


def png(pixels):
    data = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(data, "png")
    return data.getvalue()


def plain(color, height=4, width=4):
    return np.broadcast_to(np.asarray(color, np.uint8), (height, width, len(color)))


def write(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def pack(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


RED, BLUE = png(plain((255, 0, 0))), png(plain((0, 0, 255)))
ZOO = {"cat/1.png": RED, "cat/2.png": BLUE, "dog/1.png": BLUE}


def pixels(pictures):
    return [picture for _, picture in pictures.read()]


@pytest.mark.parametrize("packed", [False, True])
def test_folders_are_classes_in_a_folder_and_in_a_zip(tmp_path, packed):
    source = pack(tmp_path / "zoo.zip", ZOO) if packed else write(tmp_path / "zoo", ZOO)
    found = read_pictures(source, (4, 4), classes=2)
    assert found.names == ("cat/1.png", "cat/2.png", "dog/1.png")
    assert found.subjects == (0, 0, 1)
    assert [p[0, 0].tolist() for p in pixels(found)] == [[255, 0, 0], [0, 0, 255], [0, 0, 255]]


def test_named_classes_keep_the_model_s_labels_whatever_their_case_and_underscores(tmp_path):
    source = write(tmp_path, {"Sea_Lion/a.png": RED, "cat/a.png": RED})
    found = read_pictures(source, (4, 4), classes={"cat": 7, "sea lion": 3, "dog": 0})
    assert dict(zip(found.names, found.subjects)) == {"Sea_Lion/a.png": 3, "cat/a.png": 7}


def test_a_wide_picture_is_cut_around_its_middle(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = (10, 200, 30)
    (got,) = pixels(read_pictures(write(tmp_path, {"a.png": png(wide)}), (4, 4)))
    np.testing.assert_array_equal(got, plain((10, 200, 30)))


def test_an_even_picture_keeps_its_color_at_any_size(tmp_path):
    (got,) = pixels(read_pictures(write(tmp_path, {"a.png": png(plain((9, 99, 199), 50, 31))}), (8, 16)))
    np.testing.assert_array_equal(got, plain((9, 99, 199), 8, 16))


def test_grey_palette_16_bit_and_transparent_pictures_become_rgb(tmp_path):
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2] = (0, 0, 255, 255)
    data = io.BytesIO()
    Image.fromarray(np.full((4, 4), 257 * 80, np.uint16)).save(data, "png")
    palette = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8)).quantize(2).save(palette, "png")
    files = {"a.png": png(np.full((4, 4), 70)), "b.png": data.getvalue(), "c.png": png(clear)}
    grey, deep, transparent, red = pixels(
        read_pictures(write(tmp_path, {**files, "d.png": palette.getvalue()}), (4, 4))
    )
    assert (grey == 70).all()
    assert (deep == 80).all()
    assert transparent[0, 0].tolist() == [0, 0, 255]
    assert transparent[3, 3].tolist() == [255, 255, 255]
    assert red[0, 0].tolist() == [255, 0, 0]


def test_exif_says_which_way_is_up(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4] = 255
    image, exif, data = Image.fromarray(picture), Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # turned by half: EXIF 2.3, tag Orientation
    image.save(data, "jpeg", exif=exif, quality=100)
    (got,) = pixels(read_pictures(write(tmp_path, {"a.jpg": data.getvalue()}), (8, 8)))
    assert got[0].mean() < 5
    assert got[7].mean() > 250


def test_captions_come_from_a_text_beside_the_picture_or_from_a_table(tmp_path):
    rows = [{"file_name": "a.png", "text": "a red square"}, {"file_name": "sub/b.png", "caption": "ein Blau"}]
    table = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    for name, files in {
        "beside": {"a.txt": "a red square\n", "sub/b.txt": "ein Blau"},
        "metadata": {"metadata.jsonl": table},
        "captions": {"captions.jsonl": table},
    }.items():
        source = write(tmp_path / name, {"a.png": RED, "sub/b.png": BLUE, **files})
        assert read_pictures(source, (4, 4), captions=True).subjects == ("a red square", "ein Blau")


def test_hidden_files_and_those_of_macos_are_not_pictures(tmp_path):
    source = pack(tmp_path / "a.zip", {"a.png": RED, "__MACOSX/a.png": b"?", ".cache/b.png": b"?"})
    assert read_pictures(source, (4, 4)).names == ("a.png",)


@pytest.mark.parametrize(
    ("files", "wanted", "said"),
    [
        ({}, {}, "holds no pictures"),
        ({"readme.md": "hello"}, {}, "holds no pictures"),
        ({"a.png": RED}, {"captions": True}, "a.png without a caption"),
        ({"a.png": RED, "a.txt": " \n"}, {"captions": True}, "a.png without a caption"),
        ({"a.png": RED, "metadata.jsonl": "{not json"}, {"captions": True}, "line 1 of metadata.jsonl"),
        ({"a.png": RED, "metadata.jsonl": '["a.png", "b"]'}, {"captions": True}, "line 1 of metadata.jsonl"),
        ({"a.png": RED, "a.txt": b"\xff\xfe"}, {"captions": True}, "a.txt cannot be read"),
        ({"a.png": RED}, {"classes": {"cat": 0}}, "a.png without a class"),
        (ZOO, {"classes": {"cat": 0, "bird": 1}}, "dog is none of the model's classes"),
        (ZOO, {"classes": 3}, "2 folders of pictures (cat, dog)"),
        (ZOO, {"classes": 2, "captions": True}, "both classes and captions"),
    ],
)
def test_what_cannot_teach_is_refused_before_any_pixel_is_read(tmp_path, files, wanted, said):
    source = write(tmp_path / "data", files)
    source.mkdir(exist_ok=True)
    with pytest.raises(BadInput) as error:
        read_pictures(source, (4, 4), **wanted)
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png", "C:/a.png"])
def test_a_zip_whose_names_lead_out_of_it_is_refused(tmp_path, name):
    source = pack(tmp_path / "a.zip", {"fine.png": RED, name: RED})
    with pytest.raises(BadInput, match="leads out of the archive"):
        read_pictures(source, (4, 4))


def test_what_is_neither_folder_nor_zip_is_refused(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        read_pictures(tmp_path / "nowhere", (4, 4))
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(BadInput, match="is no zip"):
        read_pictures(tmp_path / "a.zip", (4, 4))


def huge_png():
    """A PNG that says it has 60,000 x 60,000 pixels."""
    data = bytearray(RED)
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    return bytes(data)


BROKEN = {
    "truncated": png(np.random.default_rng(0).integers(0, 255, (64, 64, 3)))[:2000],
    "empty": b"",
    "text": b"this is no picture",
    "huge": huge_png(),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_named_or_skipped(tmp_path, kind):
    source = write(tmp_path, {"a.png": RED, "broken.png": BROKEN[kind], "c.png": BLUE})
    with pytest.raises(BadInput, match=r"picture broken\.png cannot be read"):
        pixels(read_pictures(source, (4, 4)))
    got = list(read_pictures(source, (4, 4), skip_unreadable=True).read())
    assert [number for number, _ in got] == [0, 1, 2]
    assert isinstance(got[1][1], str)
    assert got[2][1][0, 0].tolist() == [0, 0, 255]


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    source = pack(tmp_path / "a.zip", {"a.png": RED})
    data = bytearray(source.read_bytes())
    data[40] ^= 255  # inside the member, whose checksum is now wrong
    source.write_bytes(bytes(data))
    with pytest.raises(BadInput, match=r"picture a\.png cannot be read"):
        pixels(read_pictures(source, (4, 4)))


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return load(tiny_sd(tmp_path_factory.mktemp("sd")))


@pytest.fixture
def captioned(tmp_path):
    random = np.random.default_rng(1)
    files = {}
    for i in range(5):
        files[f"{i}.png"] = png(random.integers(0, 255, (16, 16, 3)))
        files[f"{i}.txt"] = f"number {i}"
    return write(tmp_path / "data", files)


def test_latents_are_the_scaled_means_of_the_model_s_own_encoder(sd, captioned):
    pictures = pictures_for(sd, captioned)
    assert pictures.size == (16, 16)
    found = finish(encode_pictures(sd, pictures, batch=2))
    assert found.subjects == tuple(f"number {i}" for i in range(5))
    picture = np.asarray(Image.open(captioned / "3.png")).transpose(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mean = sd.original.vae.encode(torch.from_numpy(picture).float()).latent_dist.mean
    np.testing.assert_allclose(found.latents[3:4], mean.numpy() * 0.18215, atol=1e-5)


def test_mirror_images_follow_with_the_same_subjects(sd, captioned):
    found = finish(encode_pictures(sd, pictures_for(sd, captioned), mirrored=True))
    assert found.latents.shape == (10, 4, 8, 8)
    assert found.subjects[5:] == found.subjects[:5]
    turned = np.asarray(Image.open(captioned / "2.png"))[:, ::-1]
    write(captioned.parent / "turned", {"2.png": png(turned), "2.txt": "number 2"})
    alone = finish(encode_pictures(sd, pictures_for(sd, captioned.parent / "turned")))
    np.testing.assert_allclose(found.latents[7], alone.latents[0], atol=1e-5)


def test_what_was_encoded_is_kept_and_what_is_unreadable_left_out(sd, captioned, tmp_path, monkeypatch):
    (captioned / "1.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match=r"1\.png"):
        finish(encode_pictures(sd, pictures_for(sd, captioned), tmp_path / "store"))
    pictures = pictures_for(sd, captioned, skip_unreadable=True)
    first = finish(encode_pictures(sd, pictures, tmp_path / "store"))
    assert first.skipped == ("1.png",)
    assert first.subjects == ("number 0", "number 2", "number 3", "number 4")
    monkeypatch.setattr(type(sd.original.vae), "encode", None)  # nothing is encoded again
    again = finish(encode_pictures(sd, pictures, tmp_path / "store"))
    np.testing.assert_array_equal(first.latents, again.latents)
    (captioned / "0.png").write_bytes(RED)  # but what changed is
    with pytest.raises(TypeError):
        finish(encode_pictures(sd, pictures_for(sd, captioned, skip_unreadable=True), tmp_path / "store"))


def test_no_readable_picture_nan_and_a_store_that_is_a_file_are_said(sd, captioned, tmp_path):
    source = write(tmp_path / "bad", {"a.png": b"?", "a.txt": "nothing"})
    with pytest.raises(BadInput, match="none of the 1 pictures"):
        finish(encode_pictures(sd, pictures_for(sd, source, skip_unreadable=True)))
    (tmp_path / "file").write_text("here")
    with pytest.raises(OutputError):
        finish(encode_pictures(sd, pictures_for(sd, captioned), tmp_path / "file"))
    weight = next(sd.original.vae.encoder.parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(BadInput, match="NaN or infinity"):
            finish(encode_pictures(sd, pictures_for(sd, captioned)))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
