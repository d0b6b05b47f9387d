"""Answers read from generated text by rules: the structural alignment of prompt instruction.

    answers = Answers(Choice("ABCD"))
    answers.classes(["The answer is (B).", ["I think C.", "Answer: c", "D"]])      # [1, 2]

A rule is a callable from a text to an answer, or to None where nothing parses; any function will do. `Pattern`, `Choice` and
`LastNumber` are the usual ones, `majority` is the vote of self-consistency (Wang et al. 2023, arXiv 2203.11171), and `Answers`
puts a rule, the vote and the class ids together. Pure Python; the package's own expressions take linear time on any text.

Full-width forms, typographic quotes and dashes count as their ASCII twins, and every decimal digit of Unicode as its value.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastprompt.taxonomy import Alignment, Place

Answer = Hashable
Rule = Callable[[str], Answer]

# A word's letter or digit. Chinese, Japanese and Korean put no space between words, so theirs do not make a word longer.
_LETTER = r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_TWINS: dict[int, int | str] = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms
_TWINS |= {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}  # quotes
_TWINS |= {0x2212: "-", 0x2013: "-", 0x2014: " ", 0x066B: ".", 0x066C: ","}  # minus, dashes, Arabic separators


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"text: expected str, got {type(text).__name__}")
    return text.translate(_TWINS)


def _which(which: str) -> None:
    if which not in ("first", "last"):
        raise ValueError(f"which: expected one of first, last, got {which!r}")


def _find(expression: re.Pattern[str], text: str, which: str) -> re.Match[str] | None:
    matches = expression.finditer(text)
    return next(matches, None) if which == "first" else next(iter(deque(matches, maxlen=1)), None)


@dataclass(frozen=True)
class Pattern:
    r"""What a group of a regular expression matched.

    >>> Pattern(r"####(.*)")("48 + 24 = 72\n#### 72")
    '72'
    >>> Pattern(r"####(.*)", normalise=LastNumber())("#### $1,072.50")
    1072.5
    >>> Pattern(r"answer: *(\w+)", which="first", normalise=str.lower)("answer: Yes. answer: no")
    'yes'
    >>> Pattern(r"####(.*)")("no mark") is None
    True

    Args:
        regex: a regular expression; `(?i)` and the like inside it. How long it takes on hostile text is up to it: Python's
            expressions backtrack, so avoid a repeat within a repeat.
        group: number or name; a group that took no part in the match, or only blanks, is no answer.
        which: the "last" or the "first" match.
        strip: characters taken off both ends; None means blanks.
        normalise: a function of the stripped text, such as `str.lower` or another rule; its None is no answer.

    Raises:
        ValueError: an expression that does not compile, a group that it has not, or an unknown `which`.
    """

    regex: str
    group: int | str = 1
    which: str = "last"
    strip: str | None = None
    normalise: Rule | None = None

    def __post_init__(self) -> None:
        _which(self.which)
        try:
            groups = self._expression.groups
        except re.error as error:
            raise ValueError(f"regex: expected a regular expression, got {self.regex!r}: {error}") from error
        if self.group not in self._expression.groupindex and self.group not in range(groups + 1):
            raise ValueError(f"group: expected a group of {self.regex!r}, which has {groups}, got {self.group!r}")

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        return re.compile(self.regex)

    def __call__(self, text: str) -> Answer:
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        match = _find(self._expression, text, self.which)
        found = (match[self.group] or "").strip(self.strip) if match else ""
        return (found if self.normalise is None else self.normalise(found)) if found else None


# What may stand between "answer" and the option, as in: answer to this question is most likely option **(B)**
_FILLER = (
    r"(?:[\s:=*_\"'`>~\-$\\{(\[<,]|text|mathrm|mathbf|textbf|boxed|to|this|that|my|question|problem|is|are|was|be|"
    r"should|would|must|will|can|only|most|likely|probably|clearly|therefore|thus|hence|so|the|correct|final|best|option|"
    r"choice|letter)"
)


@dataclass(frozen=True)
class Choice:
    r"""One of a closed list of options: choice letters, or words.

    >>> rule = Choice("ABCD")
    >>> [rule(text) for text in ("B", "(b) because", "Answer: C.", r"so \boxed{D}", "Not B. The answer is therefore **A**.")]
    ['B', 'B', 'C', 'D', 'A']
    >>> rule("A good question that nobody can settle") is None
    True
    >>> Choice(["positive", "negative"])("It sounds Negative to me")
    'negative'
    >>> Choice(["good", "not good"])("It was not  good.")
    'not good'

    The first of these that is found anywhere decides; of several finds the last, or the first:

    1. an announced option: "answer", at most a few filler words, the option; or \boxed{option};
    2. letters only: in brackets, or after "option" or "choice": (B) [B] {B} <B> **B** "option B";
    3. letters only: at the start of a line, with a mark after it or alone: "B." "B) Paris" "b: " "B";
    4. the option as a word of its own. A letter counts only as it is written in `options`, and not before a small letter
       that would make it an article ("A good").

    Case does not matter elsewhere, but an announced letter in the other case must end what it stands in ("answer is a." and
    not "answer is a dog"). Of options at the same place the longest wins. A rule does not understand: "not positive" is
    "positive", and an echo of the question's options is an answer.

    Args:
        options: a string of letters, or a list of words; answers are given as they are written here.
        which: the "last" or the "first" find.

    Raises:
        ValueError: no option, an empty one, two that differ in case only, or an unknown `which`.
    """

    options: str | Sequence[str]
    which: str = "last"

    def __post_init__(self) -> None:
        _which(self.which)
        if not self.options or not all(isinstance(option, str) and option.strip() for option in self.options):
            raise ValueError(f"options: expected letters or a list of words, got {self.options!r}")
        if len({" ".join(_text(option).split()).casefold() for option in self.options}) < len(self.options):
            raise ValueError(f"options: expected different ones, whatever their case, got {self.options!r}")

    @cached_property
    def _written(self) -> dict[str, str]:
        """The expression of every option, the longest first, with the option as it is written."""
        longest = sorted(self.options, key=len, reverse=True)
        return {r"\s{1,8}".join(map(re.escape, _text(option).split())): option for option in longest}

    @cached_property
    def _expressions(self) -> list[re.Pattern[str]]:
        one = "|".join(self._written)
        before = rf"(?<!{_LETTER})(?<!\d[.,])"
        after = rf"(?!{_LETTER}|[\u0300-\u036f]|[.,]\d|[+#]|['-]{_LETTER})"
        announced = rf"(?i:{before}answer{_FILLER}{{0,40}}{before}|\\boxed\s?\{{\s?(?:\\[a-z]{{1,9}}\{{)?)"
        if max(map(len, self.options)) > 1:
            parts = [rf"{announced}((?i:{one})){after}", rf"{before}((?i:{one})){after}"]
        else:
            ends = r"(?=\s{0,8}(?:\Z|\n|[\])}>.,;:*\"'`$]))"
            article = r"(?!(?<=[aiAI])\s(?!(?<=[aA]\s)(?:is|was|because|since|as|seems|would)\b)[a-z])"
            parts = [
                rf"{announced}((?:{one}){article}{after}|(?i:{one}){after}{ends})",
                rf"(?<!{_LETTER})(?:[(\[{{<]|\*\*)\s?((?i:{one}))\s?(?:[)\]}}>]|\*\*)"
                rf"|(?i:{before}(?:option|choice)[\s:=*(\[\"']{{1,4}})({one}){after}",
                rf"^[ \t>*_\"'`]{{0,8}}((?i:{one}))(?:[.):](?!\w\.|\d)|[ \t*_\"'`]{{0,8}}$)",
                rf"{before}(?<!\w\.)({one}){article}{after}",
            ]
        return [re.compile(part, re.MULTILINE) for part in parts]

    def __call__(self, text: str) -> str | None:
        text = _text(text)
        for expression in self._expressions:
            match = _find(expression, text, self.which)
            if match:
                found = next(filter(None, match.groups()))
                return next(option for one, option in self._written.items() if re.fullmatch(one, found, re.IGNORECASE))
        return None


_WORD = re.compile(_LETTER)
_NUMBERS = re.compile(r"\\[dt]?frac\s?\{\s?(-?\d{1,300})\s?\}\s?\{\s?(\d{1,300})\s?\}|\d[\d.,/]*(?:[eE][+-]?\d{1,3}(?!\w))?")
_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_LONGEST = 300  # characters: float ends at 309 digits, and Python reads an integer in quadratic time


@dataclass(frozen=True)
class LastNumber:
    r"""The last number of a text, as a whole number where it is one, otherwise as a float.

    >>> rule = LastNumber()
    >>> [rule(text) for text in ("so 1,234.5 dollars.", "-$3", "$-3.00", "about 50%", "3/4 of it", r"\frac{1}{4}", "2.5e-3")]
    [1234.5, -3, -3, 50, 0.75, 0.25, 0.0025]
    >>> [rule(text) for text in ("10-20", "5 - 3", "2, 3 or 1,2", ".5", "3rd of 5km", "1e3")]
    [20, 3, 2, 0.5, 5, 1000]
    >>> [rule(text) for text in ("none", "GPT4, x2", "1.2.3", "", "1/2/2024")]
    [None, None, None, None, None]

    - A comma, LaTeX's {,} or a narrow space separates thousands (1,234 and 1,00,000); any other comma ends a number, so "3,5"
      is 5. A point is a decimal point. Points at the end belong to the sentence.
    - "-" is a sign right before the number or its currency ($ € £ ¥) and not behind a letter, digit or bracket.
    - A currency, % and units are dropped: "50%" is 50, "5 km" is 5, "10k" is 10.
    - a/b of whole numbers, and \frac{a}{b}, is its value, so that "3/4" and "0.75" are one vote; not where b is 0, and not in
      a date such as 1/2/2024, which is no number. Of the mixed number "1 3/4" the fraction is read.
    - No number: digits behind a letter (GPT4), several points (1.2.3, an address, a version), superscripts, and more than 300
      digits. Words ("seven") are not read.
    """

    def __call__(self, text: str) -> int | float | None:
        text = _text(text)
        for written, meant in (("{,}", ","), ("\\!", ""), ("\u202f", ","), ("\\$", "$")):
            text = text.replace(written, meant)
        last = None
        for match in _NUMBERS.finditer(text):
            value = _number(text, match)
            last = last if value is None else value
        return last


def _number(text: str, match: re.Match[str]) -> int | float | None:
    """The value of a match of `_NUMBERS`, None where it is no number."""
    start, token = match.start(), match[0].rstrip(".,/")
    if match[1]:
        parts = [match[1], match[2]]
    elif start and _WORD.match(text, start - 1):
        return None
    else:
        if text[start - 1 : start] == "." and not (start > 1 and (text[start - 2] == "." or _WORD.match(text, start - 2))):
            start, token = start - 1, "0." + token
        parts = _parts(token)
        if not parts:  # a comma that separates no thousands
            start, parts = match.end(), _parts(token.rpartition(",")[2])
    if not parts:
        return None
    values = [float(part.replace(",", "")) for part in parts]
    if len(parts) == 1 and re.fullmatch(r"[\d,]+", parts[0]):
        value: int | float = int(parts[0].replace(",", ""))
    elif len(parts) == 2 and not values[1]:
        return None
    else:
        value = values[0] / values[-1] if len(parts) == 2 else values[0]
        if not math.isfinite(value):
            return None
        value = int(value) if value.is_integer() else value
    return -value if _signed(text, start) else value


def _parts(token: str) -> list[str]:
    """[number], or [a, b] of a/b; empty where the token is neither."""
    parts = token.split("/", 2)
    fit = len(parts) < 3 and all(len(part) <= _LONGEST and _NUMBER.fullmatch(part) for part in parts)
    return parts if fit else []


def _signed(text: str, start: int) -> bool:
    """Whether a minus stands right before a number that starts there, or before its currency."""
    start -= text[start - 1 : start] in ("$", "€", "£", "¥")
    if text[start - 1 : start] != "-" or start < 1:
        return False
    return start < 2 or not (text[start - 2] in ")]}%-" or _WORD.match(text, start - 2))


def majority(answers: Iterable[Answer], ties: str = "first") -> Answer:
    """The answer given most often: the vote of self-consistency. None, an answer that did not parse, has no vote.

    >>> majority(["B", None, "A", "B", None, None])
    'B'
    >>> majority([2, 1, 1, 2]), majority([2, 1, 1, 2], ties="none")
    (2, None)
    >>> majority([None, None]) is None
    True

    Args:
        answers: of the samples, as rules give them. 3 and 3.0 are one answer.
        ties: "first" takes, of the answers with most votes, the one that was given first; "none" gives None.
    """
    if ties not in ("first", "none"):
        raise ValueError(f"ties: expected one of first, none, got {ties!r}")
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return None
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return winners[0] if ties == "first" or len(winners) == 1 else None


@dataclass(frozen=True)
class Answers:
    """A rule, the vote over several samples, and the class ids: texts to answers, or to classes.

    >>> answers = Answers(Pattern(r"answer is (\\w+)"), labels={"yes": 1, "true": 1, "no": 0})
    >>> answers.classes(["The answer is Yes.", "The answer is maybe.", "?", ["answer is no", "answer is yes", "answer is true"]])
    [1, -1, -1, 1]
    >>> answers.answers(["The answer is Yes.", ["?", "?"]])
    ['Yes', None]
    >>> Answers(Choice("ABCD")).classes(["(C)", "I do not know"])
    [2, -1]
    >>> Answers(LastNumber(), labels={72: 0, 0.5: 1}).classes(["#### 72.0", "one half, 1/2"])
    [0, 1]

    Classes are counted, not answers: "yes" and "true" above vote together. Answers that are text find their label whatever
    their case.

    Args:
        rule: from a text to an answer or None: `Pattern`, `Choice`, `LastNumber` or a function.
        labels: answer to class id, an int from 0. Default: the rule's `options` in their order, when it has them.
        ties: of the vote, see `majority`.

    Raises:
        TypeError, ValueError: a rule that cannot be called, an id that is no class, or labels that differ in case only and have
            different ids.
    """

    rule: Rule
    labels: Mapping[Any, int] | None = None
    ties: str = "first"

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"rule: expected a callable, got {type(self.rule).__name__}")
        majority([], self.ties)
        if self.labels is not None:
            for answer, label in self.labels.items():
                if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                    raise ValueError(f"labels: expected class ids from 0, got {label!r} for {answer!r}")
                if self._ids[_folded(answer)] != label:
                    raise ValueError(
                        f"labels: expected one id for {answer!r} in any case, got {self._ids[_folded(answer)]}, {label}"
                    )

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.STRUCTURAL)

    @cached_property
    def _ids(self) -> dict[Any, int]:
        options = getattr(self.rule, "options", None)
        labels = self.labels if self.labels is not None else {option: i for i, option in enumerate(options or ())}
        return {_folded(answer): label for answer, label in labels.items()}

    def answers(self, texts: Sequence[str | Sequence[str]]) -> list[Answer]:
        """One answer for each text, or for each list of samples (their vote); None where nothing parses."""
        return [majority(map(self.rule, samples), self.ties) for samples in _samples(texts)]

    def classes(self, texts: Sequence[str | Sequence[str]]) -> list[int]:
        """One class id for each text or list of samples; -1 where nothing parses to a label.

        Raises:
            ValueError: there are no labels, and the rule has no options.
        """
        if not self._ids:
            raise ValueError("labels: expected a table from answers to class ids, got none, and the rule has no options")
        return [self._vote(samples) for samples in _samples(texts)]

    def _vote(self, samples: Sequence[str]) -> int:
        answers = (self.rule(sample) for sample in samples)
        label = majority((None if answer is None else self._ids.get(_folded(answer)) for answer in answers), self.ties)
        return -1 if label is None else label  # type: ignore[return-value]


def _folded(answer: Answer) -> Answer:
    return answer.strip().casefold() if isinstance(answer, str) else answer


def _samples(texts: Sequence[str | Sequence[str]]) -> Iterable[Sequence[str]]:
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of texts, or of lists of samples, got one str")
    return ([each] if isinstance(each, str) else each for each in texts)
