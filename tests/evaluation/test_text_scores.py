"""Scores of texts, by hand."""

import pytest

from kd.data import corpora
from kd.evaluation import text_scores
from kd.evaluation.text_scores import Response, distinct, exact_match, rouge_l, summary


def test_rouge_l_by_hand():
    # 3 of 3 words and of 6 are in common, in order, if "cats" and "cat" are one word: F1 of 1 and 1/2.
    assert rouge_l("Cat, sat; mat!", "the cats sat on the mat") == pytest.approx(2 / 3)
    assert rouge_l("mat sat cat", "the cats sat on the mat") == pytest.approx(2 / 9)  # one after the other
    assert rouge_l("a b", "a b") == 1 and rouge_l("", "a b") == rouge_l("...", "a b") == 0


SCRIPTS = {
    "chinese": ("北京是首都", "南京是首都", 4 / 5),
    "japanese": ("東京タワーです", "東京タワーだ", 2 * 5 / (7 + 6)),
    "thai": ("สวัสดีครับ", "สวัสดีค่ะ", 2 * 4 / (7 + 6)),
    "khmer": ("សួស្តី", "សួស្តី", 1),
    "korean": ("안녕하세요 반가워요", "안녕하세요 오늘", 1 / 2),
    "russian": ("Привет, мир!", "привет мир и я", 2 * 2 / (2 + 4)),
    "greek": ("Καλημέρα κόσμε", "καλημέρα", 2 / 3),
    "hindi": ("नमस्ते दुनिया", "नमस्ते", 2 / 3),
    "arabic": ("السلام عليكم ١٢", "السلام ١٢", 4 / 5),
    "hebrew": ("שלום עולם", "עולם", 2 / 3),
    "georgian": ("გამარჯობა მსოფლიო", "მსოფლიო", 2 / 3),
    "full width": ("ＡＢＣ １２", "ＡＢＣ", 2 / 3),
    "signs": ("+ =", "+", 2 / 3),
    "emoji": ("👍", "👍\n", 1),
    "accents": ("\u00c9 \u00e0 \u00ff", "\u00e9 \u00e0", 4 / 5),
    "fractions": ("½", " ½", 1),
    "marks": ("? !", "?!", 1),
    "mixed": ("用Python写cats", "用 python 写 cat", 1),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_rouge_l_counts_every_script(name):
    response, reference, expected = SCRIPTS[name]
    assert rouge_l(response, reference) == pytest.approx(expected)
    assert rouge_l(response, response) == rouge_l(reference, reference) == 1
    assert rouge_l(response, "") == rouge_l("", reference) == rouge_l(response, "other words") == 0


def test_rouge_l_of_latin_text_is_that_of_rouge_score():
    """Compare with the package that papers use: it drops letters with accents, and signs, and so does kd."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [
        "Café don’t — “naïve” 5 µm 10² ½ №5 😀 Straße İstanbul ﬁne a\x1cb",
        "Cats running, the CAFÉ’s 10 µ",
    ]
    texts += [text for text in corpora.standard_library()[:40] if len(text) < 3000]
    for one in texts:
        assert text_scores._words(one) == one.split()
        for other in texts[:5]:
            assert rouge_l(one, other) == scorer.score(other, one)["rougeL"].fmeasure


def test_exact_match_is_but_for_white_space():
    assert exact_match(" return  x\n", "return x")
    assert not exact_match("return X", "return x") and not exact_match("returnx", "return x")


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [(["a b a b"], 2, 2 / 3), (["a b", "a b"], 2, 1 / 2), (["a b", "b a"], 2, 1), (["a b", "b a"], 1, 1 / 2),
     (["a b"], 3, 0), ([], 1, 0), (["a\nb c", "a b  d"], 2, 3 / 4),
     (["北京北京"], 1, 1 / 2), (["北京 ok北京"], 2, 3 / 4), (["北京北京"], 2, 2 / 3), (["да да"], 1, 1 / 2)],
)  # fmt: skip
def test_distinct_by_hand(texts, n, expected):
    """No n-gram reaches from one response into another."""
    assert distinct(texts, n) == pytest.approx(expected)


def test_summary_by_hand():
    """Distinct n-grams are counted within a sample of all prompts: the second says the same again."""
    scored = [Response("a a b", 3, True, 0.5, False), Response("a b", 6, False, 1.0, True)]
    got = summary(scored + scored, 2)
    assert got == pytest.approx({
        "rouge_l": 0.75, "exact_match": 0.5, "response_length": 4.5, "eos_rate": 0.5,
        "distinct_1": 2 / 5, "distinct_2": 2 / 3, "distinct_3": 1.0, "distinct_4": 0.0,
    })  # fmt: skip
