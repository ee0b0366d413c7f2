"""Builds in the process of a test: the steps that `build-shards` takes, in one call, and what they packed."""

import tarfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from builder.commands import build as build_module
from builder.commands import dry_run
from builder.commands import retry_failed as retry_module
from builder.packing.executors import IN_THIS_PROCESS, Engine
from builder.planning.plan_build import BuildScope, plan_build
from builder.planning.selection import Quotas
from builder.sources.base import Source
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from builder.target.build_lock import BuildLock
from demo.scenes import SceneTruth
from shards.format.sample import Sample
from shards.storage.location import Location

IMAGES, ANNOTATIONS = "s3://open-images-dataset", "s3://openimages"
Options = Mapping[str, Any]  # fields of `builder.planning.plan_build.BuildScope`


def quotas(class_names: tuple[str, ...], train: int | None, evaluation: int | None, **others: Any) -> dict[str, Any]:
    return {"class_names": class_names, "images": Quotas(train, evaluation), **others}


def build(
    source: Source,
    options: Options,
    root: Location,
    *,
    engine: Engine = IN_THIS_PROCESS,
    overwrite: bool = False,
    command: str = "",
) -> build_module.Summary:
    prepared = build_module.prepare_build(
        source, root, partial(plan_build, source, BuildScope(**options)), engine=engine
    )
    return build_module.build(prepared, overwrite=overwrite, command=command)


def retry_failed(source: Source, options: Options, root: Location) -> build_module.Summary:
    return retry_module.retry_failed(
        build_module.prepare_build(source, root, partial(plan_build, source, BuildScope(**options)))
    )


def estimate(source: Source, options: Options, root: Location) -> dry_run.Estimate:
    return dry_run.estimate(
        build_module.prepare_build(source, root, partial(plan_build, source, BuildScope(**options)), writes=False)
    )


def accounts_of(root: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(root / "accounts.parquet").to_pylist()
    return rows


def samples_of(root: Path) -> dict[str, dict[str, Sample]]:
    """Split -> key -> sample, read by the standard library."""
    members: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in sorted(root.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, extension = info.name.split(".")
                file = tar.extractfile(info)
                assert file is not None
                members.setdefault((path.parent.name, key), {})[extension] = file.read()
    found: dict[str, dict[str, Sample]] = {}
    for (split, key), data in members.items():
        found.setdefault(split, {})[key] = Sample.from_members(key, data)
    return found


def mirror(scenes: SceneTruth, images: Path | None = None) -> OpenImages:
    """Return the drawn scenes on disk as a source, with a folder of images that may be another one."""
    return OpenImages(source_location(str(images or scenes.images)), source_location(str(scenes.annotations)))


def s3_mirror() -> OpenImages:
    """Return the scenes of `s3_scenes` as a source."""
    return OpenImages(source_location(IMAGES), source_location(ANNOTATIONS))


def tree(root: Path, *, without: str = "") -> dict[str, bytes]:
    """Return relative path -> bytes of the files under a folder, without the files of one name."""
    paths = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if path.name != without}


class Killed(BaseException):
    pass


def count_steps(action: Callable[[], object], kill_at: int = 0) -> int:
    """Run an action and count its writes and deletes; `kill_at` kills it before one of them."""
    steps = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Any, **options: Any) -> None:
            nonlocal steps
            steps += 1
            if kill_at and steps >= kill_at:
                raise Killed  # also later ones: a killed process does not clean up
            real(*arguments, **options)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "delete"):
            patch.setattr(Location, name, counted(getattr(Location, name)))
        patch.setattr(BuildLock, "__enter__", lambda self: self)
        patch.setattr(BuildLock, "__exit__", lambda *_: None)
        action()
    return steps
