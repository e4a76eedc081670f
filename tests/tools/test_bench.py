"""What a benchmark records, says and draws. Nothing here depends on how long anything took."""

import json
import re
from html.parser import HTMLParser

import pytest

from fewstep.runtime.errors import BadInput, BundleError
from fewstep.tools import cli
from fewstep.tools.bench import SCHEMA, bench
from fewstep.tools.measure import Job, Samples, Worker, measure
from fewstep.tools.plots import stacked, strips, ticks


@pytest.fixture(scope="module")
def measured(text_bundle, pixel_bundle, tmp_path_factory):
    """One small benchmark of two bundles: (Answer, folder)."""
    output = tmp_path_factory.mktemp("bench") / "report"
    answer = bench(
        [text_bundle], pixel_bundle, output=output, prompts=("a red apple", "a <cat>"), runs=6, cold_runs=2
    )
    return answer, output


def test_every_sample_is_kept(measured):
    answer, output = measured
    report = json.loads((output / "report.json").read_text())
    assert (report["schema"], report["kind"]) == (SCHEMA, "fewstep-bench")
    text, pixel = report["bundles"]
    assert (text["label"], pixel["label"], report["baseline"]) == ("tiny", "free", "free")
    for bundle in (text, pixel):
        warm = bundle["samples"]["warm"]
        assert [len(warm[name]) for name in ("image", "denoise", "decode", "core")] == [6] * 4
        assert len(warm["step"]) == 6 * 4
        assert len(bundle["samples"]["cold"]) == 2
        assert bundle["summary"]["image"]["n"] == 6
        assert ("text" in warm) == (bundle is text)
        assert bundle["size"]["total"] == sum(bundle["size"]["parts"].values())
    assert set(text["size"]["parts"]) == {"unet", "vae_decoder", "text_encoder", "tokenizer", "manifest.json"}
    assert {"bundles", "comparisons", "host", "report"} <= set(answer.data)


def test_parts_of_a_run_fit_inside_the_whole(measured):
    for bundle in measured[0].data["bundles"]:
        for cold in bundle["samples"]["cold"]:
            assert cold["import"] + cold["open"] + cold["image"] < cold["process"]
        warm = bundle["samples"]["warm"]
        for i, whole in enumerate(warm["image"]):
            assert warm["denoise"][i] + warm["decode"][i] <= whole


def test_peak_memory_is_the_child_s_own(measured):
    """The test process holds far more than a worker may: a peak that crept in from the parent would show."""
    for bundle in measured[0].data["bundles"]:
        peak = bundle["summary"]["peak_rss_bytes"]
        assert peak is None or 10 * 2**20 < peak < 400 * 2**20


def test_comparisons_are_against_the_baseline(measured):
    rows = measured[0].data["comparisons"]
    assert {(row["a"], row["b"]) for row in rows} == {("tiny", "free")}
    assert {"image", "step", "decode", "core", "cold"} <= {row["metric"] for row in rows}
    [cold] = [row for row in rows if row["metric"] == "cold"]
    assert cold["verdict"] == "no difference"  # two cold starts prove nothing
    assert cold["low"] == 0
    assert cold["high"] is None


