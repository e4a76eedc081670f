"""Networks that look at pictures: any ONNX graph that gives a vector, and scorers that also know captions.

An image graph has one input, RGB pictures in 0..1 as [n, 3, height, width], and its first output holds one vector a
picture, [n, ...]. Resizing and normalising belong into the graph: what was done here in silence nobody
could repeat elsewhere.

A scorer is a folder with three files, and no code:

    scorer.json   {"fewstep_scorer": 1, "captions": [...], "prompts": [...]}; prompts, which may be left out, are those
                  of the captions that are worth drawing, for when the user names none
    image.onnx    an image graph
    captions.npy  float32 [captions, features]: each caption's vector, by the text network that belongs to the graph

A picture fits a caption as well as the cosine of their vectors says. models/train/export_scorer.py writes such a
folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BadInput
from .console import needs

__all__ = ["ImageGraph", "Scorer", "open_image_graph", "open_scorer"]

Array = NDArray[Any]

SCHEMA = 1
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16"}
LINE = 160
"""Characters of another library's message that are shown."""


@dataclass(frozen=True)
class ImageGraph:
    name: str
    input: str
    dtype: str
    _session: Any

    def __call__(self, picture: Array) -> Array:
        """[height, width, 3] in 0..1 -> float64 [features]. Raises BadInput where the graph takes no such picture."""
        feed = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], dtype=self.dtype)
        try:
            vector = np.asarray(self._session.run(None, {self.input: feed})[0], dtype=np.float64)
        except Exception as error:  # it raises a dozen unrelated types, some of them straight from pybind
            size = "x".join(map(str, feed.shape))
            raise BadInput(
                f"{self.name} cannot take a picture of {size} ({_line(error)})",
                expected="a graph for this very size, or one that resizes",
                fix="put a Resize in front of its first node",
            ) from None
        if vector.shape[:1] != (1,) or vector.size < 1 or not np.isfinite(vector).all():
            raise BadInput(
                f"{self.name} gives {list(vector.shape)} for one picture"
                + ("" if np.isfinite(vector).all() else ", with NaN or infinity"),
                expected="finite [1, features]",
            )
        return vector.reshape(-1)


@dataclass(frozen=True)
class Scorer:
    image: ImageGraph
    captions: tuple[str, ...]
    vectors: Array
    """[captions, features], of length 1 each."""
    prompts: tuple[str, ...]

    def rank(self, picture: Array, caption: str) -> int:
        """How many captions fit the picture better than its own; 0 means it is retrieved first."""
        vector = self.image(picture)
        if vector.size != self.vectors.shape[1]:
            raise BadInput(
                f"{self.image.name} gives {vector.size} features, the captions have {self.vectors.shape[1]}",
                fix="export both from the same scorer",
            )
        likeness = self.vectors @ vector  # the picture's own length changes no rank
        return int(np.count_nonzero(likeness > likeness[self.captions.index(caption)]))

    def check(self, prompts: Sequence[str]) -> None:
        """Raises BadInput for a prompt that is none of the captions: there is nothing to retrieve."""
        from difflib import get_close_matches

        known = set(self.captions)
        for prompt in prompts:
            if prompt not in known:
                near = get_close_matches(prompt, self.captions, n=3, cutoff=0.5)
                raise BadInput(
                    f"the scorer has no caption {prompt[:80]!r}",
                    expected=f"one of its {len(self.captions)}",
                    fix=f"did you mean {' or '.join(map(repr, near))}?" if near else "leave out --scorer",
                )


def open_image_graph(path: Path, threads: int | None = None) -> ImageGraph:
    """Raises BadInput saying why the file is not an image graph."""
    with needs("onnx"):
        import onnxruntime

    if not path.is_file():
        raise BadInput(f"{path} is not a file", expected="an .onnx graph from pictures to vectors")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters is raised
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BadInput(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it ({_line(error)})",
            expected="an .onnx graph from pictures to vectors",
        ) from None
    inputs = session.get_inputs()
    taken = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in DTYPES:
        raise BadInput(f"{path} takes {taken or 'nothing'}", expected="one float input [n, 3, height, width]")
    return ImageGraph(path.name, inputs[0].name, DTYPES[inputs[0].type], session)


def open_scorer(folder: Path, threads: int | None = None) -> Scorer:
    """Raises BadInput naming the file at fault."""
    file = folder / "scorer.json"
    fix = "models/train/export_scorer.py writes one; tools/features.py says what belongs into it"
    try:
        data = json.loads(file.read_bytes())
        vectors = np.load(folder / "captions.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder} is no scorer ({_line(error)})", expected=file.name, fix=fix) from None
    data = data if isinstance(data, dict) else {}
    captions: Any = data.get("captions")
    prompts: Any = data.get("prompts", captions)
    if data.get("fewstep_scorer") != SCHEMA or not _texts(captions) or not _texts(prompts):
        raise BadInput(f"{file}", expected=f'"fewstep_scorer": {SCHEMA} and a list of captions', fix=fix)
    if strange := set(prompts) - set(captions):
        raise BadInput(f"{file}: prompt {min(strange)[:80]!r} is none of the captions", fix=fix)
    good = vectors.ndim == 2 and len(vectors) == len(captions) and np.issubdtype(vectors.dtype, np.floating)
    length = np.linalg.norm(vectors.astype(np.float64), axis=1) if good else np.zeros(1)
    if not good or not np.isfinite(length).all() or not (length > 0).all():
        raise BadInput(
            f"{folder}/captions.npy holds {vectors.dtype} {list(vectors.shape)}",
            expected=f"finite vectors that are not 0, float32 [{len(captions)}, features]",
            fix=fix,
        )
    image = open_image_graph(folder / "image.onnx", threads)
    return Scorer(image, tuple(captions), vectors / length[:, None], tuple(prompts))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:LINE]
