"""From a bundle to the same bundle with one more plan: references, search, writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..runtime.bundle import BundleWriter
from ..runtime.errors import PlanError
from ..runtime.files import output_errors
from ..runtime.pipeline import Pipeline
from ..runtime.progress import Progress
from .methods import METHODS
from .reference import References, Setting
from .search import Found, Search
from .store import add_plan, check_name

__all__ = ["Tuned", "tune_bundle"]

REFERENCE_SHARE = 0.4
"""Of the whole work, roughly: 100 steps a noise, against 25 to 40 rounds of a few dozen to a few hundred calls."""


@dataclass(frozen=True)
class Tuned:
    """The last event: the bundle has its plan."""

    path: Path
    name: str
    found: Found
    record: Mapping[str, Any]
    stage: str = "done"
    fraction: float | None = 1.0
    note: str = ""


def tune_bundle(
    bundle: Path,
    *,
    calls: int,
    method: str = "learned",
    setting: Setting = Setting(),  # noqa: B008
    name: str = "",
    out: Path | None = None,
    workdir: Path | None = None,
    storage: str = "",
    default: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
) -> Iterator[Progress | Tuned]:
    """Search a plan of so many calls for the model in `bundle` and add it.

    name     of the plan; empty for METHOD-CALLS
    out      a new bundle; None adds to this one
    workdir  where references and the search's state are kept, so that an interrupted job goes on; None for
             NAME.tune beside the bundle
    Nothing changes in the bundle, and nothing appears at `out`, before everything is done. Raises BadInput and its
    kinds.
    """
    if method not in METHODS:
        raise PlanError.unknown("method", method, METHODS)
    name = name or f"{method}-{calls}"
    yield Progress("check", 0.0, str(bundle))
    with Pipeline.from_pretrained(bundle, threads=threads) as pipeline:
        check_name(pipeline.manifest, name, overwrite=overwrite)
        if out is not None:
            with BundleWriter(out, overwrite):
                pass  # refuses a place where the bundle could not be put in the end
        home = pipeline.bundle.path
        references = References(pipeline, setting, workdir or home.with_name(f"{home.name}.tune"))
        for done in references.make():
            note = f"{int(done * setting.noises)} of {setting.noises} noises"
            yield Progress("references", REFERENCE_SHARE * done, note)
        problem = references.problem()
        with output_errors(references.path):
            state = references.path / f"{method}-{calls}.json"
        search = Search(problem, calls, setting.seed, state, storage)
        found: Found | None = None
        for event in METHODS[method](search):
            if isinstance(event, Found):
                found = event
            else:
                share = REFERENCE_SHARE + (0.98 - REFERENCE_SHARE) * (event.fraction or 0.0)
                yield Progress(event.stage, share, event.note)
        assert found is not None, "every search ends with what it found"
        yield Progress("write", 0.98, name)
        record = {
            "pass": "tune_plan",
            "plan": name,
            "method": method,
            "calls": calls,
            **asdict(setting),
            "prompts": list(setting.prompts),
            "score": found.score.to_json(),
            "best_fixed": {"name": found.fixed, **found.best_fixed.to_json()},
            "details": dict(found.details),
        }
        path = add_plan(pipeline.bundle, name, found.plan, record, out, default=default, overwrite=overwrite)
    yield Tuned(path, name, found, record)
