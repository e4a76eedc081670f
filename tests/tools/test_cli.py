"""The command line as a user and as a script meets it: exit codes, one-line errors, one JSON document."""

import json
import sys
from types import SimpleNamespace

import pytest

from fewstep import __version__
from fewstep.runtime.errors import BundleError, Cancelled, GateFailed, MissingExtra, OutputError
from fewstep.tools import cli
from fewstep.tools.console import Answer


@pytest.fixture
def main(capsys):
    """`main("verify", bundle)` -> (exit code, stdout, stderr), in this process."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def fails_in_one_line(result, code, *said):
    got, out, err = result
    assert got == code, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("fewstep: error: ")
    assert "Traceback" not in err
    assert "Traceback" not in out
    for text in said:
        assert text in last
    return last


def test_version_is_the_package_s(fewstep):
    done = fewstep("--version")
    assert (done.returncode, done.stdout) == (0, f"fewstep {__version__}\n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_and_imports_no_torch(command, fewstep):
    code = f"""
import sys
from fewstep.tools import cli
try:
    cli.main([{command!r}, "--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "diffusers", "transformers", "onnx"}} & set(sys.modules)
assert not heavy, heavy
"""
    import subprocess

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: fewstep {command}")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["export", "model", "-o", "x"],
        ["bench", "--runs", "many"],
        ["show", "a", "b"],
        ["targets", "--unknown"],
    ],
)
def test_a_wrong_line_is_bad_input_in_one_line(words, main):
    fails_in_one_line(main(*words), 2, "--help")


def test_a_wrong_line_with_json_is_one_document_too(main):
    code, out, _ = main("run", "--json")
    error = json.loads(out)["error"]
    assert (code, error["exit_code"], error["type"]) == (2, 2, "BadInput")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BundleError("it is\nbroken", fix="mend it"), 2),
        (MissingExtra.of("torch", "export"), 2),
        (OutputError("cannot write"), 2),
        (GateFailed("differs"), 5),
        (Cancelled("stopped"), 130),
        (KeyboardInterrupt(), 130),
        (PermissionError(13, "Permission denied", "/x"), 2),
        (OSError(28, "No space left on device"), 2),
        (ZeroDivisionError("division by zero"), 70),
        (RecursionError("too deep"), 70),
        (MemoryError(), 2),
    ],
)
def test_every_error_has_its_exit_code_and_one_line(error, code, main, monkeypatch):
    def call(args):
        raise error

    monkeypatch.setattr(cli, "_module", lambda name: SimpleNamespace(add=lambda parser: None, call=call))
    last = fails_in_one_line(main("doctor"), code)
    assert ("--debug" in last) == (code == 70)
    got, out, _ = main("doctor", "--json")
    assert (got, json.loads(out)["error"]["exit_code"]) == (code, code)


def test_debug_shows_the_traceback_and_keeps_the_exit_code(main, monkeypatch):
    def call(args):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli, "_module", lambda name: SimpleNamespace(add=lambda parser: None, call=call))
    code, _, err = main("doctor", "--debug")
    assert code == 70
    assert "Traceback" in err


def test_an_answer_prints_as_text_or_as_json(main, monkeypatch):
    answer = Answer({"a": 1}, "one", exit_code=0)
    module = SimpleNamespace(add=lambda parser: None, call=lambda args: answer)
    monkeypatch.setattr(cli, "_module", lambda name: module)
    assert main("doctor")[:2] == (0, "one\n")
    assert json.loads(main("doctor", "--json")[1]) == {"a": 1}


def test_a_reader_that_leaves_early_is_no_error(text_bundle):
    import subprocess

    command = f"{sys.executable} -m fewstep.tools.cli show {text_bundle} | true"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_targets_lists_and_shows(main):
    code, out, _ = main("targets")
    assert code == 0
    assert "laptop-cpu" in out
    assert json.loads(main("targets", "laptop-cpu", "--json")[1])["id"] == "laptop-cpu"
    fails_in_one_line(main("targets", "toaster"), 2, "toaster", "laptop-cpu")


def test_doctor_names_the_missing_extra_and_its_command(main, monkeypatch):
    from fewstep.tools import doctor

    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "torch" else "1.0")
    code, out, _ = main("doctor", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["missing"] == {"export": ["torch"]}
    assert data["advice"][0] == "torch not installed: pip install 'fewstep[export]'"
    assert "float32 kernels" in main("doctor")[1]
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name == "openvino" else "1.0")
    data = json.loads(main("doctor", "--json")[1])
    assert data["missing"] == {"openvino": ["openvino"]}
    assert data["openvino_devices"] == []


def test_kernels_follow_the_flags():
    from fewstep.tools.doctor import kernels
    from fewstep.tools.host import ARM_FLAGS, X86_FLAGS

    old = dict.fromkeys(X86_FLAGS, False)
    assert not kernels(old)["float32"]["fast"]
    assert kernels({**old, "avx2": True, "fma": True})["float32"] == {"fast": True, "why": "AVX2 and FMA"}
    assert not kernels({**old, "avx2": True, "fma": True})["int8"]["fast"]
    assert kernels({**old, "avx_vnni": True})["int8"]["why"] == "AVX-VNNI"
    assert not kernels({**old, "avx512f": True})["bfloat16"]["fast"]
    assert kernels({**old, "avx512_bf16": True})["bfloat16"] == {"fast": True, "why": "AVX-512 BF16"}
    arm = {**dict.fromkeys(ARM_FLAGS, False), "neon": True, "asimddp": True}
    assert kernels(arm)["int8"] == {"fast": True, "why": "dot product"}
    assert kernels({}) == {}


def test_show_a_bundle(main, text_bundle):
    code, out, _ = main("show", text_bundle)
    assert code == 0
    for text in ("tiny", "text-to-image", "unet", "ddim", "Apache-2.0", "multiple of 4", "cfg, scale 3"):
        assert text in out
    data = json.loads(main("show", text_bundle, "--json")[1])
    assert data["kind"] == "bundle"
    assert [plan["steps"] for plan in data["plans"]] == [4]
    assert data["bytes"] == sum(f.stat().st_size for f in text_bundle.rglob("*") if f.is_file()) - (
        (text_bundle / "manifest.json").stat().st_size
    )


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_is_no_bundle_is_named(command, main, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    fails_in_one_line(main(command, tmp_path), 2, "photo.jpg")


def test_verify_passes_a_good_bundle(main, text_bundle, pixel_bundle):
    for bundle in (text_bundle, pixel_bundle):
        code, out, _ = main("verify", bundle, "--json")
        data = json.loads(out)
        assert code == 0
        assert data["golden"]["error"] < 1e-5
        assert "unet" in data["graphs"]


def test_verify_says_when_there_is_no_golden_latent(main, tmp_path, make_bundle):
    code, out, _ = main("verify", make_bundle(tmp_path / "b", golden=False))
    assert code == 0
    assert "no golden latent" in out


def test_verify_finds_a_changed_byte(main, own_bundle):
    path = own_bundle / "unet/model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fails_in_one_line(main("verify", own_bundle), 2, "unet/model.onnx")


def test_verify_finds_an_extra_and_a_missing_file(main, own_bundle):
    (own_bundle / "notes.txt").write_text("x")
    fails_in_one_line(main("verify", own_bundle), 2, "notes.txt")
    (own_bundle / "notes.txt").unlink()
    (own_bundle / "vae_decoder/model.onnx").unlink()
    fails_in_one_line(main("verify", own_bundle), 2, "vae_decoder")


def test_verify_fails_the_gate_where_the_engine_computes_something_else(main, own_bundle, golden_of):
    golden_of(own_bundle, seed=1)  # the values of seed 0 under the name of seed 1
    fails_in_one_line(main("verify", own_bundle), 5, "golden latent differs", "fewstep doctor")
    code, out, _ = main("verify", own_bundle, "--json")
    assert (code, json.loads(out)["error"]["type"]) == (5, "GateFailed")


def test_an_import_that_failed_because_of_an_interrupt_is_an_interrupt():
    """pybind11 turns a Ctrl-C inside a module's initialisation into an ImportError with the interrupt as its cause."""
    error = ImportError("initialization failed")
    error.__cause__ = KeyboardInterrupt()
    assert cli.describe(error)["exit_code"] == 130
    assert cli.describe(ImportError("initialization failed"))["exit_code"] == 70
