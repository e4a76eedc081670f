import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "your-own-model.md"


def test_the_example_in_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewstep.export.speed.BUDGET_S", 0.0)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["images"].shape == (2, 16, 16, 1)
    assert "100% done" in capsys.readouterr().out
