"""The page of sensitivities: every layer and step is on it, and nothing but text of ours."""

import re

import numpy as np

from fewstep.quant.table import Table
from fewstep.tools.sensitivity_page import render

LAYERS = ("conv_in", "mid.attn2.to_v", "<b>odd</b>")


def table():
    nsr = np.array([[[1e-1, 1e-2], [1e-6, 1e-6]], [[1e-4, 1e-4], [1e-6, 1e-6]], [[1e-7, 0.0], [np.nan] * 2]])
    bits = np.array([[400, 3200], [4000, 32000], [40, 320]])
    gains = np.array([0.25, 0.75])
    return Table("unet", "exact", LAYERS, ("w4", "a8"), (0, 4), nsr, bits, (100, 1000, 10), (1, 1, 1), gains)


CHOSEN = {"conv_in": "float", "mid.attn2.to_v": "w4a8", "<b>odd</b>": "w4"}


def test_the_page_stands_alone_and_shows_the_choice():
    html = render(table(), CHOSEN)
    assert "<script" not in html
    assert "http" not in html
    assert "$" not in html
    assert "1 float, 1 w4, 1 w4a8" in html
    # 3200 + 4000 + 40 bits over 1110 weights
    assert "6.52 bits a weight" in html
    assert "40.0 dB of signal over noise" in html


def test_the_worst_layer_comes_first_in_the_table():
    html = render(table(), dict.fromkeys(LAYERS, "w4"))
    rows = re.findall(r"<td>([^<]*)</td><td>[^<]*</td><td>w4</td>", html)
    assert rows == ["conv_in", "mid.attn2.to_v", "&lt;b&gt;odd&lt;/b&gt;"]


def test_every_layer_that_takes_the_option_has_a_cell_for_every_step():
    html = render(table(), CHOSEN)
    chosen, weights, inputs = html.split('<div class="plot heat">')[1:]
    assert chosen.count("<rect") == 2 * 2
    assert weights.count("<rect") == 3 * 2
    assert inputs.count("<rect") == 2 * 2
    # 10 dB is the darkest shade, 20 dB the eighth of ten
    assert re.findall(r'class="h(\d)" x="[\d.]+%"', weights)[:2] == ["9", "7"]


def test_names_are_escaped():
    assert "<b>odd</b>" not in render(table(), CHOSEN)


def test_a_part_of_floats_has_maps_but_no_worst_layers():
    html = render(table(), {})
    assert "Worst layers" not in html
    assert html.count('<div class="plot heat">') == 2