class References(HTMLParser):
    """Collects whatever a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action", "xlink:href")]


def test_the_page_stands_alone(measured):
    page = (measured[1] / "report.html").read_text()
    parser = References()
    parser.feed(page)
    assert parser.found
    assert all(reference.startswith("data:image/png;base64,") for reference in parser.found)
    assert not {"script", "link", "iframe", "object"} & set(parser.tags)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_escapes_what_others_wrote(measured):
    page = (measured[1] / "report.html").read_text()
    assert "a &lt;cat&gt;" in page
    assert "<cat>" not in page


def test_the_page_has_its_parts(measured):
    page = (measured[1] / "report.html").read_text()
    for title in (
        "Faster or not",
        "Pictures",
        "Warm",
        "Cold",
        "On disk",
        "Against the original",
        "Host and job",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png") == 4
    assert "$" not in page


def test_without_a_baseline_nothing_is_claimed(text_bundle, capsys, tmp_path):
    code = cli.main(
        ["bench", str(text_bundle), "--runs", "1", "--cold-runs", "1", "--steps", "2", "-o", str(tmp_path)]
    )
    out, _ = capsys.readouterr()
    assert code == 0
    assert "nothing is claimed" in out
    assert "nothing is claimed" in (tmp_path / "report.html").read_text()


def test_compare_measures_a_against_b(text_bundle, pixel_bundle, capsys):
    words = [
        "bench",
        "--compare",
        str(text_bundle),
        str(pixel_bundle),
        "--runs",
        "1",
        "--cold-runs",
        "1",
        "--json",
    ]
    assert cli.main(words) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["baseline"] == "free"
    assert data["comparisons"][0]["a"] == "tiny"


def test_rounds_are_interleaved_and_turn(text_bundle, pixel_bundle, monkeypatch):
    order = []
    image = Worker.image

    def spied(self, prompt, seed, steps, *, show=False):
        order.append((self.label, show))
        return image(self, prompt, seed, steps, show=show)

    monkeypatch.setattr(Worker, "image", spied)
    job = Job({"a": text_bundle, "b": pixel_bundle}, ("a cat",), runs=3, cold_runs=0)
    list(measure(job, {}))
    assert [label for label, show in order if not show] == ["a", "b", "b", "a", "a", "b"]


def test_leaving_a_measurement_ends_its_processes(text_bundle, monkeypatch):
    workers = []
    start = Worker.__init__

    def spied(self, *args):
        workers.append(self)
        start(self, *args)

    monkeypatch.setattr(Worker, "__init__", spied)
    samples: dict[str, Samples] = {}
    running = measure(Job({"a": text_bundle}, ("a cat",), runs=5, cold_runs=1), samples)
    next(running)
    next(running)
    running.close()
    assert len(workers) == 2
    assert all(worker.process.poll() is not None for worker in workers)


def test_a_bundle_that_cannot_run_is_named(own_bundle, tmp_path):
    (own_bundle / "unet/model.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"unet/model\.onnx"):
        bench([own_bundle], output=tmp_path)
    with pytest.raises(BadInput, match="a: "):
        Worker("a", own_bundle, None)


def test_an_unwritable_report_folder_is_refused_before_measuring(text_bundle, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(BadInput, match="taken"):
        bench([text_bundle], output=tmp_path / "taken")


@pytest.mark.parametrize(
    "words", [[], ["--runs", "0", "x"], ["--cold-runs", "-1", "x"], ["--threads", "0", "x"]]
)
def test_bad_numbers_are_refused(words, capsys):
    assert cli.main(["bench", *words]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ticks_are_round_and_reach_the_top():
    assert ticks(1.0) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(9) == pytest.approx([0, 2.5, 5, 7.5])
    assert ticks(237) == pytest.approx([0, 100, 200])
    assert ticks(0) == [0.0]
    assert ticks(float("nan")) == [0.0]


def test_plots_place_values_in_per_cent_of_the_axis():
    svg = stacked([("a", {"x": 1.0, "y": 3.0})], "ms")
    starts = [float(v) for v in re.findall(r'<rect class="bar \w+" x="([\d.]+)%"', svg)]
    widths = [float(v) for v in re.findall(r'width="([\d.]+)%" height="20"', svg)]
    assert starts[1] == pytest.approx(widths[0], abs=0.01)
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.02)
    assert strips([("a", [])], "ms").count("<circle") == 0
    assert strips([("a", [1.0, 2.0])], "ms").count("<circle") == 2


def test_a_grid_and_a_sampler_by_name_are_measured_and_written_down(text_bundle, tmp_path):
    line = ["bench", text_bundle, "--steps", 2, "--runs", 1, "--cold-runs", 1, "-o", tmp_path / "report"]
    assert cli.main([str(word) for word in [*line, "--sampler", "euler", "--times", "karras"]]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [report["job"][key] for key in ("steps", "sampler", "times")] == [2, "euler", "karras"]
    assert (report["bundles"][0]["sampler"], report["bundles"][0]["times"]) == ("euler", "karras")


def test_an_unknown_grid_names_the_nearest(text_bundle, capsys):
    assert cli.main(["bench", str(text_bundle), "--times", "karas"]) == 2
    err = capsys.readouterr().err
    assert "did you mean karras" in err
    assert "Traceback" not in err
