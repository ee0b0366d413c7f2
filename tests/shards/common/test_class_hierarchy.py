import json

import pytest

from shards.common.class_hierarchy import HierarchyNode, parse_hierarchy
from shards.common.errors import UserError


def test_nodes_come_with_the_labels_above_them_and_a_part_is_not_a_kind() -> None:
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
def test_another_form_is_an_error_that_names_the_file(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"^tree.json: not Open Images' class hierarchy"):
        parse_hierarchy(text, "tree.json")
