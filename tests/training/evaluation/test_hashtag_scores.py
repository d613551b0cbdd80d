"""Generated hashtags against the author's, with numbers that were worked out by hand."""

from __future__ import annotations

import math

import pytest

from training.evaluation.hashtag_scores import answer_tokens, hashtag_metrics, is_valid

Tags = list[list[str]]
ROUGE = ("rouge1", "rouge2", "rougel")


def values(generated: Tags, author: Tags) -> dict[str, float]:
    return {name: interval.value for name, interval in hashtag_metrics(generated, author, seed=1).items()}


def test_exact_tags_by_hand() -> None:
    # The first: 1 of 2 is right, 1 of 4 is found. Case does not count, nor a part of a tag, nor a tag said twice.
    found = values(
        [["Kyoto", "tea", "kyoto"], ["书"], []], [["kyoto", "autumn", "maple", "tea house"], ["旅行书"], ["a"]]
    )
    assert found["precision"] == pytest.approx((1 / 2) / 3)
    assert found["recall"] == pytest.approx((1 / 4) / 3)
    assert found["f1"] == pytest.approx((1 / 3) / 3)


def test_f1_is_the_mean_over_notes_not_that_of_the_means() -> None:
    found = values([["a"], ["x", "y", "z"]], [["a"], ["x"]])
    assert found["f1"] == pytest.approx((1 + 1 / 2) / 2)


def test_rouge_counts_words_within_a_tag() -> None:
    # kyoto tea | kyoto autumn maple tea house: 2 of 2, 2 of 5, no pair; 书 | 旅行书: 1 of 1, 1 of 3; nothing.
    found = values([["Kyoto", "tea"], ["书"], []], [["kyoto", "autumn", "maple", "tea house"], ["旅行书"], ["a"]])
    assert found["rouge1"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert found["rouge2"] == 0
    assert found["rougel"] == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)


def test_rouge_2_and_l_count_the_order() -> None:
    # b c a | a b c: the pair "b c" of two; "b c" in order of three.
    found = values([["b c", "a"]], [["a", "b c"]])
    assert [found[name] for name in ROUGE] == pytest.approx([1, 1 / 2, 2 / 3])


def test_chinese_is_compared_by_character() -> None:
    # 京 都 之 旅 | 京 都 旅 行: three of four alike, one pair of three, three in order.
    found = values([["京都之旅"]], [["京都旅行"]])
    assert [found[name] for name in ROUGE] == pytest.approx([3 / 4, 1 / 3, 3 / 4])
    assert found["f1"] == 0
    assert values([["京都秋色美"]], [["京都秋色好"]])["bleu4"] == pytest.approx(0.2**0.25)


def test_bleu_by_hand() -> None:
    # 4/5 of words, 3/4 of pairs, 2/3, 1/2.
    one = values([["a", "b", "c", "d", "e"]], [["a", "b", "c", "d", "f"]])
    assert one["bleu4"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # Of the whole: counts are added up before anything is divided.
    two = values([["a", "b", "c", "d", "e"], ["v w", "x y z"]], [["a", "b", "c", "d", "f"], ["v w", "x y z"]])
    assert two["bleu4"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    # All is right, but too short.
    short = values([["a", "b", "c", "d"]], [["a", "b", "c", "d", "e"]])
    assert short["bleu4"] == pytest.approx(math.exp(1 - 5 / 4))


def test_the_same_is_perfect_and_nothing_is_nothing() -> None:
    tags = [["Kyoto", "秋天", "maple leaves", "a"], ["b", "c", "d", "e"]]
    assert list(values(tags, tags).values()) == pytest.approx([1] * 8)
    assert values([[], []], tags) == {
        "precision": 0, "recall": 0, "f1": 0, "bleu4": 0, "rouge1": 0, "rouge2": 0, "rougel": 0, "valid": 1,
    }  # fmt: skip


def test_intervals_are_over_notes_and_of_means_only() -> None:
    found = hashtag_metrics([["a"], ["b"]] * 20, [["a"], ["x"]] * 20, seed=1)
    assert found["f1"].low < found["f1"].value == 0.5 < found["f1"].high
    assert found["bleu4"].low == found["bleu4"].high
    assert found["valid"] == (1, 1, 1)


@pytest.mark.parametrize(
    ("tag", "answer", "valid"),
    [
        ("kyoto", ["kyoto", "tea"], True),
        ("京都 之旅", ["京都 之旅"], True),
        ("x" * 64, ["x" * 64], True),
        ("x" * 65, ["x" * 65], False),
        ("#kyoto", ["#kyoto"], False),
        (" kyoto", [" kyoto"], False),
        ("ｋyoto", ["ｋyoto"], False),
        ("", [""], False),
        ("ky\x07oto", ["ky\x07oto"], False),
        ("kyoto", ["kyoto", "Kyoto"], False),
    ],
)
def test_valid_is_what_a_note_may_carry_as_it_is(tag: str, answer: list[str], valid: bool) -> None:
    assert is_valid(tag, answer) is valid


def test_the_share_of_valid_tags_is_over_all_tags() -> None:
    assert values([["ok", "#no"], ["twice", "Twice", "fine"], []], [["a"]] * 3)["valid"] == pytest.approx(2 / 5)


def test_tokens() -> None:
    assert answer_tokens("Kyoto trip, 京都x2, don't_") == ["kyoto", "trip", "京", "都", "x2", "don", "t_"]


@pytest.mark.parametrize(("generated", "author"), [([["a"]], []), ([], []), ([["a"]], [["a"], ["b"]])])
def test_lists_that_do_not_fit_are_refused(generated: Tags, author: Tags) -> None:
    words = f"{len(generated)} generated answers for {len(author)} notes; allowed is one each, at least one"
    with pytest.raises(ValueError, match=words):
        hashtag_metrics(generated, author, seed=1)
