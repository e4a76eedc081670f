"""What a comparison measures, against candidates whose error is known; what it says, refuses and leaves behind."""

import hashlib
import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fewstep.export.quality import MAX_DB
from fewstep.runtime import plan
from fewstep.runtime.backends.PIL import to_image
from fewstep.runtime.bundle import Bundle
from fewstep.runtime.conditional import ResidualShift
from fewstep.runtime.errors import BadInput, BundleError, CheckpointError
from fewstep.tools import cli
from fewstep.tools.compare import compare
from fewstep.tools.comparison import METRICS, judge, parse_floor
from fewstep.tools.features import open_image_graph, open_scorer
from fewstep.tools.pairs import How, Subject, open_artist, pairs
from fewstep.tools.plots import curves
from fewstep.tools.subjects import make_subjects, read_picture, read_prompts


def scaled(source, dest, factor):
    """A copy of a bundle whose denoiser outputs `factor` times as much."""
    shutil.copytree(source, dest)
    path = dest / "unet/model.onnx"
    model = onnx.load(path)
    node = next(n for n in model.graph.node if "out_sample" in n.output)
    node.output[0] = "unscaled"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), "factor"))
    model.graph.node.append(helper.make_node("Mul", ["unscaled", "factor"], ["out_sample"]))
    onnx.save(model, path)
    return rehash(dest, "unet/model.onnx")


def rehash(bundle, file, **changes):
    """Make the manifest true again after a change to one file, and apply `changes` to its sample."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / file).read_bytes()
    manifest["files"][file] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["sample"] |= changes
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


def image_graph(path, side=16, inputs=1):
    """Pictures to their mean colour."""
    shape = ["n", 3, side, side]
    values = [helper.make_tensor_value_info(f"in{i}", TensorProto.FLOAT, shape) for i in range(inputs)]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3])
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    node = helper.make_node("ReduceMean", ["in0", "axes"], ["out"], keepdims=0)
    graph = helper.make_graph([node], "eye", values, [out], [axes])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def scorer_folder(folder, captions=("a red apple", "a green leaf", "a blue sky"), **changes):
    folder.mkdir()
    image_graph(folder / "image.onnx")
    np.save(folder / "captions.npy", np.eye(3, dtype=np.float32)[: len(captions)])
    data = {"fewstep_scorer": 1, "captions": list(captions), **changes}
    (folder / "scorer.json").write_text(json.dumps(data))
    return folder


@pytest.fixture(scope="module")
def louder(pixel_bundle, tmp_path_factory):
    """The unconditional bundle with its network's output 1 % too large."""
    return scaled(pixel_bundle, tmp_path_factory.mktemp("louder") / "louder", 1.01)


@pytest.fixture(scope="module")
def compared(pixel_bundle, louder, tmp_path_factory):
    """One comparison of two candidates with everything switched on: (Answer, folder)."""
    folder = tmp_path_factory.mktemp("compared")
    graph = image_graph(folder / "eye.onnx")
    floors = {"latent_psnr_db": 1000.0, "feature_distance": 2.0}
    answer = compare(
        pixel_bundle, [louder, pixel_bundle], How(), features=graph, floors=floors, output=folder / "out"
    )
    return answer, folder / "out"


def drawn(reference, candidate, how=How(), count=2):  # noqa: B008
    right, other = (
        open_artist(name, Bundle.open(path), how)
        for name, path in (("right", reference), ("other", candidate))
    )
    subjects = [Subject(seed) for seed in range(count)]
    ticks = list(pairs(right, [other], subjects, how))
    return right, ticks, [tick.pair for tick in ticks if tick.pair]


def test_a_network_one_hundredth_too_loud_has_40_db_at_every_call(pixel_bundle, louder):
    _, _, found = drawn(pixel_bundle, louder)
    for pair in found:
        assert pair.led_sqnr_db == pytest.approx([40] * 4, abs=1e-3)
        assert pair.metrics["network_sqnr_db"] == pytest.approx(40, abs=1e-3)


def test_the_first_step_s_sqnr_is_what_the_plan_makes_of_that_error(pixel_bundle, louder):
    right, _, [pair, _] = drawn(pixel_bundle, louder)
    call = right.plan.calls[0]
    through = next(c for kind, _, c in call.next if kind == "d") * call.x0[1]  # from output to next state
    steps = right.pipeline.generate(seed=0, output_type="latent", plan=right.plan)
    right.tap.outputs = []
    state = next(steps).x
    wanted = 20 * math.log10(np.linalg.norm(state) / np.linalg.norm(0.01 * through * right.tap.outputs[0]))
    assert pair.own_sqnr_db[0] == pytest.approx(wanted, abs=0.01)


