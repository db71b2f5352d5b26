"""Exact match and F1 of extracted answers, as SQuAD v1.1 defines them."""

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Means over all questions, in percent."""

    exact: float
    f1: float


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, single spaces between words.

    >>> normalized("  The U.S.A.'s\\tan-them ")
    'usas anthem'
    """
    # In this order: what stands between the articles of "a-the" is gone before they are sought.
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", plain).split())


def exact(answer: str, gold: str) -> bool:
    """Whether two texts are the same once normalized.

    >>> exact("the Broncos!", "Broncos")
    True
    """
    return normalized(answer) == normalized(gold)


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it occurs.

    Zero where no word is shared, also where neither text has any left, as v1.1 has it.

    >>> f1("in the old town", "old town of Nice")
    0.5714285714285715
    """
    said, true = normalized(answer).split(), normalized(gold).split()
    shared = sum((Counter(said) & Counter(true)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(said), shared / len(true)
    return 2 * precision * recall / (precision + recall)


def score(answers: Mapping[str, str], golds: Mapping[str, Sequence[str]]) -> Score:
    """The best over the gold answers of each question, and the mean over all questions.

    A question that was not answered counts as zero.

    >>> score({"q": "a cat"}, {"q": ["dog", "cat"], "r": ["bird"]})
    Score(exact=50.0, f1=50.0)
    """
    pairs = [(answers[key], texts) for key, texts in golds.items() if key in answers]
    right = sum(any(exact(answer, gold) for gold in texts) for answer, texts in pairs)
    overlap = sum(max((f1(answer, gold) for gold in texts), default=0.0) for answer, texts in pairs)
    count = max(1, len(golds))
    return Score(exact=100 * right / count, f1=100 * overlap / count)
