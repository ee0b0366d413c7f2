from pathlib import Path

import pytest

from demo.scenes import SceneTruth
from shards.storage.location import Location
from tests.builder.builds import build, mirror, quotas

CLASSES = ("Person", "Car", "Traffic light", "Traffic sign")
EVERYTHING = quotas(CLASSES, 1000, 1000, images_per_shard=4)


@pytest.fixture(scope="session")
def unbroken(scenes: SceneTruth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of `EVERYTHING`. Read only."""
    root = tmp_path_factory.mktemp("unbroken") / "out"
    build(mirror(scenes), EVERYTHING, Location(str(root)))
    return root