def test_a_led_candidate_is_asked_about_the_reference_s_states_however_far_it_would_drift(
    pixel_bundle, tmp_path
):
    """Three times the output errs by twice the signal, -6.02 dB, at every call only if every input is the same."""
    _, _, [pair] = drawn(pixel_bundle, scaled(pixel_bundle, tmp_path / "wild", 3.0), count=1)
    assert pair.led_sqnr_db == pytest.approx([-20 * math.log10(2)] * 4, abs=1e-3)
    assert pair.metrics["latent_sqnr_db"] == pair.own_sqnr_db[-1]
    assert len({round(value, 1) for value in pair.own_sqnr_db}) == 4


def test_a_led_candidate_leaves_no_trace_in_what_it_draws_next(text_bundle, tmp_path):
    """Guidance writes into what a session returns; the reference's recorded outputs must survive that."""
    other = scaled(text_bundle, tmp_path / "louder", 1.01)
    right, candidate = (open_artist(n, Bundle.open(p), How()) for n, p in (("r", text_bundle), ("c", other)))
    subject = Subject(0, "a red apple")
    once = [t.pair for t in pairs(right, [candidate], [subject], How()) if t.pair]
    twice = [t.pair for t in pairs(right, [candidate, candidate], [subject, subject], How()) if t.pair]
    assert len(twice) == 4
    assert all(pair.metrics == once[0].metrics and pair.led_sqnr_db == once[0].led_sqnr_db for pair in twice)
    assert once[0].led_sqnr_db == pytest.approx([40] * 4, abs=1e-3)


def test_equal_bundles_are_equal_in_every_number(text_bundle):
    answer = compare(text_bundle, [text_bundle], How(), prompts=["a red apple"], count=6)
    [candidate] = answer.data["candidates"]
    for name in ("image_psnr_db", "latent_psnr_db", "latent_sqnr_db", "network_sqnr_db"):
        got = candidate["metrics"][name]
        assert (got["value"], got["low"], got["worst"]) == (MAX_DB, MAX_DB, MAX_DB)
    assert candidate["metrics"]["ssim"]["value"] == pytest.approx(1, abs=1e-12)
    assert "equal" in answer.text
    assert answer.exit_code == 0


def test_pictures_take_seeds_in_turn_and_equal_ones_for_all(pixel_bundle):
    answer = compare(pixel_bundle, [pixel_bundle], How(), seed=7, count=3)
    assert [subject["seed"] for subject in answer.data["subjects"]] == [7, 8, 9]
    metrics = answer.data["candidates"][0]["metrics"]["image_psnr_db"]
    assert (metrics["n"], metrics["low"]) == (3, None)  # three pictures have no 95 % interval of a median


def test_the_clock_ends_where_the_work_does(pixel_bundle, louder):
    _, ticks, _ = drawn(pixel_bundle, louder, count=3)
    fractions = [tick.fraction for tick in ticks]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert "picture 3 of 3" in ticks[-1].note


def test_other_plans_have_no_common_steps(pixel_bundle, make_bundle, tmp_path):
    other = make_bundle(tmp_path / "euler", text=False, golden=False)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["plans"]["default"] = open_artist("x", Bundle.open(other), How(steps=3)).plan.to_json()
    (other / "manifest.json").write_text(json.dumps(manifest))
    answer = compare(pixel_bundle, [other], How(), count=1)
    [candidate] = answer.data["candidates"]
    assert "network_sqnr_db" not in candidate["metrics"]
    assert candidate["own"] == candidate["led"] == []
    assert "plans differ" in answer.text
    assert candidate["metrics"]["image_psnr_db"]["value"] < MAX_DB
    same = compare(pixel_bundle, [other], How(steps=5), count=1)
    assert same.data["candidates"][0]["metrics"]["network_sqnr_db"]["value"] == MAX_DB
    with pytest.raises(BadInput, match="differ in plan or guidance"):
        compare(pixel_bundle, [other], How(), floors={"network_sqnr_db": 30.0})


def test_a_checkpoint_is_a_reference_too(tiny_sd, tiny_bundle):
    """Torch and ONNX Runtime differ by rounding: far above 60 dB, and yet not equal."""
    answer = compare(tiny_sd, [tiny_bundle], How(steps=2), prompts=["a cat"], count=1)
    assert answer.data["reference"]["checkpoint"] is True
    metrics = answer.data["candidates"][0]["metrics"]
    assert 60 < metrics["network_sqnr_db"]["value"] < MAX_DB
    assert metrics["image_psnr_db"]["value"] > 60


