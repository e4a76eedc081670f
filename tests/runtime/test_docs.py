import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "restore-edit-tokens.md"


def test_the_examples_in_the_docs_run():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, PAGE.name, "exec"), names)
    assert names["restored"].shape == names["y"].shape
    np.testing.assert_array_equal(names["painted"].x[..., :16], names["image"][..., :16])
    np.testing.assert_allclose(names["same"].x, names["image"], atol=1e-4)
    assert (names["text"].tokens < 26).all()
    assert (names["again"].tokens < 26).all()
