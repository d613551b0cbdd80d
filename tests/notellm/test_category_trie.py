"""The categories as a trie: all can come out, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from notellm.category_trie import CategoryTrie
from notellm.errors import BundleError

END = 99

# Few different tokens, so that categories begin alike and begin one another.
_ids = st.lists(st.integers(0, 2), max_size=4).map(tuple)
_categories = st.sets(_ids, min_size=1).map(lambda found: {f"category {ids}": list(ids) for ids in sorted(found)})


def outcomes(node: CategoryTrie) -> Iterator[str]:
    """Every category that a decoder can end with, whatever it chooses among what is allowed."""
    if node.decided is not None:
        yield node.decided
        return
    assert node.allowed, "a decoder that is not done can go on"
    for token in node.allowed:
        yield from outcomes(node.children[token])


@given(_categories)
def test_every_category_can_come_out_once_and_no_other(token_ids: dict[str, list[int]]) -> None:
    assert sorted(outcomes(CategoryTrie.build(token_ids, END))) == sorted(token_ids)


@given(_categories)
def test_ids_of_a_category_lead_to_it(token_ids: dict[str, list[int]]) -> None:
    root = CategoryTrie.build(token_ids, END)
    for category, ids in token_ids.items():
        node, rest = root, [*ids, END]
        while node.decided is None:
            node = node.children[rest.pop(0)]
        assert node.decided == category


def test_category_that_begins_another_ends_with_the_end_token() -> None:
    root = CategoryTrie.build({"art": [1], "art history": [1, 2], "tea": [3]}, END)
    assert root.decided is None
    assert sorted(root.allowed) == [1, 3]
    assert root.children[3].decided == "tea"
    art = root.children[1]
    assert art.decided is None
    assert {token: art.children[token].decided for token in art.allowed} == {END: "art", 2: "art history"}


def test_only_category_is_decided_at_once() -> None:
    assert CategoryTrie.build({"tea": [3]}, END).decided == "tea"


def test_no_category_decides_and_allows_nothing() -> None:
    root = CategoryTrie.build({}, END)
    assert (root.decided, root.allowed) == (None, [])


def test_categories_with_the_same_ids_are_refused() -> None:
    with pytest.raises(BundleError, match=r"\['Tea', 'tea'\] have the same token ids; allowed are distinct ones"):
        CategoryTrie.build({"Tea": [3], "tea": [3]}, END)
