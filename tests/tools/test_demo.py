"""The demo, on a checkpoint of a few thousand weights."""

import io
import json

import numpy as np
from PIL import Image

from fewstep.tools import cli
from fewstep.tools.demo import CELL, MARGIN, contact_sheet


def test_a_contact_sheet_shows_each_picture_in_its_place():
    colours = [np.full((8, 8, 3), i / 10, dtype=np.float32) for i in range(6)]
    data = contact_sheet(colours, [f"caption number {i}" for i in range(6)], title="sheet")
    with Image.open(io.BytesIO(data)) as sheet:
        assert sheet.text["Description"].splitlines()[5] == "caption number 5"
        pixels = np.asarray(sheet)
    x, y = MARGIN + CELL // 2, MARGIN + CELL // 2
    assert pixels[y, x].tolist() == [0, 0, 0]
    assert pixels[y, x + CELL + MARGIN].tolist() == [26, 26, 26]  # 0.1 * 255, rounded
    assert (pixels[MARGIN + CELL : MARGIN + CELL + 30] < 100).any(), "no caption was drawn"


def test_a_grey_picture_is_drawn_too():
    assert contact_sheet([np.zeros((8, 8, 1))], ["grey"], title="x")[:4] == b"\x89PNG"


def test_the_demo_leaves_a_bundle_a_picture_and_a_report(tiny_sd, tmp_path, capsys):
    words = ["demo", str(tiny_sd), "-o", str(tmp_path / "out"), "--runs", "1", "--cold-runs", "1", "--json"]
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert code == 0, err
    data = json.loads(out)
    with Image.open(data["picture"]) as picture:
        picture.load()
    assert (tmp_path / "out/report.html").read_text().count("data:image/png") == 16
    assert data["verify"]["golden"] is not None
    assert {row["metric"] for row in data["comparisons"]} >= {"image", "cold"}
    assert cli.main([word for word in words if word != "--json"]) == 0, "a second run replaces the first"
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"picture: {tmp_path / 'out/picture.png'}",
        f"report:  {tmp_path / 'out/report.html'}",
    ]
