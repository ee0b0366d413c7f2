"""The names that users import."""

import importlib
import subprocess
import sys

import pytest

import maskstream


@pytest.mark.parametrize("name", maskstream.__all__)
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    value = getattr(maskstream, name)
    assert name in dir(maskstream)
    if name != "__version__":
        assert value is getattr(importlib.import_module(maskstream._MODULES[name]), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ShardStreem'"):
        maskstream.ShardStreem  # noqa: B018


def test_importing_maskstream_loads_no_heavy_package() -> None:
    code = (
        "import sys, maskstream; print([m for m in ('torch', 'pandas', 'pyarrow', 'webdataset') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