def test_a_missed_floor_is_exit_code_5_and_says_by_how_much(compared):
    answer, output = compared
    assert answer.exit_code == 5
    for candidate, value in zip(answer.data["candidates"], answer.data["candidates"], strict=True):
        [short] = candidate["shortfalls"]
        assert short["metric"] == "latent_psnr_db"
        by = 1000 - value["metrics"]["latent_psnr_db"]["value"]
        assert f"missed by {by:.6g} dB" in answer.data["error"]["message"]
    assert answer.data["error"]["type"] == "GateFailed"
    assert (output / "compare.json").exists()  # what was drawn is not lost
    assert "at least 1000 dB wanted" in (output / "compare.html").read_text()


def test_floors_bound_what_is_better_from_below_and_distances_from_above():
    metrics = {name: {"value": 0.5} for name in METRICS}
    assert judge(metrics, dict.fromkeys(METRICS, 0.5)) == []
    for name, metric in METRICS.items():
        strict, lax = (0.6, 0.4) if metric.more_is_better else (0.4, 0.6)
        assert [s.metric for s in judge(metrics, {name: strict})] == [name]
        assert judge(metrics, {name: lax}) == []
    with pytest.raises(BadInput, match="not measured"):
        judge({}, {"ssim": 0.9}, "b")


def test_floors_on_the_command_line(pixel_bundle, louder, capsys):
    words = ["compare", str(pixel_bundle), str(louder), "--count", "1", "--json", "--floor"]
    assert cli.main([*words, "latent_psnr_db=10", "--floor", "ssim=0.1"]) == 0
    assert "error" not in json.loads(capsys.readouterr().out)
    assert cli.main([*words, "latent_psnr_db=200"]) == 5
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["exit_code"] == 5
    assert "latent_psnr_db is" in err


@pytest.mark.parametrize(
    ("floor", "said"),
    [
        ("simm=0.9", "did you mean ssim"),
        ("zzz=1", "floor 'zzz'"),
        ("ssim", "ssim=NUMBER"),
        ("ssim=much", "ssim=NUMBER"),
        ("ssim=nan", "ssim=NUMBER"),
        ("frechet_distance=1", "--features"),
        ("retrieval_top1=90", "--scorer"),
    ],
)
def test_bad_floors_are_refused_before_anything_is_opened(floor, said, capsys):
    assert cli.main(["compare", "nowhere", "nowhere-else", "--floor", floor]) == 2
    assert said in capsys.readouterr().err


def test_parse_floor():
    assert parse_floor("ssim=0.95") == ("ssim", 0.95)


def test_the_document_is_finite_json_with_every_picture(compared):
    answer, output = compared
    text = (output / "compare.json").read_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in the document"))
    assert (data["schema"], data["kind"]) == (1, "fewstep-compare")
    louder, equal = data["candidates"]
    assert len(louder["pairs"]) == len(data["subjects"]) == 8
    assert {"seed", "caption", "ssim", "own_sqnr_db", "led_sqnr_db"} <= louder["pairs"][0].keys()
    assert len(louder["own"]) == len(louder["led"]) == 4
    assert equal["metrics"]["frechet_distance"]["value"] == pytest.approx(0, abs=1e-12)
    metrics = louder["metrics"]
    assert metrics["frechet_distance"]["value"] > 0
    assert set(metrics) == {name for name in METRICS if METRICS[name].needs != "scorer"}
    got = metrics["image_psnr_db"]
    assert got["worst"] <= got["low"] <= got["value"] <= got["high"]
    json.dumps(answer.data, allow_nan=False)


