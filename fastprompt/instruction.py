"""Prompt instruction: a fixed text in front of every query, run once by the frozen model and read by all of them.

    prompt = Demonstrations(examples, "Review: {text}\\nSentiment: {label}")
    ready = prompt.on(model, tokenizer)               # the demonstrations are tokenised and run here, once
    ready.scores(["I loved it", "Never again"], words)
    ready.generate(["I loved it"], max_new_tokens=8)

    y = f([c ; x]),    c the context (an instruction, demonstrations), x the query; nothing is trained

In a causal model the keys and values of c do not depend on x (`fastprompt.hoist` says why), so they are kept as a prefix, and
every query in every batch reads them: the outputs are those of the joined ids. Queries may have different lengths (they are
padded on the left) and different contexts (retrieved demonstrations; equal ones are read together).

Context and query are tokenised apart, because the context's ids must not depend on the query. A tokenizer may cut the joined
text otherwise at the seam (a separator of blank lines keeps most from it); `Instructed.encode` shows the ids that are read. The
tokenizer's first token (BOS) stands once, in front of the context; no other special token is added.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from string import Formatter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastprompt.answers import Answer, Answers, LastNumber, Rule
from fastprompt.functional.checks import bad, one_of
from fastprompt.hoist import Hoisted, Inexact, KeyValue, Reading, Wiring, check_exact
from fastprompt.nn import ContextualCalibration, PrefixKV, Verbalizer
from fastprompt.taxonomy import Alignment, Format, Location, Operator, Place

Query = str | Mapping[str, Any]
Context = tuple[str, ...]  # the texts that are encoded apart
Encoder = Callable[[list[str]], Tensor]

_RUN = 8192  # tokens of contexts that are run at a time, so that many new contexts do not need much memory


# ---- What stands in front ----


class Instruction:
    """A fixed text in front of every query.

    Args:
        text: the instruction; it is followed by the separator.
        template: of a query, with fields in braces. A query is a mapping with its fields, or, where it has one, a str.
        target: the field that the model is to say: a query is the template up to there, without the blanks (not the line
            ends) right before it, because most tokenizers put a blank at the start of a word.
        separator: behind the text, and behind each demonstration.

    Raises:
        ValueError: a template without a field, with other fields than plain names, or without its target.
    """

    fixed = True  # the same context for every query
    groups = 1
    reader: Answers | None = None

    def __init__(
        self, text: str, template: str = "{text}", *, target: str | None = None, separator: str = "\n\n"
    ) -> None:  # fmt: skip
        self.text, self.separator = text, separator
        self._whole = _parsed(template)
        self._head = self._whole if target is None else _up_to(self._whole, target, template)
        self.fields = list(dict.fromkeys(name for _, name in self._head if name is not None))
        if not self.fields:
            raise bad("template", "a field for the query" + ("" if target is None else " before its target"), repr(template))

    @property
    def taxonomy(self) -> Place:
        location = Location.RAW if self.groups == 1 else Location.HIDDEN
        alignment = Alignment.IDENTITY if self.reader is None else Alignment.STRUCTURAL
        return Place(Format.FIXED, location, Operator.CONCATENATIVE, alignment)

    def contexts(self, queries: Sequence[Query]) -> list[Context]:
        """What stands in front of each query: one text, or several that are encoded apart."""
        return [(self._joined([]),)] * len(queries)

    def query(self, query: Query, argument: str = "query") -> str:
        """The text of a query."""
        return _filled(self._head, self._values(query, argument), argument)

    def ends(self, text: str) -> str:
        """What of a generated text is the model's answer."""
        return text

    def on(self, model: nn.Module, tokenizer: Any, *, keep: int = 32) -> Instructed:
        """The model with this prompt, see `Instructed`."""
        return Instructed(model, tokenizer, self, keep=keep)

    def _joined(self, examples: Sequence[str]) -> str:
        parts = [self.text, *examples] if self.text else examples
        return "".join(part + self.separator for part in parts)

    def _values(self, query: Query, argument: str) -> Mapping[str, Any]:
        if isinstance(query, Mapping):
            return query
        if not isinstance(query, str):
            raise TypeError(f"{argument}: expected a str or a mapping, got {type(query).__name__}")
        if len(self.fields) > 1:
            raise bad(argument, f"a mapping with the fields {', '.join(self.fields)}", repr(query))
        return {self.fields[0]: query}


