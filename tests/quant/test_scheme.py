"""Schemes as people write them."""

import pytest

from fewstep.quant.scheme import Scheme, parse_scheme
from fewstep.runtime.errors import BadInput


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("w8a8", Scheme(8, 8)),
        ("W4A8", Scheme(4, 8)),
        ("w4a4", Scheme(4, 4)),
        ("w8", Scheme(8, None)),
        ("w3.5", Scheme(3.5, None)),
        ("w8a16", Scheme(8, 16)),
    ],
)
def test_a_scheme_says_bits_of_weights_and_inputs(text, scheme):
    assert parse_scheme(text) == scheme


def test_only_bits_between_whole_numbers_are_mixed():
    assert parse_scheme("w3.5").mixed
    assert not parse_scheme("w4a8").mixed


@pytest.mark.parametrize("text", ["", "int8", "w8a", "a8", "w16a16", "w1", "w9", "w4a2", "w4a12", "w8a8!"])
def test_what_is_no_scheme_is_refused(text):
    with pytest.raises(BadInput, match="wBITS or wBITSaBITS"):
        parse_scheme(text)
