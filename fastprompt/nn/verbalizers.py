"""Verbalizers: class scores from a frozen language model's hidden states, through the words that name the classes.

verbalizer = Verbalizer.from_text({"positive": ["great", "good"], "negative": ["bad"]}, tokenizer).attach(model)
hidden = model.model(ids).last_hidden_state                        # [B, T, d]; the vocabulary head does not run
scores = verbalizer(hidden, rows)                                  # [B, C]; only the label words' columns of the head

Of a head of V rows only those of the label words are computed, at one position a sample: the same numbers as the whole head
followed by an index, and the normalisation over the label words needs no more. A probability over the whole vocabulary is
less by one constant a row, which cancels in the loss and in the class probabilities; `functional.label_head(full=True)` has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastprompt import functional
from fastprompt.functional.checks import bad, looks_at_values, one_of, same_device
from fastprompt.functional.mapping import Labels
from fastprompt.functional.mapping_heads import select_rows
from fastprompt.nn._shared import Drawn
from fastprompt.taxonomy import Alignment, Place

Word = int | Sequence[int]


# ---- Heads of language models ----


class LabelHead(NamedTuple):
    """What takes a model's last hidden states to its vocabulary: logits = transform(hidden) @ weight.T + bias."""

    transform: Callable[[Tensor], Tensor]
    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]


def label_head_of(model: nn.Module) -> LabelHead:
    """The head of a transformers model, for `attach`, `label_head` and `SoftVerbalizer.from_words`.

    Known: BertForMaskedLM and RobertaForMaskedLM, whose dense - GELU - LayerNorm is the transform, and GPT2LMHeadModel,
    LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM, which have none. Others may scale or cap their logits behind
    the head, so they are not guessed.

    Raises:
        TypeError: another model, or a head that is not a plain nn.Linear (quantised, adapted, parametrised).
    """
    transform, linear = _parts_of(model)
    return LabelHead(transform, linear.weight, linear.bias)


