import json

import pytest

from shards.common.class_hierarchy import HierarchyNode, parse_hierarchy
from shards.common.errors import UserError


def test_parse_hierarchy_returns_ancestors_that_end_at_a_part() -> None:
    tree = {
        "LabelName": "/m/root",
        "Subcategory": [
            {"LabelName": "/m/car", "Subcategory": [{"LabelName": "/m/taxi"}], "Part": [{"LabelName": "/m/wheel"}]}
        ],
    }
    assert parse_hierarchy(json.dumps(tree), "tree.json") == [
        HierarchyNode("/m/root", ()),
        HierarchyNode("/m/car", ("/m/root",)),
        HierarchyNode("/m/taxi", ("/m/root", "/m/car")),
        HierarchyNode("/m/wheel", ()),
    ]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"LabelName": 1, "Subcategory": 3}', "[" * 100_000, b"\xff"])
def test_parse_hierarchy_refuses_another_form(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"^tree.json: not Open Images' class hierarchy"):
        parse_hierarchy(text, "tree.json")
