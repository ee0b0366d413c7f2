import pytest

from builder.sources.openimages.class_tables import parse_class_names
from shards.common.errors import UserError


@pytest.mark.parametrize("header", ["", "LabelName,DisplayName\n", "\ufeffLabelName,DisplayName\r\n"])
def test_class_names_are_read_with_and_without_a_header(header: str) -> None:
    data = (header + '/m/01jfm_,Vehicle registration plate\n/m/0x,"A, b"\n,\n').encode()
    assert parse_class_names(data, "x.csv") == {"/m/01jfm_": "Vehicle registration plate", "/m/0x": "A, b"}


@pytest.mark.parametrize(
    "data", [b"", b"LabelName,DisplayName\n", b"/m/1,One\n<html>\n", b"/m/1,One\n/m/2\n", b"/m/1,\xff\n"]
)
def test_damaged_class_names_are_an_error_that_names_the_file(data: bytes) -> None:
    with pytest.raises(UserError, match=r"^names\.csv: .*download it again"):
        parse_class_names(data, "names.csv")