class Demonstrations(Instruction):
    """Examples in front of every query: in-context learning (Brown et al. 2020, arXiv 2005.14165).

        c = text, t(z_1), ..., t(z_k), each followed by the separator;   z_i the examples, t the template

    With an encoder each query has the k examples that are nearest to it by cosine similarity (KATE, Liu et al. 2022, arXiv
    2101.06804). It sees the values of the fields before the target, one a line.

    With `groups` M > 1 the examples are dealt to M contexts, in order and as evenly as can be, that are encoded apart and read
    side by side: structured prompting (Hao et al. 2022, arXiv 2212.06713). Each ends at the position before the query's first
    (right alignment), and the weight of the query's own tokens is multiplied by M in every attention:

        out = (sum_m sum_j exp(s_mj) v_mj + M sum_i exp(s_i) v_i) / (sum_m sum_j exp(s_mj) + M sum_i exp(s_i))

    M groups of P tokens cost M P^2 to encode instead of (M P)^2, and need P positions. Each begins with `text` and BOS.

    Args:
        examples: mappings with a value (str or number) for each field of the template; other keys are ignored.
        template, target, separator: see `Instruction`.
        text: an instruction in front.
        k: how many examples; default: all. Without an encoder the first k in their order.
        order: "given"; "random", a permutation by the seed; "similar", the nearest last (needs an encoder).
        seed: of the permutation, which also chooses the k examples when there is no encoder.
        encoder: from a list of n texts to a floating point [n, d]. It runs on the examples here, on queries in every call.
        groups: M.

    Raises:
        ValueError: a field that an example lacks (with its name and the example's number), k or groups out of range.
    """

    def __init__(
        self, examples: Sequence[Mapping[str, Any]], template: str, *, target: str = "label", text: str = "",
        separator: str = "\n\n", k: int | None = None, order: str = "given", seed: int = 0, encoder: Encoder | None = None,
        groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(text, template, target=target, separator=separator)
        self.examples = [_filled(self._whole, each, f"examples[{i}]") for i, each in enumerate(examples)]
        count = len(examples)
        self.k = count if k is None else k
        if not (1 if count else 0) <= self.k <= count:
            raise bad("k", f"1 to {count}, the number of examples", k)
        if not 1 <= groups <= max(1, self.k):
            raise bad("groups", f"1 to {self.k}, the number of examples in front of a query", groups)
        self.order, self.groups, self.encoder = one_of("order", order, ("given", "random", "similar")), groups, encoder
        if order == "similar" and encoder is None:
            raise bad("order", '"given" or "random" without an encoder', '"similar"')
        ranks = torch.arange(count)
        if order == "random":
            ranks = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        self._order = ranks.tolist()
        self._places = {example: place for place, example in enumerate(self._order)}
        self.fixed = encoder is None or not count
        if self.fixed:
            self._context = self._in_groups(self._order[: self.k])
        else:
            self._encoded = self._encode(examples)

    def contexts(self, queries: Sequence[Query]) -> list[Context]:
        if self.fixed:
            return [self._context] * len(queries)
        near = self._encode([self._values(query, f"queries[{i}]") for i, query in enumerate(queries)])
        similar = near @ self._encoded.T.to(near)
        # A stable sort: of examples that are as near, the first ones.
        chosen = similar.sort(dim=1, descending=True, stable=True).indices[:, : self.k].tolist()
        if self.order == "similar":
            return [self._in_groups(each[::-1]) for each in chosen]
        return [self._in_groups(sorted(each, key=self._places.__getitem__)) for each in chosen]

    def ends(self, text: str) -> str:
        """The text up to the next separator, behind which the model would go on with an example of its own."""
        return text.split(self.separator)[0] if self.separator and self.examples else text

    def _in_groups(self, chosen: Sequence[int]) -> Context:
        cuts = [len(chosen) * group // self.groups for group in range(self.groups + 1)]
        return tuple(self._joined([self.examples[i] for i in chosen[start:end]]) for start, end in pairwise(cuts))

    def _encode(self, values: Sequence[Mapping[str, Any]]) -> Tensor:
        assert self.encoder is not None
        texts = ["\n".join(str(each[name]) for name in self.fields if name in each) for each in values]
        with torch.no_grad():
            found = self.encoder(texts)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(texts) or not found.is_floating_point():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise bad("encoder", f"a floating point tensor [{len(texts)}, d] for {len(texts)} texts", got)
        if not bool(found.isfinite().all()):
            raise bad("encoder", "finite numbers", "others")
        return nn.functional.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=1)


class ChainOfThought(Demonstrations):
    """Demonstrations that reason before they answer (Wei et al. 2022, arXiv 2201.11903), and the rule that reads the answer.

    Without examples the model is asked to reason (zero-shot, Kojima et al. 2022, arXiv 2205.11916): the query ends with
    `trigger`, and the rule reads the answer in one call. `Instructed.answers` takes the majority of several sampled chains
    (self-consistency, Wang et al. 2023, arXiv 2203.11171).

    Args:
        examples: with the fields of the template: question, rationale and answer.
        template, target: of a demonstration, and the field where the model begins.
        rule: from a text to an answer or None, see `fastprompt.answers`. Default: the last number.
        labels, ties: of `fastprompt.answers.Answers`.
        trigger: behind a query when there are no examples.
        options: of `Demonstrations`.
    """

    def __init__(
        self, examples: Sequence[Mapping[str, Any]] = (),
        template: str = "Q: {question}\nA: {rationale} The answer is {answer}.", *, target: str = "rationale",
        rule: Rule | None = None, labels: Mapping[Any, int] | None = None, ties: str = "first",
        trigger: str = "Let's think step by step.", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(examples, template, target=target, **options)
        self.reader = Answers(LastNumber() if rule is None else rule, labels, ties)
        self.trigger = "" if self.examples else trigger

    def query(self, query: Query, argument: str = "query") -> str:
        return super().query(query, argument) + (" " + self.trigger if self.trigger else "")


# ---- Templates ----

Parts = list[tuple[str, str | None]]


def _parsed(template: str) -> Parts:
    """Literals, each with the field behind it."""
    try:
        parts = [(literal, name, f"{spec or ''}{how or ''}") for literal, name, spec, how in Formatter().parse(template)]
    except ValueError as wrong:
        raise bad("template", "fields in braces, {{ and }} for braces themselves", f"{template!r} ({wrong})") from None
    for _, name, more in parts:
        if more or not (name is None or name.isidentifier()):  # format's attributes and indices reach into objects
            raise bad("template", "plain fields such as {text}", repr(template))
    return [(literal, name) for literal, name, _ in parts]


def _up_to(parts: Parts, target: str, template: str) -> Parts:
    names = [name for _, name in parts]
    if target not in names:
        raise bad("template", f"a field {target!r}, the target", repr(template))
    place = names.index(target)
    return [*parts[:place], (parts[place][0].rstrip(" "), None)]


def _filled(parts: Parts, values: Mapping[str, Any], argument: str) -> str:
    out = []
    for literal, name in parts:
        out.append(literal)
        if name is None:
            continue
        if name not in values:
            raise bad(argument, f"a value for the template's field {name!r}", f"only {', '.join(map(repr, values)) or 'nothing'}")
        if isinstance(values[name], bool) or not isinstance(values[name], (str, int, float)):
            raise TypeError(f"{argument}: expected a str or a number for {name!r}, got {type(values[name]).__name__}")
        out.append(str(values[name]))
    return "".join(out)


# ---- On a model ----


class Instructed:
    """A frozen causal model whose queries read a prompt's context, kept as keys and values.

    A fixed context is run here; retrieved ones when a query first needs them. The context is a constant: no gradient flows
    into the model through it. What is kept is dropped when a parameter or buffer of the model has been written to, replaced,
    moved or converted since (its version and storage are compared in every call). Only what PyTorch does not count goes
    unseen: writes through `.data`, writes to inference tensors, a changed configuration, a tokenizer that got new tokens;
    after those call `forget`.

    Args:
        model: a causal language model of transformers, in eval mode or without dropout.
        tokenizer: of transformers, or an object with its `encode`, `batch_decode` and `bos_token_id`.
        prompt: `Instruction`, `Demonstrations` or `ChainOfThought`.
        keep: how many contexts are kept, those used last. A batch may have more.

    Raises:
        Inexact (a ValueError): a model whose context depends on the query (bidirectional, encoder-decoder), and what else
            `fastprompt.hoist.hoist` refuses; `groups` with sliding windows.
        ValueError: more tokens than the model has positions.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, prompt: Instruction, *, keep: int = 32) -> None:
        if keep < 1:
            raise bad("keep", "at least 1", keep)
        self.model: Any = model
        self.tokenizer, self.prompt, self.keep = tokenizer, prompt, keep
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise Inexact(f"model: expected a causal one, got {type(model).__name__}, whose encoder reads in both directions")
        self._wiring = Wiring(model)
        self._kept: OrderedDict[Any, Hoisted] = OrderedDict()
        self._weights: list[tuple[Any, ...]] = []
        self._room = _room(self._wiring.base.config)
        bos = tokenizer.bos_token_id
        self._begin = [bos] if bos is not None and list(tokenizer.encode(""))[:1] == [bos] else []
        if prompt.groups > 1 and any(self._wiring.windows):
            raise Inexact(f"{type(model).__name__}: sliding windows, in which groups side by side have no place")
        try:
            with torch.no_grad():
                self._run([[0]], [0])
        except Inexact as reason:
            raise Inexact(f"model: expected one in which a context does not depend on what follows: {reason}") from None
        if prompt.fixed:
            contexts = prompt.contexts([""])
            self._wiring.run(lambda kwargs: self._reading(contexts, self._found(contexts)))

    # ---- What users call ----

    @contextmanager
    def reading(self, queries: Sequence[Query]) -> Iterator[dict[str, Tensor]]:
        """Inside, every call of the model reads these queries' contexts. Gives the model's arguments for the queries.

        input_ids, attention_mask, position_ids: int64 [B, T], padded on the left, so the last column is each query's last
        token. A call may have a multiple of B rows, n for each query after another (beams, repeated sequences).
        """
        contexts, own = self._checked(queries)
        found = self._found(contexts)
        for i, (context, ids) in enumerate(zip(contexts, own, strict=True)):
            if found[context].offset + len(ids) > self._room:
                got = f"{found[context].offset} of its context and {len(ids)} of its own"
                raise bad(f"queries[{i}]", f"at most the {self._room} positions of {type(self.model).__name__}", got)
        if self.model.training:
            check_exact(self._wiring.base)
        longest = max(map(len, own))
        pad = getattr(self.tokenizer, "pad_token_id", None) or 0
        rows = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in own], device=self._device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in own], device=self._device)
        made = self._reading(contexts, found)

        def source(kwargs: dict[str, Any]) -> Reading | None:
            given = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
            times, left = divmod(len(given), len(own))
            if left:
                raise bad("input_ids", f"a multiple of {len(own)} rows, some for each query", len(given))
            if made is None or times == 1:
                return made
            each = {name: getattr(made, name) for name in ("index", "offset")}
            return replace(made, **{name: t.repeat_interleave(times, 0) for name, t in each.items() if t is not None})

        with self._wiring.reading(source):
            yield {"input_ids": rows, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def logits(self, queries: Sequence[Query]) -> Tensor:
        """[B, V], of the token behind each query."""
        with self.reading(queries) as batch:
            return self.model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1]

    def scores(self, queries: Sequence[Query], verbalizer: nn.Module) -> Tensor:
        """[B, C], class scores by a verbalizer with this model's head (`Verbalizer.attach`), so that only the label words'
        columns are computed; a `Verbalizer` without a head gets the logits.
        """
        if isinstance(verbalizer, Verbalizer) and verbalizer._head is None:
            return verbalizer(self.logits(queries))  # type: ignore[no-any-return]
        with self.reading(queries) as batch:
            hidden = self._wiring.base(**batch, use_cache=False).last_hidden_state[:, -1]
        return verbalizer(hidden)  # type: ignore[no-any-return]

    def calibration(self, verbalizer: nn.Module, inputs: Sequence[str] = ("N/A", "", "[MASK]")) -> ContextualCalibration:
        """Divides by what the model says without content (Zhao et al. 2021, arXiv 2102.09690): a module for `scores`.

        Each input is the value of all fields of a query.

        Raises:
            ValueError: retrieved demonstrations, where every query would need a calibration of its own.
        """
        if not self.prompt.fixed:
            raise bad("prompt", "the same context for all queries", "one with an encoder, which chooses each query's")
        with torch.no_grad():
            scores = self.scores([dict.fromkeys(self.prompt.fields, text) for text in inputs], verbalizer)
        return ContextualCalibration(scores.shape[1]).to(scores).calibrate(scores)

    def generate(self, queries: Sequence[Query], **options: Any) -> list[Any]:
        """What the model says: a text for each query, or with `num_return_sequences` n > 1 a list of n.

        Args:
            options: of the model's `generate`: max_new_tokens, do_sample, num_beams, cache_implementation="static", ...
        """
        with self.reading(queries) as batch:
            out = self.model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        out = out if isinstance(out, Tensor) else out.sequences
        texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts = [self.prompt.ends(text) for text in texts]
        times = len(texts) // len(queries)
        return texts if times == 1 else [texts[i : i + times] for i in range(0, len(texts), times)]

    def answers(self, queries: Sequence[Query], samples: int = 1, **options: Any) -> list[Answer]:
        """The answer that the prompt's rule reads, for each query; with samples > 1 the majority of as many sampled chains.

        Args:
            options: of `generate`.
        """
        if self.prompt.reader is None:
            raise bad("prompt", "one with a rule, such as ChainOfThought", type(self.prompt).__name__)
        if samples < 1:
            raise bad("samples", "at least 1", samples)
        if samples > 1:
            options = {"do_sample": True, "num_return_sequences": samples, **options}
        return self.prompt.reader.answers(self.generate(queries, **options))

    def encode(self, queries: Sequence[Query]) -> list[tuple[list[list[int]], list[int]]]:
        """The ids that are read: for each query those of its contexts (one, or one a group) and its own."""
        contexts, own = self._checked(queries)
        return [([self._context_ids(text) for text in context], ids) for context, ids in zip(contexts, own, strict=True)]

    @property
    def prefix(self) -> Hoisted:
        """The keys and values of a fixed context, a pair [1, Hkv, P, D] a layer."""
        if not self.prompt.fixed:
            raise bad("prompt", "the same context for all queries", "one with an encoder, which chooses each query's")
        context = self.prompt.contexts([""])[0]
        found = self._found([context])[context]
        if not found:
            raise bad("prompt", "a context of at least one token", "none")
        return found

    def trainable(self, **options: Any) -> PrefixKV:
        """A prefix that starts as the context: `fastprompt.attach(model, ready.trainable())` gives the outputs of `logits`, and
        trains on from there. Options are those of `PrefixKV`, such as frozen=1 for BOS.

        Raises:
            ValueError: groups, which a prefix alone cannot stand for.
        """
        if self.prompt.groups > 1:
            raise bad("groups", "1, because a trained prefix has no groups of its own positions", self.prompt.groups)
        prefix = self.prefix
        _, heads, length, width = prefix[0][0].shape  # type: ignore[index]
        return PrefixKV(len(prefix), heads, length, width, init=prefix, **options)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Drops what is kept; a context runs again when it is needed."""
        self._kept.clear()

    def __repr__(self) -> str:
        kept = f"{len(self._kept)} contexts of {sum(each.offset for each in self._kept.values())} positions"
        return f"Instructed({type(self.model).__name__}, {type(self.prompt).__name__}, {kept})"

    # ---- Ids ----

    @property
    def _device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    def _checked(self, queries: Sequence[Query]) -> tuple[list[Context], list[list[int]]]:
        if isinstance(queries, (str, Mapping)):
            raise TypeError(f"queries: expected a list of queries, got one {type(queries).__name__}")
        if not len(queries):
            raise bad("queries", "at least one", "none")
        own = [self._ids(self.prompt.query(query, f"queries[{i}]")) for i, query in enumerate(queries)]
        if not all(own):
            raise bad(f"queries[{own.index([])}]", "at least one token", "none")
        return self.prompt.contexts(queries), own

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _context_ids(self, text: str) -> list[int]:
        ids = self._ids(text)
        return ids if self._begin and ids[:1] == self._begin else self._begin + ids

    # ---- Keys and values ----

    def _found(self, contexts: Sequence[Context]) -> dict[Context, Hoisted]:
        """The keys and values of each context, from what is kept or from a run."""
        weights = [(id(t), t.untyped_storage()._cdata, _version(t)) for t in self._parameters()]
        if weights != [each[:3] for each in self._weights]:
            # A weak reference keeps a storage's number from being another's, and none of its memory.
            held = [StorageWeakRef(t.untyped_storage()) for t in self._parameters()]
            self._weights = [(*each, one) for each, one in zip(weights, held, strict=True)]
            self._kept.clear()
        kind = self._device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        distinct = dict.fromkeys(contexts)
        missing = [context for context in distinct if (cast, context) not in self._kept]
        self._kept.update(((cast, context), made) for context, made in zip(missing, self._made(missing), strict=True))
        found = {context: self._kept[cast, context] for context in distinct}
        for context in distinct:
            self._kept.move_to_end((cast, context))
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)
        return found

    def _parameters(self) -> Iterator[Tensor]:
        yield from self._wiring.base.parameters()
        yield from self._wiring.base.buffers()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _made(self, contexts: Sequence[Context]) -> list[Hoisted]:
        """Each context's groups side by side, each group ending at the last one's position."""
        groups = [[self._context_ids(text) for text in context] for context in contexts]
        ends = [max(map(len, ids)) for ids in groups]
        for end in ends:
            if end >= self._room:
                at_most = f"fewer tokens than the {self._room} positions of {type(self.model).__name__}"
                raise bad("prompt", at_most, f"a context of {end}")
        rows = [(ids, end - len(ids)) for each, end in zip(groups, ends, strict=True) for ids in each]
        made: dict[int, list[KeyValue]] = {}
        runs: list[list[int]] = []
        for row in sorted((i for i, (ids, _) in enumerate(rows) if ids), key=lambda i: len(rows[i][0])):
            if not runs or (len(runs[-1]) + 1) * len(rows[row][0]) > _RUN:
                runs.append([])
            runs[-1].append(row)
        for run in runs:
            made |= zip(run, self._run(*zip(*(rows[i] for i in run), strict=True)), strict=True)
        out, first = [], 0
        for ids, end in zip(groups, ends, strict=True):
            parts = [made[i] for i in range(first, first + len(ids)) if i in made]
            first += len(ids)
            joined = [tuple(torch.cat(tensors, 2) for tensors in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)]
            out.append(Hoisted(joined, end))  # type: ignore[arg-type]
        return out

    def _run(self, ids: Sequence[list[int]], starts: Sequence[int]) -> list[list[KeyValue]]:
        """The keys and values of texts, each of its own length and from its own position on."""
        lengths, device = torch.tensor([len(each) for each in ids]), self._device
        longest = int(lengths.max())
        rows = torch.tensor([each + [0] * (longest - len(each)) for each in ids], device=device)
        options: dict[str, Any] = {}
        if any(starts) or bool((lengths < longest).any()):
            place = torch.arange(longest)
            options["position_ids"] = torch.minimum(place, lengths[:, None] - 1) + torch.tensor(starts)[:, None]
            options["attention_mask"] = (place < lengths[:, None]).long()
        with self._wiring.attention():
            pairs: Any = self._wiring.shallow(rows, **{name: t.to(device) for name, t in options.items()})[0]
        return [[(k[i : i + 1, :, :n], v[i : i + 1, :, :n]) for k, v in pairs] for i, n in enumerate(lengths.tolist())]

    def _reading(self, contexts: Sequence[Context], found: Mapping[Context, Hoisted]) -> Reading | None:
        present = [context for context in found if found[context]]
        if not present:
            return None
        rescale = float(self.prompt.groups)
        if len(found) == 1:
            return Reading(found[present[0]], rescale=rescale)
        device, prefixes = self._device, [found[context] for context in present]
        lengths = [each[0][0].shape[2] for each in prefixes]  # type: ignore[index]
        layers = [
            tuple(torch.cat([_filled_up(t, max(lengths)) for t in tensors]) for tensors in zip(*layer, strict=True))  # type: ignore[arg-type]
            for layer in zip(*prefixes, strict=True)
        ]
        numbers = {context: number for number, context in enumerate(present)}
        return Reading(
            Hoisted(layers, max(each.offset for each in prefixes)),  # type: ignore[arg-type]
            torch.tensor([numbers.get(context, -1) for context in contexts], device=device),
            torch.tensor(lengths, device=device),
            torch.tensor([[found[context].offset] for context in contexts], device=device),
            rescale,
        )


def _filled_up(t: Tensor, length: int) -> Tensor:
    return nn.functional.pad(t, (0, 0, 0, length - t.shape[2]))


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _room(config: Any) -> int:
    """How many positions a model has."""
    room: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # which turns all keys another way from there on
        room = rope.get("original_max_position_embeddings") or room
    return 2**63 - 1 if room is None else room