def _parts_of(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], nn.Linear]:
    any_model: Any = model
    transform: Callable[[Tensor], Tensor] = nn.Identity()
    # A subclass with a forward of its own may do more behind the head.
    names = {base.__name__ for base in type(model).__mro__ if base.__dict__.get("forward") is type(model).forward}
    if "BertForMaskedLM" in names:
        transform, linear = any_model.cls.predictions.transform, any_model.cls.predictions.decoder
    elif "RobertaForMaskedLM" in names:
        head = any_model.lm_head
        transform, linear = nn.Sequential(head.dense, nn.GELU(), head.layer_norm), head.decoder
    elif names & {"GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}:
        linear = any_model.lm_head
    else:
        raise TypeError(
            f"model: expected a BERT, RoBERTa, GPT-2, Llama, Mistral or Qwen2 language model, got {type(model).__name__}; pass "
            "LabelHead(transform, weight, bias) with logits = transform(hidden) @ weight.T + bias, and compare with its logits"
        )
    if type(linear) is not nn.Linear:
        raise TypeError(f"model: expected a plain nn.Linear as its vocabulary head, got {type(linear).__name__}")
    return transform, linear


Rows = tuple[Tensor, Tensor | None]


class _Gathered(NamedTuple):
    """What was read from a frozen head, and when."""

    key: Any
    head: Any  # tensors, and weak references to their storages: held, so that no others take their ids and addresses
    words: Rows
    classes: tuple[Tensor, Tensor | None, Tensor | None] | None  # weight, bias, and the prior that is not in the bias


_Self = TypeVar("_Self", bound="OnHead")


class OnHead(Drawn, nn.Module):
    """What reads hidden states as a model's vocabulary head would: the head is looked at, never owned.

    It is in no `state_dict`, `parameters` or pickle; a deep copy together with the model finds the model's copy.
    """

    _head: tuple[Callable[[Tensor], Tensor], Any] | None = None
    _gathered: _Gathered | None = None

    def attach(self: _Self, head: nn.Module | LabelHead) -> _Self:
        """Reads hidden states through this head from now on.

        A frozen head's rows are gathered once, and again when it has changed; what is written through `.data` or NumPy is
        not seen before the next `attach`.

        Args:
            head: a model that `label_head_of` knows, an nn.Linear(d, V), or a `LabelHead`.

        Raises:
            ValueError: a head for another number of tokens, or another width.
        """
        if isinstance(head, LabelHead):
            found: tuple[Callable[[Tensor], Tensor], Any] = head.transform, head[1:]
        elif type(head) is nn.Linear:
            found = nn.Identity(), head
        else:
            found = _parts_of(head)
        self._check_head(*_tensors(found[1]))
        self._head, self._gathered = found, None
        return self

    def _check_head(self, weight: Tensor, bias: Tensor | None) -> None:
        raise NotImplementedError

    def _states(self, hidden: Tensor, rows: Tensor | None, weight: Tensor) -> Tensor:
        """The selected positions only, then the head's transform: [R, d]."""
        states = select_rows(hidden, rows, weight)
        return states if self._head is None else self._head[0](states)

    def loss(self, hidden: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of the class scores, in float32 at least; target int64 [R], -100 is ignored."""
        return class_loss(self(hidden, rows), target)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_head", "_gathered")}

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__ = copy.deepcopy({name: value for name, value in self.__dict__.items() if name != "_gathered"}, memo)
        return other


def class_loss(scores: Tensor, target: Tensor, prior: Tensor | None = None) -> Tensor:
    """In float32 at least. A class out of range is an error on a CPU and NaN elsewhere, where PyTorch's ends the process."""
    if scores.device.type == "cpu" and prior is None:
        return F.cross_entropy(scores.to(torch.promote_types(scores.dtype, torch.float32)), target)
    classes = torch.arange(scores.shape[1], device=scores.device)
    return functional.mapped_cross_entropy(scores, classes, target, prior=prior)


def _tensors(source: Any) -> Rows:
    """Asked at every call: a module's parameters can be replaced."""
    return (source.weight, source.bias) if isinstance(source, nn.Linear) else source


# ---- Fixed words ----


class Verbalizer(OnHead):
    """Class scores from the scores of fixed label words.

        s[w]   = first, mean or max over the word's tokens of the head's logits
        p[w]   = softmax over all label words of s, divided by the prior of w and normalised again
        out[c] = mean over the words w of class c of log p[w]                   of="log-probabilities"
                 log of the mean (sum, max) over them of p[w]                   of="probabilities"
                 mean (max) over them of s[w] - log prior[w]                    of="logits"

    PET (Schick & Schuetze 2021, arXiv 2001.07676) has one word a class; the manual verbalizer of OpenPrompt (Ding et al.
    2022, arXiv 2111.01998) several, with the calibration of Hu et al. 2022 (KPT, arXiv 2108.02035). Everything behind the
    head is computed in float32 (float64 for float64) by log-sum-exp: no constant is added to a probability, and there are no
    padded words. Alignment: structural.

    Without a head (see `attach`), the input is a model's logits over the whole vocabulary.

    Args:
        words: for every class its words, each a token id or, for words of several tokens, a list of ids.
        num_tokens: V, the rows of the head.
        reduce: over the words of a class: "mean", "max", "first", and for probabilities "sum".
        tokens: the score of a word of several tokens: its "first" token's, the "mean" or the "max" of its tokens'. None:
            such words are refused.
        of: what is reduced.
        prior: of every word, class after class: positive numbers [W]. Default: all alike; `calibrate` measures it.
        names: of the classes.

    Attributes:
        log_prior: buffer [W].

    Raises:
        ValueError: a class without words, a token outside the vocabulary, words of several tokens unasked, or two words with
            the same score (one word in two classes, or one first token with tokens="first").
    """

    log_prior: Tensor

    def __init__(
        self, words: Sequence[Sequence[Word]], num_tokens: int, *, reduce: str = "mean", tokens: str | None = None,
        of: str = "log-probabilities", prior: Tensor | Sequence[float] | None = None, names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.of = one_of("of", of, ("log-probabilities", "probabilities", "logits"))
        self.reduce = one_of("reduce", reduce, ("mean", "max", "first") + ("sum",) * (of == "probabilities"))
        self.tokens = None if tokens is None else one_of("tokens", tokens, ("first", "mean", "max"))
        self.names = None if names is None else list(names)
        self.words = [[[word] if isinstance(word, int) else list(word) for word in each] for each in words]
        self.num_tokens = num_tokens
        if names is not None and len(names) != len(self.words):
            raise bad("names", f"{len(self.words)}, one a class", len(names))
        _check_words(self.words, num_tokens, tokens, names, None)
        count = sum(map(len, self.words))
        log_prior = torch.zeros(count)
        if prior is not None:
            given = torch.as_tensor(prior, dtype=torch.float32)
            if given.shape != (count,) or not bool(((given > 0) & (given < torch.inf)).all()):
                raise bad("prior", f"positive numbers [{count}], one a word", prior)
            log_prior.copy_(given.log())
        self.register_buffer("log_prior", log_prior)
        self._place()

    @classmethod
    def from_text(
        cls, words: Mapping[str, Sequence[str] | str], tokenizer: Any, *, prefix: str = " ", multi_token: str = "refuse",
        num_tokens: int | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """A verbalizer of words as text: {"positive": ["great", "good"], "negative": "bad"}.

        Args:
            words: of every class, in the order of the class ids; upper and lower case are different words.
            tokenizer: of transformers, or any object with its `encode`, `convert_ids_to_tokens`, `unk_token_id` and `len`.
            prefix: put in front of every word, as it stands in the template: " " in the middle of a sentence.
            multi_token: "refuse", or how a word of several tokens is scored: "first", "mean" or "max".
            num_tokens: V, for a head with more rows than the tokenizer has tokens (`model.config.vocab_size`).
            options: of the constructor.

        Raises:
            ValueError: a word that is not in the vocabulary, that becomes several tokens unasked, or that has the score of
                another; with the word, its class and its tokens.
        """
        one_of("multi_token", multi_token, ("refuse", "first", "mean", "max"))
        ids, texts = [], []
        for name, given in words.items():
            texts.append([given] if isinstance(given, str) else list(given))
            ids.append([_encode(tokenizer, prefix, word, name, multi_token) for word in texts[-1]])
        size = len(tokenizer) if num_tokens is None else num_tokens
        tokens = None if multi_token == "refuse" else multi_token
        _check_words(ids, size, tokens, list(words), texts)
        return cls(ids, size, tokens=tokens, names=list(words), **options)

    @property
    def num_classes(self) -> int:
        return len(self.words)

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.STRUCTURAL)

    # The maps are made of `words` where the module is, so no move or conversion, `to_empty` included, can spoil them.

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if self._columns.device != self.log_prior.device:
            self._place()
        return self

    def _place(self) -> None:
        device = self.log_prior.device
        flat = [word[:1] if self.tokens == "first" else word for each in self.words for word in each]
        with torch.device("cpu"):  # a column for every token of every word
            columns = torch.tensor([token for word in flat for token in word])
            starts = [torch.tensor([0, *map(len, parts)]).cumsum(0) for parts in (self.words, flat)]
            classes, inner = (functional.segments((torch.arange(int(s[-1])), s), int(s[-1])) for s in starts)
        self._columns, self._classes = columns.to(device), classes.to(device)
        self._inner = inner.to(device) if inner.longest > 1 else None  # columns to words
        self._gathered = None

    # ---- The head ----

    def _check_head(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2 or len(weight) != self.num_tokens or not weight.is_floating_point():
            raise bad(
                "head", f"a floating point weight [{self.num_tokens}, d], a row a token", f"{weight.dtype} {list(weight.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise bad("head", f"a bias [{self.num_tokens}]", list(bias.shape))

    def _label_rows(self) -> Rows:
        """The label words' rows of the head: gathered now where they have a gradient, otherwise when the head has changed."""
        assert self._head is not None
        weight, bias = _tensors(self._head[1])
        gathered = self._frozen_rows(weight, bias)
        return self._gather(weight, bias) if gathered is None else gathered.words

    def _frozen_rows(self, weight: Tensor, bias: Tensor | None) -> _Gathered | None:
        """What a frozen head is read for, gathered once, and again when the head or the prior has changed."""
        both = (weight, self.log_prior) if bias is None else (weight, self.log_prior, bias)
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None
        if any(type(t) not in (Tensor, nn.Parameter) or t.requires_grad or t.is_inference() for t in both):
            return None
        key = [(id(t), t.untyped_storage()._cdata, t.data_ptr(), t._version, t.device, t.dtype) for t in both]
        if self._gathered is None or self._gathered.key != key:
            with torch.inference_mode(False), torch.no_grad():
                words = self._gather(weight, bias)
                if type(words[0]) is not Tensor:  # a mode makes fake tensors
                    return None
                held = both, [StorageWeakRef(t.untyped_storage()) for t in both]
                self._gathered = _Gathered(key, held, words, self._fold(*words) if self._folds else None)
        return self._gathered

    def _fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The head whose logits are the class scores, but for a constant of the row: the mean of the words' rows."""
        weight, bias = functional.fold(self._classes, weight, bias)
        prior = functional.map_labels(self.log_prior.to(torch.promote_types(weight.dtype, torch.float32))[None], self._classes)[0]
        if prior.dtype != weight.dtype:
            return weight, bias, prior  # in half precision it would be rounded
        return weight, -prior if bias is None else bias - prior, None

    def _gather(self, weight: Tensor, bias: Tensor | None) -> Rows:
        same_device(weight, verbalizer=self._columns)
        weight = weight.index_select(0, self._columns)
        bias = None if bias is None else bias.index_select(0, self._columns)
        if self._inner is not None and self.tokens == "mean":
            return functional.fold(self._inner, weight, bias, reduce="mean")
        return weight, bias

    @property
    def _folds(self) -> bool:
        linear = self._inner is None or self.tokens == "mean"
        return linear and self._over_words == "mean" and self.of != "probabilities"

    # ---- Reading ----

    def word_logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """The scores s of all label words, class after class: [R, W], in the head's dtype."""
        if self._head is None:
            if rows is not None or hidden.dim() != 2 or hidden.shape[1] != self.num_tokens:
                what = f"{list(hidden.shape)}{'' if rows is None else ' and rows'}"
                raise bad("hidden", f"a head (call attach first), or logits [B, {self.num_tokens}] without rows", what)
            return self._words_of(hidden)
        weight, bias = self._label_rows()
        scores = F.linear(self._states(hidden, rows, weight), weight, bias)
        return scores if self._inner is None or self.tokens == "mean" else self._reduce_tokens(scores)

    def _words_of(self, logits: Tensor) -> Tensor:
        scores = functional.map_labels(logits, self._columns)
        return scores if self._inner is None else self._reduce_tokens(scores)

    def _reduce_tokens(self, scores: Tensor) -> Tensor:
        wide = torch.promote_types(scores.dtype, torch.float32)
        assert self._inner is not None
        return functional.map_labels(scores.to(wide), self._inner, reduce=self.tokens)

    def forward(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """hidden [B, d], [B, T, d] with rows [B], or [M, d] with rows [R] -> class scores [R, C], float32 at least.

        rows int64 are positions, negative ones from the end. Without a head: logits [B, V] -> [B, C].
        """
        return self._class_scores(self.word_logits(hidden, rows))

    def from_logits(self, logits: Tensor) -> Tensor:
        """Class scores [B, C] from logits [B, V] over the whole vocabulary."""
        self._check_logits(logits)
        return self._class_scores(self._words_of(logits))

    def _check_logits(self, logits: Tensor) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.num_tokens:
            raise bad("logits", f"[B, {self.num_tokens}], one a token", list(logits.shape))

    def _class_scores(self, words: Tensor) -> Tensor:
        words = words.to(torch.promote_types(words.dtype, torch.float32))
        words = words - self.log_prior.to(words.dtype)
        if self.of != "logits":
            words = words.log_softmax(1)
        return functional.map_labels(words, self._labels(), reduce=self._over_words, of=self._of)

    def loss(self, hidden: Tensor, target: Tensor, rows: Tensor | None = None) -> Tensor:
        """The mean cross-entropy of the class scores, in float32 at least; target int64 [R], -100 is ignored.

        The logarithm of the label words' total mass is the same for all classes of a row, so it is not computed: of means
        over the words of a frozen head, one column a class is all that is.
        """
        gathered = None if self._head is None else self._frozen_rows(*_tensors(self._head[1]))
        if gathered is not None and gathered.classes is not None:
            weight, bias, prior = gathered.classes
            return class_loss(F.linear(self._states(hidden, rows, weight), weight, bias), target, prior)
        words = self.word_logits(hidden, rows)
        given: dict[str, Any] = {"reduce": self._over_words, "of": self._of}
        if self.of == "probabilities":
            words = words.to(torch.promote_types(words.dtype, torch.float32))
            words = words - self.log_prior.to(words.dtype)
        else:
            given["prior"] = self.log_prior
        return functional.mapped_cross_entropy(words, self._labels(), target, **given)

    @property
    def _of(self) -> str:
        return "probabilities" if self.of == "probabilities" else "logits"

    @property
    def _over_words(self) -> str | None:
        return self.reduce

    def _labels(self) -> Labels:
        return self._classes

    def dense(self) -> Tensor:
        """How much each class reads of each word, float32 [W, C], words class after class."""
        owner = self._classes.owner[:, None] == torch.arange(self.num_classes, device=self._classes.owner.device)
        return owner / (owner.sum(0) if self.reduce == "mean" else 1)

    # ---- Calibration ----

    @torch.no_grad()
    def calibrate(
        self, logits: Tensor | None = None, *, hidden: Tensor | None = None, rows: Tensor | None = None,
        average: str = "probabilities",
    ) -> Any:  # fmt: skip
        """Sets the prior of the words to what the model says without content ("N/A"), or on average over a support set.

        Args:
            logits: [N, V] or [V], over the whole vocabulary; or
            hidden, rows: as in `forward`.
            average: of "probabilities" over the label words (Zhao et al. 2021, arXiv 2102.09690) or of "logits" (OpenPrompt).

        Raises:
            ValueError: no input or both, none to average, or a word without any mass.
        """
        one_of("average", average, ("probabilities", "logits"))
        if (logits is None) == (hidden is None):
            raise bad("logits", "logits or hidden, one of them", "none" if logits is None else "both")
        if hidden is not None:
            words = self.word_logits(hidden, rows)
        else:
            assert logits is not None
            logits = logits[None] if logits.dim() == 1 else logits
            self._check_logits(logits)
            words = self._words_of(logits)
        if not len(words):
            raise bad("logits", "at least one input", "none")
        words = words.to(torch.promote_types(words.dtype, torch.float32))
        log_prior = (words.mean(0) if average == "logits" else words.log_softmax(1).logsumexp(0)).log_softmax(0)
        wrong = (~log_prior.isfinite()).nonzero()[:, 0].tolist()
        if wrong:
            raise bad("logits", "a finite share for every label word", f"none for {self._word(wrong[0])}")
        self.log_prior.copy_(log_prior)
        return self

    def _word(self, number: int) -> str:
        for c, each in enumerate(self.words):
            if number < len(each):
                return f"tokens {each[number]} of class {_name(self.names, c)}"
            number -= len(each)
        raise IndexError(number)

    # ---- Manners ----

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can hold them; the prior is in the state."""
        return {name: getattr(self, name) for name in ("words", "num_tokens", "reduce", "tokens", "of", "names")}

    def extra_repr(self) -> str:
        tokens = "" if self.tokens is None else f", tokens={self.tokens}"
        head = "" if self._head is None else ", attached"
        words = sum(map(len, self.words))
        return (
            f"{self.num_tokens} tokens -> {words} words -> {self.num_classes}, reduce={self.reduce}{tokens}, of={self.of}{head}"
        )


def _name(names: Sequence[str] | None, c: int) -> str:
    return str(c) if names is None else repr(names[c])


def _encode(tokenizer: Any, prefix: str, word: str, name: str, multi_token: str) -> list[int]:
    if not isinstance(word, str) or not word.strip():
        raise bad("words", f"words of text for class {name!r}", repr(word))
    ids = [int(token) for token in tokenizer.encode(prefix + word, add_special_tokens=False)]
    shown = tokenizer.convert_ids_to_tokens(ids)
    if not ids or tokenizer.unk_token_id in ids:
        raise bad("words", "words of the vocabulary", f"{word!r} of class {name!r}, which becomes {shown}")
    if len(ids) > 1 and multi_token == "refuse":
        raise bad(
            "words", "words of one token", f"{word!r} of class {name!r}, which becomes {shown}; "
            'take another word or prefix, or say multi_token="first", "mean" or "max"',
        )  # fmt: skip
    return ids


def _check_words(
    words: Sequence[Sequence[Sequence[int]]], num_tokens: int, tokens: str | None, names: Sequence[str] | None,
    texts: Sequence[Sequence[str]] | None,
) -> None:  # fmt: skip
    """Every class has words, every word has tokens of the vocabulary and a score of its own."""
    if not words:
        raise bad("words", "at least one class", "none")
    seen: dict[tuple[int, ...], tuple[int, int]] = {}

    def shown(c: int, i: int) -> str:
        word = f"tokens {list(words[c][i])}" if texts is None else repr(texts[c][i])
        return f"{word} of class {_name(names, c)}"

    for c, each in enumerate(words):
        if not each:
            raise bad("words", "at least one word for every class", f"none for class {_name(names, c)}")
        for i, word in enumerate(each):
            if any(isinstance(token, bool) or not isinstance(token, int) for token in word):
                raise TypeError(f"words: expected token ids, got {shown(c, i)}")
            if not word or min(word) < 0 or max(word) >= num_tokens:
                raise bad("words", f"token ids from 0 to {num_tokens - 1}", shown(c, i))
            if len(word) > 1 and tokens is None:
                raise bad("words", 'one token a word, or tokens="first", "mean" or "max"', shown(c, i))
            key = tuple(sorted(set(word) if tokens == "max" else word[:1] if tokens == "first" else word))
            if key in seen:
                raise bad("words", "words with scores of their own", f"the same for {shown(*seen[key])} and {shown(c, i)}")
            seen[key] = (c, i)


# ---- Weighted words ----


class KnowledgeableVerbalizer(Verbalizer):
    """Many words a class, with a trained weight for each: out[c] = sum over the words w of class c of a[w] log p[w].

    a = softmax over the words of a class of `word_weights`, which start at 0: the mean. Words that the model hardly ever
    says are dropped by `refine`. Knowledgeable prompt-tuning (KPT; Hu et al. 2022, arXiv 2108.02035). p is that of
    `Verbalizer`, and so are the arguments; the reduction is the weighted mean of log-probabilities. Alignment: linear, and
    structural when the weights are fixed.

    Attributes:
        word_weights: Parameter [W], class after class.
    """

    def __init__(
        self, words: Sequence[Sequence[Word]], num_tokens: int, *, tokens: str | None = None,
        prior: Tensor | Sequence[float] | None = None, names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(words, num_tokens, tokens=tokens, prior=prior, names=names)
        self.word_weights = nn.Parameter(torch.zeros(len(self.log_prior)))

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.LINEAR if self.word_weights.requires_grad else Alignment.STRUCTURAL)

    @property
    def _over_words(self) -> None:
        return None

    def _labels(self) -> Tensor:
        """The matrix [W, C] of the weights, 0 where a word is another class's."""
        weights = self.word_weights.to(torch.promote_types(self.word_weights.dtype, torch.float32))
        owner = self._classes.owner[:, None] == torch.arange(self.num_classes, device=weights.device)
        return torch.where(owner, weights[:, None], -torch.inf).softmax(0)

    def dense(self) -> Tensor:
        return self._labels().detach()

    def refine(self, prior: Tensor, share: float = 0.5) -> Any:
        """A new verbalizer without the words that have a token among the lowest `share` of the vocabulary's prior.

        Args:
            prior: [V], such as the mean over a support set of the logits or probabilities; only its order matters.
            share: of the vocabulary, 0 to below 1.

        Returns:
            The rest of the words with their weights and priors, on the same head.

        Raises:
            ValueError: a class would have no word left; with its name.
        """
        if prior.shape != (self.num_tokens,):
            raise bad("prior", f"[{self.num_tokens}], one a token", list(prior.shape))
        if not 0 <= share < 1:
            raise bad("share", "0 to below 1", share)
        low = set(prior.detach().argsort(stable=True)[: int(share * len(prior))].tolist())
        kept = [[word for word in each if low.isdisjoint(word)] for each in self.words]
        for c, each in enumerate(kept):
            if not each:
                raise bad(
                    "prior",
                    f"one that leaves a word to every class; try a share below {share}",
                    f"none for class {_name(self.names, c)}",
                )
        other = type(self)(**self.config() | {"words": kept}).to(self.log_prior)
        keep = torch.tensor([low.isdisjoint(word) for each in self.words for word in each], device=self.log_prior.device)
        with torch.no_grad():
            other.word_weights.copy_(self.word_weights[keep]).requires_grad_(self.word_weights.requires_grad)
            other.log_prior.copy_(self.log_prior[keep])
        other._head = self._head
        return other.train(self.training)

    def config(self) -> dict[str, Any]:
        return {name: value for name, value in super().config().items() if name not in ("reduce", "of")}

    def extra_repr(self) -> str:
        return super().extra_repr().replace("reduce=mean", "reduce=weighted")


# ---- Calibration of class probabilities ----


class ContextualCalibration(Drawn, nn.Module):
    """q = W p + b with W = diag(p_cf)^-1 and b = 0, normalised: q[c] = (p[c] / p_cf[c]) / sum over k of p[k] / p_cf[k].

    p_cf is what the model says without content: the mean class probabilities of inputs such as "N/A", "" and "[MASK]" (Zhao
    et al. 2021, arXiv 2102.09690). Counted, so the alignment is statistical.

    Args:
        num_classes: C.
        of: "logits": scores whose softmax is p -> log q, for a cross-entropy. "probabilities": p -> q.

    Attributes:
        prior: buffer [C], p_cf; 1 / C until `calibrate`.
    """

    prior: Tensor

    def __init__(self, num_classes: int, of: str = "logits") -> None:
        super().__init__()
        if num_classes < 1:
            raise bad("num_classes", "at least 1", num_classes)
        self.num_classes, self.of = num_classes, one_of("of", of, ("logits", "probabilities"))
        self.register_buffer("prior", torch.full((num_classes,), 1 / num_classes))

    @property
    def taxonomy(self) -> Place:
        return Place(alignment=Alignment.STATISTICAL)

    @torch.no_grad()
    def calibrate(self, scores: Tensor) -> ContextualCalibration:
        """p_cf from the scores [N, C] or [C] of content-free inputs, of the kind that `forward` takes.

        Raises:
            ValueError: no input, or a class without any mass; with its number.
        """
        scores = scores[None] if scores.dim() == 1 else scores
        prior = self._log_p(scores).exp().mean(0)
        empty = (~(prior > 0)).nonzero()[:, 0].tolist()
        if empty:
            raise bad("scores", "some probability for every class", f"{prior[empty[0]].item()} for class {empty[0]}")
        self.prior.copy_(prior / prior.sum())
        return self

    def _log_p(self, scores: Tensor) -> Tensor:
        if scores.dim() != 2 or scores.shape[1] != self.num_classes or not scores.is_floating_point():
            raise bad("scores", f"a floating point [B, {self.num_classes}]", f"{scores.dtype} {list(scores.shape)}")
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.of == "logits":
            return wide.log_softmax(1)
        if looks_at_values(scores) and len(scores) and not bool(((wide >= 0).all(1) & ((wide.sum(1) - 1).abs() < 0.01)).all()):
            raise bad("scores", "probabilities, rows that sum to 1", "other values; for logits say of='logits'")
        return wide.log()

    def forward(self, scores: Tensor) -> Tensor:
        """[B, C] -> log q or q [B, C], float32 at least."""
        log_p = self._log_p(scores)
        log_q = (log_p - self.prior.to(log_p.dtype).log()).log_softmax(1)
        return log_q if self.of == "logits" else log_q.exp()

    def dense(self) -> Tensor:
        """W = diag(p_cf)^-1, [C, C]."""
        return (1 / self.prior).diag()

    def loss(self, scores: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy -log q[target]; target int64 [B], -100 is ignored."""
        log_p = self._log_p(scores)
        return class_loss(log_p - self.prior.to(log_p.dtype).log(), target)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as data."""
        return {"num_classes": self.num_classes, "of": self.of}

    def extra_repr(self) -> str:
        return f"{self.num_classes}, of={self.of}"
