"""Answers read from text by rules: what each rule makes of a text, nothing to parse, hostile texts, votes and classes."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastprompt import answers as module
from fastprompt.answers import Answers, Choice, LastNumber, Pattern, majority
from fastprompt.taxonomy import Alignment, Place


def test_the_examples_in_the_documentation():
    result = doctest.testmod(module)
    assert result.attempted > 15
    assert result.failed == 0


def test_it_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import fastprompt.answers"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


CHOICES = {
    # announced
    "The answer is (B).": "B",
    "answer: d": "D",
    "Answer:\n\n**C**": "C",
    "The correct answer to this question is therefore option (A), not B.": "A",
    "The answer is A because of C": "A",
    "the ANSWER is $\\boxed{\\text{D}}$": "D",
    "So \\boxed{C}": "C",
    "First the answer is A. No, wait: the answer is B.": "B",
    "The answer is \uff08\uff22\uff09\u3002": "B",
    "The answer is \u201cC\u201d": "C",
    # brackets, option
    "(A)": "A",
    "[b]": "B",
    "I pick option C here": "C",
    "it is **D**": "D",
    # line starts
    "B. Paris": "B",
    "b) Paris": "B",
    "D": "D",
    "  c  ": "C",
    "Some thoughts.\nB": "B",
    # on their own
    "I would say B": "B",
    "A is correct": "A",
    "\u7b54\u6848\u662fB\u3002": "B",  # no spaces around a letter in Chinese
    # nothing
    "": None,
    "   \n ": None,
    "A dog ran": None,
    "The answer is a dog": None,
    "E": None,
    "answer is E": None,
    "Bad, Dad, ABCD": None,
    "D'accord, C++, C#, B-52s": None,
    "f(a) = U.S.A.": None,
    "B\u0301 \u00c0B C\u00e9": None,  # letters with accents
    "the value 1.5": None,
}


@pytest.mark.parametrize("text", CHOICES)
def test_choice_letters(text):
    assert Choice("ABCD")(text) == CHOICES[text]


def test_choice_options():
    rule = Choice(["yes", "no", "not sure", "New York"])
    for text, want in {
        "Yes": "yes", "no!": "no", "I know nothing": None, "not  sure": "not sure", "answer: NO, though yes": "no",
        "new\nyork": "New York", "yes or no": "no", "yesterday": None, "nono": None, "no-one": None, "\u201cyes\u201d": "yes",
    }.items():  # fmt: skip
        assert rule(text) == want, text
    assert Choice(["yes", "no"], which="first")("yes or no") == "yes"
    assert Choice("12")("Answer: 2") == "2"
    assert Choice("12")("1.5, 2.5 and 12") is None
    assert Choice(["i"])("\u0131") == "i"  # equal in re's eyes only
    assert Choice(["a.b", "(", "\\"])("it is a.b") == "a.b"
    assert Choice(["a.b", "x"])("it is aXb") is None


NUMBERS = {
    "#### 1,234.50": 1234.5, "-3": -3, "\u22123": -3, "\u20133": -3, "it lost -$1,000.": -1000, "$-5": -5, "50 %": 50,
    "1,00,000": 100000, "1,2": 2, "1,23": 23, "12,345,678": 12345678, "(-4)": -4, "x=-4": -4, "f(2)-3": 3, "a-7": 7,
    "0.10": 0.1, "007": 7, "3.0": 3, "-0": 0, "1e3": 1000, "1e999": None, "5/0": None, "6/4": 1.5, "1,000/4": 250,
    "-1/2": -0.5, "2024/01/02": None, "\\dfrac{-1}{4}": -0.25, "-\\frac{1}{2}": -0.5, "12:30": 30, "v2": None, "2x": 2,
    "1.2.3.4": None, "9" * 301: None, "7 " + "9" * 301: 7, "\u0663\u0664": 34, "\uff11\uff0e\uff15": 1.5, "x\u00b2": None,
    "\u7b54\u68485": 5, "no": None, "": None, ".": None, "1.": 1, "1,": 1, "...5": 5, "-.5": -0.5, "10-20": 20, "1/2/3 4": 4,
    "1" * 20: int("1" * 20), "NaN inf": None, "--5": 5, "1e5x": 1,
    "\\boxed{1{,}234}": 1234, "12,\\!345": 12345, "-\\$1\u202f234": -1234, "5\u202f%": 5,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_last_numbers(text):
    got = LastNumber()(text)
    assert got == NUMBERS[text]
    assert type(got) is type(NUMBERS[text])


def test_patterns():
    assert Pattern("a(b)?")("a") is None  # a group that took no part
    assert Pattern("(?P<x>.) =")("z = y =") is not None
    assert Pattern("(?P<x>.) =", group="x", which="first")("z = y =") == "z"
    assert Pattern("answer:(.*)")("answer:   ") is None
    assert Pattern("answer:(.*)", strip=" .")("answer: yes. ") == "yes"
    assert Pattern(".+", group=0)("all") == "all"
    for wrong, match in (
        ({"regex": "("}, r"regex: expected a regular expression, got '\('"),
        ({"regex": "a"}, "group: expected a group of 'a', which has 0, got 1"),
        ({"regex": "(a)", "group": "x"}, "group: expected"),
        ({"regex": "(a)", "which": "middle"}, "which: expected one of first, last, got 'middle'"),
    ):
        with pytest.raises(ValueError, match=match):
            Pattern(**wrong)


def test_votes():
    assert majority([]) is None
    assert majority(["a", "b", "b", None, None, None]) == "b"
    assert majority(["b", "a"]) == "b"
    assert majority(["b", "a"], ties="none") is None
    assert majority([3, 3.0, 2, 2, 3]) == 3
    assert majority([0, None, 0]) == 0
    with pytest.raises(ValueError, match="ties"):
        majority([], ties="last")


def test_classes():
    rule = Answers(Pattern(r"is (\w+)"), {"yes": 1, "Yeah": 1, "no": 0}, ties="none")
    assert rule.classes(["is YES", "is", [], ["is no", "is yes"], ["is no", "is yes", "is yeah"]]) == [1, -1, -1, -1, 1]
    assert rule.answers(["is YES", "is", ["is a", "is b", "is b"]]) == ["YES", None, "b"]
    assert rule.taxonomy == Place(alignment=Alignment.STRUCTURAL)
    assert Answers(Choice("ba"), {"a": 0}).classes(["a", "b"]) == [0, -1]
    assert Answers(len, {3: 2}).classes(["abc", "ab"]) == [2, -1]  # any function is a rule
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert again.classes(["is YES"]) == [1]
    assert Answers(Choice("ABCD")).classes([]) == []


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Choice(""), ValueError, "options"),
        (lambda: Choice(["a", " "]), ValueError, "options"),
        (lambda: Choice(["Yes", "yes"]), ValueError, "options: expected different ones"),
        (lambda: Choice("AB", which="all"), ValueError, "which"),
        (lambda: Choice("AB")(None), TypeError, "text: expected str, got NoneType"),
        (lambda: LastNumber()(3), TypeError, "text: expected str, got int"),
        (lambda: Pattern("(a)")(b"a"), TypeError, "text: expected str, got bytes"),
        (lambda: Answers("no rule"), TypeError, "rule: expected a callable, got str"),
        (lambda: Answers(LastNumber()).classes(["1"]), ValueError, "labels: expected a table"),
        (lambda: Answers(LastNumber()).answers("1"), TypeError, "texts: expected a list of texts"),
        (lambda: Answers(LastNumber(), {1: -1}), ValueError, "labels: expected class ids from 0, got -1 for 1"),
        (lambda: Answers(LastNumber(), {1: True}), ValueError, "labels: expected class ids"),
        (lambda: Answers(Choice("AB"), {"A": 0, "a": 1}), ValueError, "labels: expected one id"),
        (lambda: Answers(Choice("AB"), ties="x"), ValueError, "ties"),
    ],
)
def test_errors_are_sentences(make, error, match):
    with pytest.raises(error, match=match):
        make()


PIECES = [
    "answer", "answer ", "answer is ", "answer: " + " " * 200, "answer is the " * 3 + "{(", "\\boxed{", "\\boxed { \\text{", "(",
    "((A", "**", "A", "a ", "A.", "\n", " ", "\t", "> ", "'", "-", "$-", "1", "1,", "1,1", "1.", "1,111", "1/", "1e", "1 ", "-1",
    "\\frac{1", "\\frac{" + "1" * 300 + "}{", "no", "not ", "new ", "\u0663", "\uff22", "\u7b54", "option ", "e\u0301",
]  # fmt: skip


@pytest.mark.parametrize("rule", [Choice("ABCD"), Choice(["no", "not sure", "New York City"]), LastNumber()], ids=repr)
def test_hostile_texts_take_linear_time(rule):
    """First short texts, on which a quadratic rule already takes many times as long as this allows."""
    for size in (20_000, 1_000_000):
        for piece in PIECES if size == 20_000 else PIECES[::7]:
            text = piece * (size // len(piece))
            start = time.perf_counter()
            rule(text)
            assert time.perf_counter() - start < 10, (piece, size)
