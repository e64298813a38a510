"""BLEU, NIST, METEOR, ROUGE-L, CIDEr and TER as the challenges' own scripts count them.

By libraries where they agree with those scripts; README.md names what was compared, and what
differs.
"""

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import sacrebleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from examples.nlg.data import SEEN_CATEGORIES, Group

__all__ = [
    "Missing",
    "bleu",
    "cider",
    "e2e",
    "meteor",
    "nist",
    "rouge_l",
    "score",
    "ter",
    "triples",
]

MAX_REFERENCES = 6  # per context for DART and WebNLG, the first ones, as in the original
NIST_ORDER = 5
NIST_BETA = math.log(0.5) / math.log(1.5) ** 2  # half the score at two thirds of the length


@dataclass(frozen=True)
class Missing:
    """A metric that could not be computed, and why."""

    reason: str


Score = float | Missing
Texts = Sequence[str]
References = Sequence[Sequence[str]]


def score(task: str, groups: Sequence[Group], predictions: Texts) -> dict[str, dict[str, Score]]:
    """Metrics of "all" contexts and, for WebNLG, of those of "seen" and "unseen" categories.

    For WebNLG every group has a category, as read_predictions sees to.
    E2E: BLEU, METEOR and ROUGE-L in per cent, NIST, CIDEr. DART and WebNLG: BLEU in per cent,
    METEOR and TER as fractions. So do the tables of the paper.
    """
    parts = {"all": [True] * len(groups)}
    if task == "webnlg":
        seen = [item.category in SEEN_CATEGORIES for item in groups]
        parts = {"unseen": [not flag for flag in seen], "seen": seen, **parts}
    measure = e2e if task == "e2e" else triples
    return {
        name: measure(
            [text for text, flag in zip(predictions, mask, strict=True) if flag],
            [item.references for item, flag in zip(groups, mask, strict=True) if flag],
        )
        for name, mask in parts.items()
        if any(mask)
    }


def e2e(predictions: Texts, references: References) -> dict[str, Score]:
    """The five metrics of the E2E challenge; case does not count."""
    predictions, references = _each(_one_line, predictions, references)
    scores = {
        "BLEU": bleu(predictions, references, lowercase=True),
        "NIST": nist(predictions, references),
    }
    tokens = _computed(penn_treebank, predictions, references)

    def on_tokens(metric: Callable, unit: float) -> Score:
        value = tokens if isinstance(tokens, Missing) else _computed(metric, *tokens)
        return value if isinstance(value, Missing) else unit * value

    return scores | {
        "METEOR": on_tokens(meteor, 100),
        "ROUGE-L": on_tokens(rouge_l, 100),
        "CIDEr": on_tokens(cider, 1),
    }


def triples(predictions: Texts, references: References) -> dict[str, Score]:
    """The three metrics that the paper gives for DART and WebNLG, on lower-cased words."""
    references = [texts[:MAX_REFERENCES] for texts in references]
    predictions, references = _each(_plain, predictions, references)
    words = _each(_treebank, predictions, references)
    return {
        "BLEU": bleu(predictions, references),
        "METEOR": _computed(meteor, *words),
        "TER": ter(*words, MAX_REFERENCES),
    }


# ---- the metrics ----


def bleu(predictions: Texts, references: References, lowercase: bool = False) -> float:
    """BLEU-4 of the corpus in per cent on mteval-v13a's tokens: sacrebleu without smoothing."""
    most = max(map(len, references))
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    metric = sacrebleu.BLEU(lowercase=lowercase, tokenize="13a", smooth_method="none", force=True)
    return metric.corpus_score(list(predictions), streams).score


def nist(predictions: Texts, references: References) -> float:
    """NIST-5 of the corpus on mteval-v13a's tokens, lower-cased.

    Σ_n (Σ info of matched n-grams / number of n-grams) · exp(β·ln²(min(1, L / L_ref))), with
    info = log2(count of the first n-1 words / count of the n-gram) over all references, matches
    clipped by the most that one reference has, L_ref the sum of mean reference lengths.
    Source: Doddington 2002; mteval-v13a. nltk's corpus_nist matches one reference at a time.
    """
    tokenizer = Tokenizer13a()
    words, word_references = _each(
        lambda text: tokenizer(text).lower().split(), predictions, references
    )
    counts, length = Counter(), 0.0
    for texts in word_references:
        for text in texts:
            counts[()] += len(text)
            counts.update(_ngrams(text))
        length += sum(map(len, texts)) / len(texts)
    gain, total = Counter(), Counter()
    for text, texts in zip(words, word_references, strict=True):
        most = Counter()
        for reference in texts:
            most |= Counter(_ngrams(reference))
        for ngram, count in Counter(_ngrams(text)).items():
            total[len(ngram)] += count
            if matched := min(count, most[ngram]):
                gain[len(ngram)] += matched * math.log2(counts[ngram[:-1]] / counts[ngram])
    ratio = sum(map(len, words)) / length
    if ratio == 0:
        return 0.0
    penalty = math.exp(NIST_BETA * math.log(min(1.0, ratio)) ** 2)
    return penalty * sum(gain[n] / total[n] for n in total)