def test_the_page_shows_the_worst_pairs_of_those_that_differ(compared):
    page = (compared[1] / "compare.html").read_text()
    for title in ("Floors", "Step by step", "The worst pairs", "How it was drawn"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/png") == 2 * 6  # six pairs of the first candidate, none of the equal one
    assert page.count('<line class="curve') == 2 * 3  # four steps and four calls of one of the two
    assert "<script" not in page
    assert "$" not in page


def test_what_users_write_is_escaped_on_the_page(text_bundle, tmp_path):
    other = scaled(text_bundle, tmp_path / "<b>", 1.1)
    compare(text_bundle, [other], How(), prompts=["a <cat>"], count=1, output=tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text()
    assert "a &lt;cat&gt;" in page
    assert "<cat>" not in page
    assert "<b>&lt;b&gt;</b> against tiny" in page
    assert "<td><b>" not in page


def test_the_docs_explain_every_number():
    page = (Path(__file__).parents[2] / "docs/how-to-measure-quality.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in page] == []


def test_curves_place_values_and_leave_out_none():
    svg = curves([("a", [10.0, None, 0.0])], "dB", "step")
    assert svg.count("<circle") == 2
    assert svg.count('<line class="curve') == 1
    assert 'cx="10.00%"' in svg
    assert 'cx="98.00%"' in svg
    assert 'cy="190.0"' in svg  # 0 lies on the axis
    assert curves([], "dB", "step").count("<circle") == 0


def test_a_frechet_distance_of_few_pictures_has_no_interval(pixel_bundle, louder, compared, tmp_path):
    graph = image_graph(tmp_path / "eye.onnx")
    few = compare(pixel_bundle, [louder], How(), features=graph, count=5)
    got = few.data["candidates"][0]["metrics"]["frechet_distance"]
    assert (got["low"], got["high"]) == (None, None)
    enough = compared[0].data["candidates"][0]["metrics"]["frechet_distance"]  # 8 pictures, 3 features
    assert 0 <= enough["low"] < enough["high"]


def test_a_scorer_ranks_the_captions(tmp_path):
    scorer = open_scorer(scorer_folder(tmp_path / "s"))
    picture = np.zeros((16, 16, 3))
    picture[..., 0], picture[..., 1] = 0.2, 0.9  # mostly green, some red, no blue
    assert [scorer.rank(picture, caption) for caption in scorer.captions] == [1, 0, 2]


def test_a_scorer_brings_its_prompts_and_its_shares(text_bundle, tmp_path):
    folder = scorer_folder(tmp_path / "s", prompts=["a blue sky", "a red apple"])
    answer = compare(text_bundle, [text_bundle], How(steps=1), scorer=folder)
    prompts = [subject["prompt"] for subject in answer.data["subjects"]]
    assert prompts == ["a blue sky"] * 4 + ["a red apple"] * 4
    metrics = answer.data["candidates"][0]["metrics"]
    assert (
        metrics["retrieval_top5"]["value"] == metrics["retrieval_top5"]["reference"] == 100
    )  # of three captions
    assert metrics["retrieval_top1"]["value"] == metrics["retrieval_top1"]["reference"]
    with pytest.raises(BadInput, match="did you mean 'a red apple'"):
        compare(text_bundle, [text_bundle], How(), prompts=["a rad apple"], scorer=folder)


@pytest.mark.parametrize("damage", ["json", "npy", "captions", "prompts", "zero", "image", "schema"])
def test_a_damaged_scorer_is_refused_by_name(damage, tmp_path):
    folder = scorer_folder(tmp_path / "s", **({"prompts": ["else"]} if damage == "prompts" else {}))
    match damage:
        case "json":
            (folder / "scorer.json").write_text("{")
        case "npy":
            (folder / "captions.npy").write_bytes(b"\x93NUMPY")
        case "captions":
            np.save(folder / "captions.npy", np.eye(2))
        case "zero":
            np.save(folder / "captions.npy", np.zeros((3, 3)))
        case "image":
            (folder / "image.onnx").unlink()
        case "schema":
            (folder / "scorer.json").write_text("[]")
    with pytest.raises(BadInput, match=re.escape(str(folder))):
        open_scorer(folder)


def test_an_unreadable_feature_graph_is_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(BadInput, match="cannot load it"):
        open_image_graph(tmp_path / "bad.onnx")
    with pytest.raises(BadInput, match="is not a file"):
        open_image_graph(tmp_path / "none.onnx")
    with pytest.raises(BadInput, match="one float input"):
        open_image_graph(image_graph(tmp_path / "two.onnx", inputs=2))


def test_a_feature_graph_of_another_size_says_so(pixel_bundle, tmp_path):
    with pytest.raises(BadInput, match="cannot take a picture of 1x3x16x16"):
        compare(pixel_bundle, [pixel_bundle], How(), features=image_graph(tmp_path / "eye.onnx", side=24))


def test_bundles_that_cannot_draw_the_same_are_refused(text_bundle, pixel_bundle, tmp_path):
    with pytest.raises(BadInput, match="has task unconditional; expected text-to-image"):
        compare(text_bundle, [pixel_bundle], How(), prompts=["a cat"])
    larger = tmp_path / "larger"
    shutil.copytree(pixel_bundle, larger)
    rehash(larger, "unet/model.onnx", height=24)
    with pytest.raises(BadInput, match="width and height.*--height"):
        compare(pixel_bundle, [larger], How())
    answer = compare(pixel_bundle, [larger], How(height=24, width=20), count=1)
    assert answer.data["candidates"][0]["metrics"]["image_psnr_db"]["value"] == MAX_DB
    cells = tmp_path / "cells"
    shutil.copytree(pixel_bundle, cells)
    rehash(cells, "unet/model.onnx", factor=4)
    with pytest.raises(BadInput, match="pixels a latent cell"):
        compare(pixel_bundle, [cells], How())


def test_what_is_asked_for_must_fit_the_model(text_bundle, pixel_bundle, tmp_path):
    told, free = (Bundle.open(path, check="size").manifest for path in (text_bundle, pixel_bundle))
    classes = replace(free, classes=10)
    for manifest, prompts, labels, said in (
        (told, [], [], "no prompt"),
        (told, ["a cat"], [1], "class labels"),
        (free, ["a cat"], [], "a prompt"),
        (classes, [], [], "no class label"),
    ):
        with pytest.raises(BadInput, match=said):
            make_subjects(manifest, prompts, labels, None, 0)
    subjects = make_subjects(classes, [], [3, 4], None, 5)
    assert [s.label for s in subjects] == [3] * 4 + [4] * 4
    assert [s.seed for s in subjects] == list(range(5, 13))
    assert len(make_subjects(free, [], [], None, 0)) == 8


def test_a_restoration_model_is_compared_on_what_it_restores(pixel_bundle, tmp_path):
    """The network is asked about one observation a picture, and led to the same states: 40 dB again."""
    bundle = tmp_path / "restorer"
    shutil.copytree(pixel_bundle, bundle)
    path = bundle / "unet/model.onnx"
    model = onnx.load(path)
    sample = model.graph.input[0]
    observation = onnx.ValueInfoProto.FromString(sample.SerializeToString())
    observation.name = "observation"
    model.graph.input.append(observation)
    model.graph.node[-1].output[0] = "alone"
    model.graph.node.append(helper.make_node("Add", ["alone", "observation"], ["out_sample"]))
    onnx.save(model, path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    inputs = manifest["parts"]["unet"]["inputs"]
    inputs.append(inputs[0] | {"name": "observation"})
    process = ResidualShift()
    manifest |= {"process": process.to_json(), "prediction": "sample", "sampler": "ddim"}
    manifest["plans"] = {"default": plan("ddim", 4, process, prediction="sample").to_json()}
    manifest["quality"] = {}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    rehash(bundle, "unet/model.onnx")
    louder = scaled(bundle, tmp_path / "louder", 1.01)
    files = []
    for seed in range(2):
        y = np.random.default_rng(seed).standard_normal((1, 4, 8, 8)).astype(np.float32)
        files.append(str(tmp_path / f"y{seed}.npy"))
        np.save(files[-1], y)
    answer = compare(bundle, [louder], How(), observations=files, count=1)
    [candidate] = answer.data["candidates"]
    assert [pair["caption"] for pair in candidate["pairs"]] == ["y0.npy", "y1.npy"]
    for pair in candidate["pairs"]:
        assert pair["led_sqnr_db"] == pytest.approx([40] * 4, abs=1e-3)
    with pytest.raises(BadInput, match="no observation"):
        compare(bundle, [louder], How())
    with pytest.raises(BadInput, match="takes none"):
        compare(pixel_bundle, [pixel_bundle], How(), observations=files)


def test_observations_are_pictures_or_arrays(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    to_image(pixels).save(tmp_path / "y.png")
    assert read_picture(str(tmp_path / "y.png")) == pytest.approx(pixels / 255)
    for name in ("none.png", "bad.png", "bad.npy"):
        if name.startswith("bad"):
            (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(BadInput, match="cannot be read"):
            read_picture(str(tmp_path / name))


def test_prompts_come_from_a_file_too(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("﻿a cat\n\n  un chat noir à Paris \n", encoding="utf-8")
    assert read_prompts(file) == ["a cat", "un chat noir à Paris"]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read_prompts(file)
    file.write_text("\n")
    with pytest.raises(BadInput, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(BadInput, match="cannot be read"):
        read_prompts(tmp_path / "none")


def test_sources_that_are_no_bundles_get_the_reader_s_own_errors(pixel_bundle, tmp_path):
    with pytest.raises(BundleError):
        compare(tmp_path / "nowhere", [pixel_bundle], How())
    with pytest.raises(BundleError):
        compare(pixel_bundle, [tmp_path], How())
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        compare(tmp_path / "weights.bin", [pixel_bundle], How())


@pytest.mark.parametrize("moment", ["loading", "drawing"])
def test_an_interrupted_comparison_leaves_no_report(moment, pixel_bundle, start, appears, tmp_path):
    process = start("compare", pixel_bundle, pixel_bundle, "--count", 10_000, "-o", tmp_path / "out")
    appears(tmp_path, "out", process)
    if moment == "drawing":
        assert "picture 1 of 10000" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []
