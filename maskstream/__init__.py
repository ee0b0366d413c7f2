"""Mask R-CNN on a few classes of Open Images, streamed from tar shards in cloud storage.

The public names are imported on first use (PEP 562): `import maskstream` loads neither torch nor pandas.

    from maskstream import ShardStream, loader, open_dataset

    stream = ShardStream(open_dataset("s3://bucket/prefix"), "train", batch_size=8)
    for samples in loader(stream, workers=4):
        ...
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shards.common.version import __version__

if TYPE_CHECKING:
    from shards.common.errors import UserError as UserError
    from shards.format.dataset import Dataset as Dataset
    from shards.format.dataset import open_dataset as open_dataset
    from shards.format.dataset_writer import DatasetWriter as DatasetWriter
    from shards.format.sample import Category as Category
    from shards.format.sample import Instance as Instance
    from shards.format.sample import MaskPrediction as MaskPrediction
    from shards.format.sample import Sample as Sample
    from shards.order.mixture import Mix as Mix
    from shards.storage.location import Location as Location
    from shards.stream.loader import loader as loader
    from shards.stream.sample_cache import SampleCache as SampleCache
    from shards.stream.streams import EvalStream as EvalStream
    from shards.stream.streams import ShardStream as ShardStream

_MODULES = {
    "Category": "shards.format.sample",
    "Dataset": "shards.format.dataset",
    "DatasetWriter": "shards.format.dataset_writer",
    "EvalStream": "shards.stream.streams",
    "Instance": "shards.format.sample",
    "Location": "shards.storage.location",
    "MaskPrediction": "shards.format.sample",
    "Mix": "shards.order.mixture",
    "Sample": "shards.format.sample",
    "SampleCache": "shards.stream.sample_cache",
    "ShardStream": "shards.stream.streams",
    "UserError": "shards.common.errors",
    "loader": "shards.stream.loader",
    "open_dataset": "shards.format.dataset",
}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'maskstream' has no attribute {name!r}")
    try:
        value = getattr(import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise ModuleNotFoundError(f"{name} needs {package}: pip install '.[train]'", name=package) from error
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