def meteor(predictions: Texts, references: References) -> float:
    """METEOR 1.5 of the corpus on tokens with blanks between them: its jar, in pycocoevalcap.

    Raises: OSError where the jar ends before it has answered; the next call starts another.
    """
    scorer = _meteor()
    try:
        return float(scorer.compute_score(*_by_number(predictions, references))[0])
    except (OSError, ValueError):  # a broken pipe, or an empty line for a number
        _meteor.cache_clear()
        scorer.meteor_p.kill()
        said = scorer.meteor_p.communicate()[1].decode(errors="replace").strip()
        scorer.lock.release()  # pycocoevalcap does not, and its destructor waits for it
        reason = said.splitlines()[-1] if said else f"exit code {scorer.meteor_p.returncode}"
        raise OSError(f"METEOR's Java program ended: {reason}") from None


def rouge_l(predictions: Texts, references: References) -> float:
    """Mean ROUGE-L (β = 1.2, best precision and best recall) on tokens: pycocoevalcap."""
    from pycocoevalcap.rouge.rouge import Rouge

    return float(Rouge().compute_score(*_by_number(predictions, references))[0])


def cider(predictions: Texts, references: References) -> float:
    """CIDEr-D on tokens, document frequencies from the references given: pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider

    return float(Cider().compute_score(*_by_number(predictions, references))[0])


def ter(predictions: Texts, references: References, slots: int = 0) -> float:
    """Mean over texts of the least translation edit rate to one of its references: pyter.

    Every reference has a word, as read_predictions sees to. slots: how many references a text has
    in GenerationEval's files; the blank lines in the place of those that are missing count 1 each.
    """
    import pyter

    rates = [
        min(
            *(pyter.ter(text.split(), reference.split()) for reference in texts),
            1.0 if len(texts) < slots else math.inf,
        )
        for text, texts in zip(predictions, references, strict=True)
    ]
    return sum(rates) / len(rates)


# ---- tokens ----


def penn_treebank(predictions: Texts, references: References) -> tuple[list[str], list[list[str]]]:
    """Stanford's tokens, lower-cased, punctuation left out, by one run of its jar."""
    _need_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    flat = [*predictions, *(text for texts in references for text in texts)]
    tokens = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(flat)})
    if len(tokens) != len(flat):
        raise ValueError(f"the tokenizer gave {len(tokens)} lines for {len(flat)}")
    lines = iter(tokens[i][0] for i in range(len(flat)))
    return [next(lines) for _ in predictions], [
        [next(lines) for _ in texts] for texts in references
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str) -> str:
    """The original's tokens: lower case, blanks around all that is no letter, digit or _."""
    return _one_line(" ".join(re.split(r"(\W)", text.lower())))


def _treebank(text: str) -> str:
    from nltk import word_tokenize

    return " ".join(word_tokenize(text, preserve_line=True))


def _each(convert: Callable, predictions: Texts, references: References) -> tuple[list, list]:
    return [convert(text) for text in predictions], [
        [convert(text) for text in texts] for texts in references
    ]


def _ngrams(words: Sequence[str]) -> list[tuple[str, ...]]:
    return [
        tuple(words[i : i + n]) for n in range(1, NIST_ORDER + 1) for i in range(len(words) - n + 1)
    ]


# ---- pycocoevalcap ----


def _by_number(predictions: Texts, references: References) -> tuple[dict, dict]:
    return (
        {i: list(texts) for i, texts in enumerate(references)},
        {i: [text] for i, text in enumerate(predictions)},
    )


@cache
def _meteor():
    """The running jar: it takes ten seconds to read its paraphrases."""
    _need_java()
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def _need_java() -> None:
    if shutil.which("java") is None:
        raise FileNotFoundError("java is not installed")


def _computed(function: Callable, *arguments):
    """What function gives, or Missing where Java or a library is not there or fails."""
    try:
        return function(*arguments)
    except (ImportError, OSError, ValueError) as error:
        return Missing(f"{type(error).__name__}: {error}")
