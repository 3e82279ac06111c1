"""ROUGE, exact match and the option that an answer names, against numbers found by hand."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from fedalt.evaluation.metrics import ROUGE, RougeWords, named_option, text_scores

# answer, reference; ROUGE-1, -2, -L and exact match in percent
TEXTS = {
    "equal": ("a cat", "a cat", 100, 100, 100, 100),
    "outer white space": (" a cat\n", "a cat", 100, 100, 100, 100),
    "stems": ("the dogs run", "the dog runs", 100, 100, 100, 0),
    "case and punctuation": ("A cat!", "a cat", 100, 100, 100, 0),
    # three words in common of four and four; no pair of neighbours; "a b" and "a c" keep the order
    "order": ("a b c d", "a c b e", 75, 0, 50, 0),
    # words: precision 2/3, recall 2/2; pairs: precision 1/2, recall 1/1
    "longer": ("a b c", "a b", 80, 100 * 2 / 3, 80, 0),
    # a word counts as often as it is in both: precision 1/3, recall 1/1
    "repeated": ("a a a", "a", 50, 0, 50, 0),
    "one word": ("a", "a", 100, 0, 100, 100),
    "nothing shared": ("z", "a", 0, 0, 0, 0),
    "empty answer": ("", "a cat", 0, 0, 0, 0),
    "no letters": ("？", "答案", 0, 0, 0, 0),
    "Chinese": ("今天天气很好", "今天天气很好", 100, 100, 100, 100),
    # five letters of six and six; four pairs of five; all five in order
    "each Chinese letter counts": ("今天天气很好", "今天天气不好", 500 / 6, 60, 500 / 6, 0),
    "Thai": ("สวัสดี ครับ", "สวัสดี ครับ", 100, 100, 100, 100),
    # วั, ส and ดี of ส, วั, ส, ดี: marks go with their letter
    "Thai letters": ("วัสดี", "สวัสดี", 600 / 7, 80, 600 / 7, 0),
    "Lao, Khmer, Myanmar": ("ສະ ខ្មែរ မြန်မာ", "ສະ ខ្មែរ မြန်မာ", 100, 100, 100, 100),
    "Japanese, half wide": ("ｽｰﾊﾟｰ １２", "スーパー 12", 100, 100, 100, 0),
    "Russian": ("Привет, мир", "привет мир", 100, 100, 100, 0),
    "Russian words": ("привет дом", "привет мир", 50, 0, 50, 0),
    "Korean words": ("한국어 단어", "한국어 문장", 50, 0, 50, 0),
    "vowel signs": ("की", "के", 0, 0, 0, 0),
    "accents are part of a word": ("café", "caf", 0, 0, 0, 0),
    "an accent of its own": ("e\u0301te\u0301", "été", 100, 0, 100, 100),
    "two scripts": ("the iPhone手机 runs", "the iphone 手机 run", 100, 100, 100, 0),
    "inner white space": ("a  cat", "a cat", 100, 100, 100, 0),
    "short words are not stemmed": ("its", "it", 0, 0, 0, 0),
    "backwards": ("d c b a", "a b c d", 100, 0, 25, 0),
    # four words of five and six, one pair (q r) of four and five, and p q r in order
    "all at once": ("p q r s t", "p s q r u v", 800 / 11, 200 / 9, 600 / 11, 0),
}


@pytest.mark.parametrize("name", TEXTS)
def test_scores_of_one_answer(name):
    answer, reference, *wanted = TEXTS[name]
    scores = text_scores([answer], [reference])
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "exact_match"]
    assert list(scores.values()) == pytest.approx(wanted)


ASCII = [
    "Don't stop-words, e.g. it's_here; 3.14 + 42nd 1,000 U.S.A. (well-known)!",
    "",
    "generalization GENERALIZATIONS happily dying skies news inning's ions a1b2c3 007s",
    "\t tabs\nand\r\nlines\x0b\x0c\x1c\x00 \x7f",
]


def test_text_in_ascii_scores_as_with_rouges_own_words():
    """And so does typography around it; to the last bit."""
    rng = random.Random(0)
    letters = "".join(map(chr, range(128))) + 20 * "aeiounstrl" + 8 * " ing ed s ly"
    texts = ASCII + ["".join(rng.choices(letters, k=rng.randrange(80))) for _ in range(2000)]
    texts += ["“Dogs’ – runs… 20°C × 3\N{NO-BREAK SPACE}€”", "Foo™ runs"]
    own = RougeScorer(ROUGE, use_stemmer=True)
    words = DefaultTokenizer(use_stemmer=True)
    for text, other in zip(texts, texts[1:] + texts[:1], strict=True):
        assert RougeWords().tokenize(text) == words.tokenize(text)
        wanted = [100 * score.fmeasure for score in own.score(other, text).values()]
        assert list(text_scores([text], [other]).values())[:3] == wanted
    assert len({word for text in texts for word in words.tokenize(text)}) > 1000


def test_answers_and_references_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        text_scores(["a"], ["a", "b"])


def test_scores_are_means():
    scores = text_scores(["a b c d", "a cat"], ["a c b e", "a cat"])
    assert list(scores.values()) == pytest.approx([87.5, 50, 75, 50])


@pytest.mark.parametrize(
    ("answer", "options", "wanted"),
    [
        ("No.", ["no", "yes"], "no"),
        (
            "  different\n meanings ",
            ["the same meaning", "different meanings"],
            "different meanings",
        ),
        ("not at all", ["no", "yes"], None),
        ("nobody knows", ["no", "yes"], None),
        (
            "it is not possible to tell",
            ["no", "it is not possible to tell"],
            "it is not possible to tell",
        ),
        ("I say yes, not no", ["no", "yes"], "yes"),  # the first in the answer
        ("New York City", ["New York", "New York City"], "New York City"),
        ("new york, of course", ["New York City", "New York"], "New York"),
        ("York, or New York", ["New York", "York"], "York"),
        ("10", ["1", "10"], "10"),
        ("1 or 10", ["10", "1"], "1"),
        ("", ["no", "yes"], None),
        (" \n", ["no", "yes"], None),
        ("neither", ["no", "yes"], None),
        ("", ["?", "!"], None),
        ("?!", ["?", "!"], None),
        ("!\n", ["?", "!"], "!"),
        ("b", ["B", "b"], "b"),
        ("The answer is -5.", ["5", "-5"], "-5"),
        ("The answer is 5.", ["-5", "5"], "5"),
        ("I like c++.", ["C", "C++"], "C++"),
        ("I like C.", ["C++", "C"], "C"),
        ("It's George's.", ["Thomas", "George"], "George"),
        ("EN ÉTÉ", ["ete", "été"], "été"),
        ("en e\u0301te\u0301", ["ete", "été"], "été"),
        ("ＹＥＳ", ["no", "yes"], "yes"),
        ("in der STRASSE", ["Weg", "Straße"], "Straße"),
        ("वह के है", ["की", "के"], "के"),  # they differ in a vowel sign alone
        ("it is की", ["के"], None),
        ("答案是甲。", ["乙", "甲"], "甲"),
        ("熊猫", ["猫", "熊猫"], "熊猫"),
        ("คำตอบคือใช่", ["ไม่", "ใช่"], "ใช่"),
        ("правильный", ["правил", "да"], None),
        ("номер ２", ["1", "2"], "2"),
        ("in New York City", ["New York", "New York City"], "New York City"),
        ("_yes_", ["no", "yes"], "yes"),
        ("well known", ["well-known"], "well-known"),
        ("about 10 %", ["10", "10%"], "10%"),
        ("+", ["-", "+"], "+"),
        ("*", ["-", "+"], None),
        ("one + two", ["-", "+"], None),  # marks alone may be anything in a text
        ("an answer", ["", "answer"], "answer"),
        ("none of them", ["", "answer"], None),
        ("the same", ["same", "same"], "same"),
        ("yes", [], None),
    ],
)
def test_named_option(answer, options, wanted):
    assert named_option(answer, options) == wanted
