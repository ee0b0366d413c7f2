"""The names that users import."""

import importlib
import subprocess
import sys

import pytest

import maskstream


def test_a_public_name_is_the_object_of_its_module() -> None:
    for name, module in maskstream._MODULES.items():
        assert getattr(maskstream, name) is getattr(importlib.import_module(module), name)
    assert set(maskstream.__all__) <= set(dir(maskstream))
    with pytest.raises(AttributeError, match="no attribute 'ShardStreem'"):
        maskstream.ShardStreem  # noqa: B018


def test_importing_maskstream_loads_no_heavy_package() -> None:
    code = "import sys, maskstream; assert not {'torch', 'pandas', 'pyarrow', 'webdataset'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
