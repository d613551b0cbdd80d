"""The categories as a trie of token ids: the model chooses among its branches, so no other category can come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from notellm.errors import BundleError

__all__ = ["CategoryTrie"]


class CategoryTrie:
    """A node of the trie; the root stands for all categories.

    A category whose ids begin another's ("art", "art history") ends with ``end_id``, which the decoder chooses like any
    other token.
    """

    def __init__(self) -> None:
        self.children: dict[int, CategoryTrie] = {}
        self.categories: list[str] = []

    @classmethod
    def build(cls, token_ids: Mapping[str, Sequence[int]], end_id: int) -> CategoryTrie:
        """``token_ids`` maps each category to its ids.

        Raises :class:`BundleError` for two categories with the same ids: the model could not tell them apart.
        """
        root = cls()
        for category, ids in token_ids.items():
            node = root
            node.categories.append(category)
            for token in [*ids, end_id]:
                node = node.children.setdefault(token, cls())
                node.categories.append(category)
            if len(node.categories) > 1:
                raise BundleError(f"categories {node.categories} have the same token ids; allowed are distinct ones")
        return root

    @property
    def decided(self) -> str | None:
        """The category, once only one is left below this node."""
        return self.categories[0] if len(self.categories) == 1 else None

    @property
    def allowed(self) -> list[int]:
        """Ids that may come next."""
        return list(self.children)
