import pytest

from builder.sources.taxonomy import Taxonomy
from shards.common.errors import UserError

NAMES = {
    "/m/01g317": "Person",
    "/m/04yx4": "Man",
    "/m/03bt1vf": "Woman",
    "/m/0k4j": "Car",
    "/m/0k0pj": "Human nose",
    "/m/01jfm_": "Vehicle registration plate",
    "/m/015qff": "Traffic light",
}
CHILDREN = {"/m/0bl9f": frozenset(["/m/01g317", "/m/0k4j"]), "/m/01g317": frozenset(["/m/04yx4", "/m/03bt1vf"])}
TAXONOMY = Taxonomy(NAMES, CHILDREN)


@pytest.mark.parametrize("wanted", ["Traffic light", "traffic LIGHT", " traffic  light ", "/m/015qff"])
def test_find_takes_names_in_any_case_and_mids(wanted: str) -> None:
    assert TAXONOMY.find(wanted) == "/m/015qff"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["Persn"], "'Persn': did you mean Person"),
        (["registration"], "'registration': did you mean Vehicle registration plate"),
        (["/m/zzz"], "unknown class '/m/zzz'"),
        (["Person", "/m/01g317"], "requested twice"),
    ],
)
def test_wrong_requests_are_errors(wanted: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TAXONOMY.choose(wanted)


def test_ids_follow_the_order_of_the_request_and_children_count() -> None:
    classes = TAXONOMY.choose(["car", "Person"])
    assert [(c.id, c.name, c.mid) for c in classes.categories] == [(1, "Car", "/m/0k4j"), (2, "Person", "/m/01g317")]
    assert classes.owners == {"/m/0k4j": 1, "/m/01g317": 2, "/m/04yx4": 2, "/m/03bt1vf": 2}
    # The most specific class owns a label.
    assert TAXONOMY.choose(["Person", "Man"]).owners == {"/m/01g317": 1, "/m/03bt1vf": 1, "/m/04yx4": 2}
    assert TAXONOMY.choose(["Man", "Person"]).owners == {"/m/01g317": 2, "/m/03bt1vf": 2, "/m/04yx4": 1}
    assert TAXONOMY.choose(["Person"], exact=True).owners == {"/m/01g317": 1}


def test_other_classes_follow_by_name_and_own_the_remaining_labels() -> None:
    classes = TAXONOMY.choose(["Traffic light", "Person"], others=True)
    assert [category.name for category in classes.wanted] == ["Traffic light", "Person"]
    others = ["Car", "Human nose", "Vehicle registration plate"]
    assert [category.name for category in classes.categories[2:]] == others
    assert {category.id for category in classes.categories} == set(range(1, 6))
    assert (classes.owners["/m/04yx4"], classes.owners["/m/0k4j"]) == (2, 3)
    assert set(classes.owners) == set(NAMES)
    assert classes.wanted_labels == ("/m/015qff", "/m/01g317", "/m/03bt1vf", "/m/04yx4")
    exact = TAXONOMY.choose(["Person"], exact=True, others=True)
    assert {category.name for category in exact.categories} == set(NAMES.values())
    classes = TAXONOMY.choose([])  # all of them, without their children
    assert [category.name for category in classes.wanted] == sorted(NAMES.values())
    assert (classes.wanted, sorted(classes.owners.values())) == (classes.categories, list(range(1, 8)))


def test_verified_labels_become_verified_classes() -> None:
    classes = TAXONOMY.choose(["Person", "Man", "Car"])

    def verified(present: set[str], absent: set[str], annotated: set[int] = frozenset()) -> object:  # type: ignore[assignment]
        return classes.verified(frozenset(present), frozenset(absent), frozenset(annotated))

    assert verified({"/m/04yx4"}, {"/m/0k4j"}) == ((1, 2), (3,))  # a Man is a Person
    assert verified(set(), {"/m/01g317"}) == ((), (1, 2))  # no Person, so no Man
    assert verified(set(), {"/m/04yx4"}) == ((), (2,))  # the absence of a Man does not rule out a Person
    assert verified({"/m/03bt1vf"}, {"/m/01g317"}) == ((1,), (2,))  # present takes precedence
    assert verified(set(), {"/m/0k4j"}, {3}) == ((), ())  # contradicted by a box
