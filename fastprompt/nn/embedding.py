"""Prompts on embeddings as modules: soft tokens anywhere, trained words, new vocabularies, prototypes of a vocabulary.

Each takes the frozen model's embedding matrix [V, d] in its forward pass and holds none of it. What they give goes into any
model that takes `inputs_embeds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt import functional
from fastprompt.functional.checks import bad, check_range, one_of
from fastprompt.nn._shared import Described, check_sizes, check_vocabulary, from_words
from fastprompt.taxonomy import Format, Location, Operator, Place


class _OnEmbeddings(Described):
    operator = Operator.PARAMETRIC

    @property
    def taxonomy(self) -> Place:
        return Place(Format.LEARNABLE, Location.EMBEDDING, self.operator)


def _started(shape: tuple[int, ...], init: str | Tensor) -> nn.Parameter:
    """Normal (standard deviation 1), uniform in [-0.5, 0.5], or a copy of a tensor."""
    if isinstance(init, str):
        start = torch.empty(shape)
        return nn.Parameter(start.normal_() if init == "normal" else start.uniform_(-0.5, 0.5))
    if tuple(init.shape) not in (shape, shape[1:], (1, *shape[1:])):
        raise bad("init", f"a tensor of {list(shape)}", list(init.shape))
    if not init.is_floating_point():
        raise bad("init", "floating point embeddings", init.dtype)
    return nn.Parameter(init.detach().expand(shape).clone())


class _LSTM(nn.RNNBase):
    """nn.LSTM of two layers and both directions, which torch.compile refuses by its class alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__("LSTM", width, hidden, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = x.new_zeros(4, len(x), self.hidden_size)
        return torch.lstm(x, (zero, zero), self._flat_weights, True, 2, 0.0, self.training, True, True)  # type: ignore[arg-type]


class PromptTokens(_OnEmbeddings):
    """Soft tokens anywhere among the words: in front, after BOS, behind, in a template; several prompts in one batch.

        embeddings = soft_gather(place_prompt(ids), vocabulary, table())        table() [N, P, d]
        table() = prompt                                                        prompt tuning
                = MLP(prompt) or MLP(LSTM(prompt))                              P-tuning, run once for a batch
                = prompt * (task_columns @ task_rows)                           multitask: shared times low rank

    Prompt tuning: Lester et al. 2021 (arXiv 2104.08691); P-tuning: Liu et al. 2021 (arXiv 2103.10385); multitask prompt
    tuning: Wang et al. 2023 (arXiv 2303.02861). In front of a causal model alone, `SoftPrompt` with `fastprompt.hoist` is
    faster: there the prompt's keys and values can be made once.

    Args:
        length, width: P and the model's width d.
        prompts: N prompts, for tasks.
        lengths: how many of the P tokens each prompt has. Default: all.
        init: "normal" (standard deviation 1), "uniform" (in [-0.5, 0.5]), or a tensor [P, d] or [N, P, d].
            `from_vocabulary` starts from words.
        reparameterise: "mlp" or "lstm" (two layers, both directions, an MLP behind).
        hidden: width of that network. Default: d.
        rank: of the task matrices of multitask prompt tuning; every prompt starts near the shared one.

    Attributes:
        prompt: Parameter [N, P, d]; [1, P, d] with a rank.
        task_columns, task_rows: Parameters [N, P, rank] and [N, rank, d].

    Raises:
        ValueError: a size below 1, tensors that do not fit, or options that have no meaning together.
    """

    operator = Operator.CONCATENATIVE
    sizes: Tensor | None

    def __init__(
        self, length: int, width: int, *, prompts: int = 1, lengths: Sequence[int] | None = None, init: str | Tensor = "normal",
        reparameterise: str | None = None, hidden: int | None = None, rank: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(length=length, width=width, prompts=prompts, hidden=hidden, rank=rank)
        self.length, self.width, self.prompts = length, width, prompts
        self.reparameterise, self.hidden, self.rank = reparameterise, hidden, rank
        self.lengths = None if lengths is None else list(lengths)
        if self.lengths is not None and (len(self.lengths) != prompts or not all(0 <= size <= length for size in self.lengths)):
            raise bad("lengths", f"{prompts} numbers from 0 to {length}, one a prompt", lengths)
        sizes = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64)
        self.register_buffer("sizes", sizes, persistent=False)
        if isinstance(init, str):
            self.init = one_of("init", init, ("normal", "uniform"))
        elif reparameterise is not None:
            raise bad("init", '"normal" or "uniform" with a reparameterisation', "a tensor")
        if reparameterise is not None:
            one_of("reparameterise", reparameterise, ("mlp", "lstm"))
        elif hidden is not None:
            raise bad("hidden", "None without a reparameterisation", hidden)
        self.prompt = _started((1 if rank else prompts, length, width), init)
        inner = hidden or width
        if reparameterise == "lstm":
            self.lstm = _LSTM(width, inner)
            self.mlp = nn.Sequential(nn.Linear(2 * inner, 2 * inner), nn.ReLU(), nn.Linear(2 * inner, width))
        elif reparameterise == "mlp":
            self.mlp = nn.Sequential(
                nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, width)
            )
        if rank:
            self.task_columns = nn.Parameter(1 + 0.02 * torch.randn(prompts, length, rank))
            self.task_rows = nn.Parameter(1 / rank + 0.02 * torch.randn(prompts, rank, width))

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Tensor, length: int, ids: Sequence[int] | Tensor | None = None, *, prompts: int = 1, seed: int = 0,
        **options: Any,
    ) -> PromptTokens:  # fmt: skip
        """Starts from rows of an embedding matrix [V, width]: those of a text's ids, repeated or cut to the length, or random
        rows (each prompt its own).
        """
        start = from_words(vocabulary, length, ids, 1 if options.get("rank") else prompts, seed)
        return cls(length, vocabulary.shape[1], prompts=prompts, init=start, **options)

    def table(self) -> Tensor:
        """All prompts [N, P, d], made once whatever the batch."""
        table = self.prompt
        if self.reparameterise == "lstm":
            table = self.lstm(table)[0]
        if self.reparameterise is not None:
            table = self.mlp(table)
        return table * (self.task_columns @ self.task_rows) if self.rank else table

    def forward(
        self, ids: Tensor, vocab_weight: Tensor, *, index: Tensor | None = None, mask: Tensor | None = None,
        where: str | Tensor | None = "front", padding: str = "right", scale: float | None = None,
        positions: Tensor | None = None, dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(embeddings [B, T + P, d], attention mask [B, T + P]).

        Args:
            ids: int64 [B, T].
            vocab_weight: the frozen embedding matrix [V, d].
            index: int64 [B], each sample's prompt; -1: none. Needed with several prompts.
            mask: [B, T], not 0 for a token.
            where, padding: see `functional.place_prompt`. None: a template; `ids` already hold the soft tokens -(j + 1), and
                nothing is inserted.
            scale, positions, dtype: see `functional.soft_gather`.
        """
        if index is None and self.prompts > 1:
            raise bad("index", f"each sample's prompt, for {self.prompts} prompts", None)
        sizes = self.sizes
        if where is None:
            seen = ids != functional.PADDING if mask is None else mask
        else:
            lengths = sizes
            if sizes is not None:
                lengths = sizes.expand(len(ids)) if index is None else sizes[index.clamp(0, self.prompts - 1)]
            if index is not None:
                lengths = torch.where(index < 0, 0, self.length if lengths is None else lengths)
            ids, seen = functional.place_prompt(ids, self.length, where, mask=mask, lengths=lengths, padding=padding)
            sizes = None  # what a prompt has not was not placed
        rows = functional.soft_gather(
            ids, vocab_weight.detach(), self.table(), prompt_index=index, soft_lengths=sizes, scale=scale, positions=positions,
            dtype=dtype,
        )  # fmt: skip
        return rows, seen


class TrainableTokens(_OnEmbeddings):
    """Some words of a frozen vocabulary are trained: out[b, t] = rows[j] where ids[b, t] is the j-th of them.

    Neither the vocabulary [V, d] nor its gradient is ever copied: K rows are stored, read and trained. Used for new special
    tokens, and for words that a prompt leans on (as PEFT's TRAINABLE_TOKENS).

    Args:
        ids: the K words, each once. They are kept in rising order.
        width: d.
        init: "normal" (standard deviation 1), "uniform" (in [-0.5, 0.5]), or a tensor [K, d] in the order of `ids`.
            `from_vocabulary` starts from the words' own rows, which changes nothing at first.

    Attributes:
        rows: Parameter [K, d].

    Raises:
        ValueError: a word twice, a negative one, none, or a tensor that does not fit.
    """

    trained: Tensor

    def __init__(self, ids: Sequence[int] | Tensor, width: int, *, init: str | Tensor = "normal") -> None:
        super().__init__()
        check_sizes(width=width)
        given = torch.as_tensor(ids, dtype=torch.int64, device="cpu").flatten()
        trained, order = given.sort()
        if not len(given) or int(trained[0]) < 0 or bool((trained.diff() == 0).any()):
            raise bad("ids", "at least one word, each once, none negative", given[:8].tolist())
        self.ids, self.width = trained.tolist(), width
        self.register_buffer("trained", trained, persistent=False)
        if isinstance(init, str):
            self.init = one_of("init", init, ("normal", "uniform"))
        elif init.dim() == 2 and len(init) == len(order):
            init = init[order.to(init.device)]
        self.rows = nn.Parameter(_started((1, len(given), width), init).detach()[0])

    @classmethod
    def from_vocabulary(cls, vocabulary: Tensor, ids: Sequence[int] | Tensor) -> TrainableTokens:
        """Starts from the words' own rows of an embedding matrix [V, d]."""
        rows = check_vocabulary(vocabulary, ids)
        return cls(rows, vocabulary.shape[1], init=vocabulary.detach()[rows.to(vocabulary.device)])

    def forward(
        self, ids: Tensor, vocab_weight: Tensor, *, scale: float | None = None, positions: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """int64 [B, T] and the frozen [V, d] -> [B, T, d]; the options of `functional.soft_gather`."""
        return functional.soft_gather(
            functional.soft_ids(ids, self.trained),
            vocab_weight.detach(),
            self.rows,
            scale=scale,
            positions=positions,
            dtype=dtype,
        )


class EmbeddingMap(_OnEmbeddings):
    """A new vocabulary whose words are weighted sums of a frozen model's words: table = weight @ vocabulary.

    R2DL (Vinod et al. 2020, arXiv 2012.03460) with a sparse map; Melnyk et al. 2023 (arXiv 2210.07144) with a dense one; with a
    temperature, one source word for each new one by Gumbel-softmax, as Neekhara et al. 2019 (arXiv 1809.01829) have it.

    Args:
        targets, sources: V_T, the new words, and V, the frozen model's.
        k: source words that each new word is made of, drawn by the seed. Default: all, a dense map.
        temperature: draws a source word for each new one while training, the likeliest otherwise. Dense only.
        seed: of the drawn source words.

    Attributes:
        weight: Parameter [V_T, V] or [V_T, k], normal, so that new rows start about as long as the frozen ones.
        source: buffer int64 [V_T, k], with k.

    Raises:
        ValueError: a size below 1, k above V, or a temperature that has no meaning.
    """

    source: Tensor | None

    def __init__(
        self, targets: int, sources: int, *, k: int | None = None, temperature: float | None = None, seed: int = 0
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(targets=targets, sources=sources, k=k)
        if k is not None and k > sources:
            raise bad("k", f"at most {sources}, the number of source words", k)
        if temperature is not None and (k is not None or not temperature > 0):
            raise bad("temperature", "a positive number, and k=None", temperature)
        self.targets, self.sources, self.k, self.temperature, self.seed = targets, sources, k, temperature, seed
        if k is None:
            self.weight = nn.Parameter(torch.randn(targets, sources) * sources**-0.5)
            self.register_buffer("source", None)
        else:
            generator = torch.Generator().manual_seed(seed)
            drawn = [torch.randperm(sources, generator=generator)[:k] for _ in range(targets)]
            self.weight = nn.Parameter(torch.randn(targets, k) * k**-0.5)
            self.register_buffer("source", torch.stack(drawn))

    def table(self, vocab_weight: Tensor) -> Tensor:
        """The new vocabulary [V_T, d], made once whatever the batch."""
        vocab = vocab_weight.detach()
        if self.temperature is None:
            return functional.map_vocabulary(self.weight, vocab, self.source)
        if self.training:
            return functional.map_vocabulary(F.gumbel_softmax(self.weight, self.temperature), vocab)
        return vocab.index_select(0, self.weight.argmax(1))

    def forward(
        self, ids: Tensor, vocab_weight: Tensor, *, scale: float | None = None, positions: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """New words int64 [B, T] and the frozen [V, d] -> [B, T, d]; the options of `functional.soft_gather`.

        `functional.PADDING` gives a row of 0.
        """
        check_range("ids", ids.flatten(), self.targets, ignored=functional.PADDING)
        placed = torch.where(ids < 0, ids, -1 - ids)
        wrong = (ids < 0) & (ids != functional.PADDING)
        placed = placed.masked_fill(wrong, torch.iinfo(torch.int64).max)
        return functional.soft_gather(
            placed, vocab_weight.detach(), self.table(vocab_weight), scale=scale, positions=positions, dtype=dtype
        )


class PrototypeAttention(_OnEmbeddings):
    """Patches of another modality, told in a language model's words: each attends to prototypes of its vocabulary.

        prototypes = W vocabulary + b                                                    [V', d], made once for a batch
        out = softmax(Q K^T / sqrt(D)) V Wo,   Q from the patches, K and V from the prototypes, in heads of D

    Time-LLM (Jin et al. 2024, arXiv 2310.01728). The samples share keys and values, so all patches of a batch are the queries
    of one attention.

    Args:
        in_width: of the patches.
        width: d, of the frozen model.
        words: V, of its vocabulary.
        prototypes: V'.
        heads: H.
        head_width: D. Default: in_width / H, at least 1.
        dropout: on attention weights while training.

    Attributes:
        words_map: Linear(V, V'); query, key, value, out: the projections.

    Raises:
        ValueError: a size below 1, or a dropout that is no probability.
    """

    def __init__(
        self, in_width: int, width: int, words: int, *, prototypes: int = 1000, heads: int = 8, head_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        check_sizes(in_width=in_width, width=width, words=words, prototypes=prototypes, heads=heads, head_width=head_width)
        if not 0 <= dropout < 1:
            raise bad("dropout", "a probability below 1", dropout)
        self.in_width, self.width, self.words, self.prototypes = in_width, width, words, prototypes
        self.heads, self.head_width, self.dropout = heads, head_width, dropout
        inner = heads * (head_width or max(in_width // heads, 1))
        self.words_map = nn.Linear(words, prototypes)
        self.query, self.out = nn.Linear(in_width, inner), nn.Linear(inner, width)
        self.key, self.value = nn.Linear(width, inner), nn.Linear(width, inner)

    def table(self, vocab_weight: Tensor) -> Tensor:
        """The prototypes [V', d] of a frozen [V, d]."""
        if vocab_weight.shape != (self.words, self.width):
            raise bad("vocab_weight", f"[{self.words}, {self.width}]", list(vocab_weight.shape))
        return functional.map_vocabulary(self.words_map.weight, vocab_weight.detach()) + self.words_map.bias[:, None]

    def forward(self, patches: Tensor, vocab_weight: Tensor | None = None, *, prototypes: Tensor | None = None) -> Tensor:
        """[B, L, in_width] -> [B, L, d], from the frozen vocabulary or, where nothing trains, from a `table` made before."""
        if patches.dim() != 3 or patches.shape[2] != self.in_width:
            raise bad("patches", f"[B, L, {self.in_width}]", list(patches.shape))
        if (vocab_weight is None) == (prototypes is None):
            raise bad("vocab_weight, prototypes", "one of them", "both" if prototypes is not None else "neither")
        table = self.table(vocab_weight) if vocab_weight is not None else prototypes
        batch, length, _ = patches.shape
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]
            for part in (self.query(patches.flatten(0, 1)), self.key(table), self.value(table))
        )
        seen = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        return self.out(seen[0].transpose(0, 1).flatten(1)).view(batch, length, self.width)
