"""How near generated hashtags come to those that the author wrote, and had withheld from the model.

Exact matches are counted as recommenders of hashtags are measured (F1 of each note's two sets, the mean over notes);
BLEU-4 and ROUGE, which the paper reports (arXiv 2403.01744, section 4.4), also count words that are right within a tag
that is not. The answer of a note is its tags joined by commas; Chinese is compared character by character, all else
word by word, in lower case.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from notellm.hashtags import clean_hashtags
from notellm.messages import LIMITS
from training.evaluation.bootstrap import Interval, bootstrap_means

__all__ = ["answer_tokens", "hashtag_metrics", "is_valid"]

_ROUGE: Final = {"rouge1": "rouge1", "rouge2": "rouge2", "rougel": "rougeL"}
_CHINESE: Final = "\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN: Final = re.compile(rf"[{_CHINESE}]|[^\W{_CHINESE}]+")


def hashtag_metrics(
    generated: Sequence[Sequence[str]], author: Sequence[Sequence[str]], *, seed: int
) -> dict[str, Interval]:
    """``generated[n]`` against ``author[n]``, over the N notes that have tags of their author's.

    ``precision``, ``recall``, ``f1``: of exact tags, letters' case aside. ``bleu4`` (of the whole, 0 to 1, no
    interval: low and high are the value), ``rouge1``, ``rouge2``, ``rougel``: F-measures. ``valid``: the share of
    generated tags that the door would let pass as they are; 1 where there are none. Raises :class:`ValueError` for
    lists of two lengths, or none.
    """
    if len(generated) != len(author) or not author:
        raise ValueError(
            f"{len(generated)} generated answers for {len(author)} notes; allowed is one each, at least one"
        )
    exact = np.array([_exact(*pair) for pair in zip(generated, author, strict=True)])
    scorer = RougeScorer(list(_ROUGE.values()), tokenizer=_Tokenizer())
    texts = [(", ".join(own), ", ".join(made)) for made, own in zip(generated, author, strict=True)]
    rouge = np.array([_rouge(scorer, own, made) for own, made in texts])
    columns = bootstrap_means(np.concatenate([exact, rouge], axis=1), seed=seed)
    found = {
        name: interval
        for name, interval in zip(["precision", "recall", "f1", *_ROUGE], columns, strict=True)
        if interval is not None
    }
    # Tokenised by us already, so that it and ROUGE compare the same.
    bleu = BLEU(tokenize="none").corpus_score(
        [" ".join(answer_tokens(made)) for _, made in texts], [[" ".join(answer_tokens(own)) for own, _ in texts]]
    )
    found["bleu4"] = _without_interval(bleu.score / 100)
    tags = [(tag, made) for made in generated for tag in made]
    found["valid"] = _without_interval(float(np.mean([is_valid(tag, made) for tag, made in tags])) if tags else 1.0)
    return found


def answer_tokens(text: str) -> list[str]:
    """``"Kyoto trip, 京都"`` -> ``["kyoto", "trip", "京", "都"]``."""
    return _TOKEN.findall(text.lower())


def is_valid(tag: str, answer: Sequence[str]) -> bool:
    """Whether a note might carry ``tag`` as it is: clean, short enough, and once in its ``answer``."""
    folded = [each.casefold() for each in answer]
    return (
        clean_hashtags([tag]) == [tag]
        and len(tag) <= LIMITS.hashtag
        and not any(unicodedata.category(character) == "Cc" for character in tag)
        and folded.count(tag.casefold()) == 1
    )


class _Tokenizer:
    """For rouge-score, whose own keeps ASCII only."""

    def tokenize(self, text: str) -> list[str]:
        return answer_tokens(text)


def _exact(generated: Sequence[str], author: Sequence[str]) -> tuple[float, float, float]:
    made, own = ({tag.casefold() for tag in tags} for tags in (generated, author))
    both = len(made & own)
    return both / max(len(made), 1), both / max(len(own), 1), 2 * both / max(len(made) + len(own), 1)


def _rouge(scorer: Any, own: str, made: str) -> list[float]:
    scores = scorer.score(own, made)
    return [float(scores[name].fmeasure) for name in _ROUGE.values()]


def _without_interval(value: float) -> Interval:
    return Interval(value, value, value)
