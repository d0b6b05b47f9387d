"""PEFT: its models on this package's path, and its adapters as this package's prompts.

fast = accelerate(peft_model)          the same API and trained tensors, logits, loss and gradients
fast.restore()                         PEFT's own path again
prompt, config = load_peft(folder)     adapter_config.json and adapter_model.safetensors
save_peft(folder, prompt, config)      the same two files
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from fastprompt import checkpoint
from fastprompt.checkpoint import CheckpointError
from fastprompt.functional.checks import bad, one_of
from fastprompt.hoist import Inexact, Reading, Wiring
from fastprompt.nn import PrefixKV, SoftPrompt

CONFIG, PAYLOAD, KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
_FILES = ("PROMPT_TUNING", "P_TUNING", *_PREFIXES)
_KINDS = (*_FILES, "MULTITASK_PROMPT_TUNING")
_PAIRS = (
    "in an encoder a prompt's rows depend on each sample, and the decoder reads them, so there is nothing to make once",
    "there PEFT gives layer i of the decoder's L layers the trained keys and values 2i mod L, so of an even L half are never "
    'read; attach a PrefixKV with part="decoder"',
)


# ---- Models ----


def accelerate(peft_model: nn.Module, *, logits: str = "all") -> Accelerated:
    """Runs a PEFT model of a prompt learning type on this package's path, in place, until `restore`.

    The types: PROMPT_TUNING (arXiv 2104.08691), P_TUNING (2103.10385), MULTITASK_PROMPT_TUNING (2303.02861), PREFIX_TUNING
    (2101.00190) and CARTRIDGE (2506.06266). PEFT puts a prompt's rows, or a prefix's keys and values, into every sample; here
    they are made once a call (once a task that the batch names). Calls with `adapter_names=[...]`, which PEFT ignores for
    these types, give each sample its own adapter. `position_ids` are kept, which PEFT drops for prompts; gradient
    checkpointing, a static cache and `torch.compile(fullgraph=True)` work. A returned cache holds the samples' tokens alone.

    Args:
        peft_model: a `PeftModelForCausalLM`; with PREFIX_TUNING or CARTRIDGE also one for sequence or token classification.
            None for SEQ_2_SEQ_LM: the refusal says why.
        logits: which rows of a causal model meet its head. "all": as PEFT has it, [B, P + T, V] with a prompt. "own": without
            the prompt's, [B, T, V]. "labelled": with `labels`, only the n rows that one of them is for, [n, V] in reading
            order: the same loss and gradients without the largest tensor of a step. Finding them costs a sync on a GPU.

    Raises:
        TypeError: not such a model. Inexact (a ValueError): what cannot be done exactly, such as dropout that is active.
        ValueError: adapters that do not fit the model.
    """
    return Accelerated(peft_model, logits)


class Accelerated:
    """What `accelerate` did; `restore` undoes it."""

    def __init__(self, peft_model: Any, logits: str) -> None:
        try:
            import peft
        except ImportError as missing:
            raise RuntimeError("accelerate needs peft, which is not installed") from missing
        if not isinstance(peft_model, peft.PeftModel):
            raise TypeError(f"peft_model: expected a model of peft, got {type(peft_model).__name__}")
        if isinstance(getattr(peft_model.forward, "__self__", None), Accelerated):
            raise bad("peft_model", "one as peft made it; call restore() first", "one that is accelerated")
        self.model, self.logits = peft_model, one_of("logits", logits, ("all", "own", "labelled"))
        for name in peft_model.peft_config:
            self._kind(name)
        self._wiring = Wiring(peft_model.get_base_model())
        for name in peft_model.peft_config:
            self._fit(name)
        self._source: Callable[[dict[str, Any]], Reading] | None = None
        self._wanted: tuple[Any, Any] | None = None  # the rows that the head gets
        self._hooks, head = ExitStack(), peft_model.get_base_model().get_output_embeddings()
        if head is None and logits == "labelled":
            raise bad("logits", "all or own: the model names no output embeddings", repr(logits))
        self._hooks.enter_context(self._wiring.reading(lambda kwargs: None if self._source is None else self._source(kwargs)))
        if head is not None:
            self._hooks.callback(head.register_forward_pre_hook(self._before_head).remove)
        peft_model.forward, peft_model.generate = self._forward, self._generate

    def restore(self) -> nn.Module:
        """PEFT's own path again."""
        del self.model.forward, self.model.generate
        self._hooks.close()
        self._wiring.restore()
        return self.model

    def __deepcopy__(self, memo: Any) -> Any:
        raise bad("peft_model", "one as peft made it, for copying; call restore() first", "one that is accelerated")

    def __repr__(self) -> str:
        kinds = ", ".join(f"{name}: {self._kind(name)}" for name in self.model.peft_config)
        return f"{type(self.model).__name__} accelerated: {kinds}"

    def _kind(self, name: str) -> str:
        """The type of an adapter, refused unless it is one of ours."""
        config, model = self.model.peft_config[name], self.model
        kind, task = (str(getattr(value, "value", value)) for value in (config.peft_type, config.task_type))
        if kind not in _KINDS:
            raise Inexact(f"peft_model: expected adapters of type {', '.join(_KINDS)}, got {name} of type {kind}")
        tasks = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS") if kind in _PREFIXES else ("CAUSAL_LM",)
        if task == "SEQ_2_SEQ_LM":
            raise Inexact(
                f"peft_model: expected {kind} for {', '.join(tasks)}, got {name} for {task}; {_PAIRS[kind in _PREFIXES]}"
            )
        if task not in tasks:
            why = "" if kind in _PREFIXES else "; elsewhere a prompt depends on each sample"
            raise Inexact(f"peft_model: expected {kind} for {', '.join(tasks)}, got {name} for {task}{why}")
        base = model.get_base_model().config.model_type
        if kind in _PREFIXES and base in ("bloom", "gpt_bigcode"):
            raise Inexact(f"peft_model: expected keys and values as [B, H, T, D], got a model of type {base}")
        return kind

    def _fit(self, name: str) -> None:
        """Refuses an adapter of another model."""
        config, wiring = self.model.peft_config[name], self._wiring
        found: tuple[int, ...]
        wanted: tuple[int, ...]
        if self._kind(name) not in _PREFIXES:
            found, wanted = (config.token_dim,), (self.model.word_embeddings.weight.shape[1],)
            what = "token_dim"
        else:
            found = (config.num_layers, config.num_attention_heads, config.token_dim // config.num_attention_heads)
            wanted = (len(wiring.blocks), wiring.kv_heads or found[1], wiring.head_dim or found[2])
            what = "layers, heads of keys and their width"
        if found != wanted:
            model = type(self.model.get_base_model()).__name__
            raise bad("peft_model", f"an adapter of this {model} ({what} {wanted})", f"{name} with {found}")

    def _use(self, names: Sequence[str] | None, tasks: Tensor | None, batch: int) -> _Use:
        """Whose prompts the samples read."""
        known = self.model.peft_config
        if names is not None and len(names) != batch:
            raise bad("adapter_names", f"one for each of the {batch} samples", len(names))
        used = [self.model.active_adapter] if names is None else sorted(set(names))
        kinds = {self._kind(name) for name in used if name in known}
        if not set(used) <= set(known) or len({kind in _PREFIXES for kind in kinds}) > 1:
            raise bad("adapter_names", f"adapters of one kind among {', '.join(known)}", used)
        if "MULTITASK_PROMPT_TUNING" in kinds:
            if len(used) > 1:
                raise bad("adapter_names", "one adapter of MULTITASK_PROMPT_TUNING, whose tasks may differ", used)
            if tasks is None or tuple(tasks.shape) != (batch,):
                raise bad("task_ids", f"int64 [{batch}], each sample's task", None if tasks is None else list(tasks.shape))
            tasks, index = torch.unique(tasks.to(self.model.device), return_inverse=True)
            return _Use(used, index, tasks)
        if names is None:
            return _Use(used, None, None)
        return _Use(used, torch.tensor([used.index(name) for name in names], device=self.model.device), None)

    def _rows(self, name: str, tasks: Tensor | None) -> Tensor:
        """[1 or tasks, P, width] that an adapter trains, through its encoder once."""
        encoder, config = self.model.prompt_encoder[name], self.model.peft_config[name]
        if self._kind(name) == "CARTRIDGE":
            return encoder.weight[None]
        if config.inference_mode and tasks is None:
            return encoder.embedding.weight[None]
        ids = self.model.prompt_tokens[name][None].to(encoder.embedding.weight.device)[:, : config.num_virtual_tokens]
        return encoder(ids) if tasks is None else encoder(ids.expand(len(tasks), -1), tasks)

    def _read(self, use: _Use, model: nn.Module | None) -> tuple[Reading, Any]:
        """What the samples read, and for prompts `model`'s output at the prompts' rows."""
        wiring, config = self._wiring, self.model.peft_config[use.names[0]]
        rows = [self._rows(name, use.tasks).to(wiring.base.dtype) for name in use.names]
        counts = {part.shape[1] for part in rows}
        if len(counts) > 1:
            raise bad("adapter_names", "adapters with as many virtual tokens", sorted(counts))
        whole = torch.cat(rows)
        if self._kind(use.names[0]) not in _PREFIXES:
            prefix, out = wiring.shallow(whole, model)
            return Reading(prefix, use.place), out
        pairs = whole.unflatten(2, (config.num_layers, 2, config.num_attention_heads, -1)).permute(2, 3, 0, 4, 1, 5)
        return Reading([(k, v) for k, v in (layer.unbind(0) for layer in pairs.unbind(0))], use.place), None

    def _before_head(self, head: nn.Module, args: Any) -> Any:
        return None if self._wanted is None else (args[0][self._wanted], *args[1:])

    def _forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, task_ids: Tensor | None = None, adapter_names: Sequence[str] | None = None,
        **others: Any,
    ) -> Any:  # fmt: skip
        """As PEFT's forward, with the logits that `accelerate` was asked for."""
        base, given = self.model.get_base_model(), input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise bad("input_ids, inputs_embeds", "one of them", "neither")
        if output_attentions or output_hidden_states:
            raise bad("output_attentions, output_hidden_states", "False: the prompt's rows are not in every sample", True)
        use, kept = self._use(adapter_names, task_ids, len(given)), others.get("logits_to_keep", 0)
        prompted, whole = self._kind(use.names[0]) not in _PREFIXES, isinstance(kept, int) and kept == 0
        config = self.model.peft_config[use.names[0]]
        causal = str(getattr(config.task_type, "value", config.task_type)) == "CAUSAL_LM"
        if causal and labels is not None and not whole:
            raise bad("logits_to_keep", "0 with labels", kept)
        found = None
        if causal and labels is not None and self.logits == "labelled":
            found = _labelled(labels, others.get("ignore_index", -100), prompted)
        everything = self.logits == "all" and whole
        last = labels is not None and (found is None or len(found.starts) > 0)
        at_prompt: list[Tensor] = []

        def read(kwargs: dict[str, Any]) -> Reading:
            self._wanted = None if everything else (slice(None), slice(-1, None))
            reading, out = self._read(use, base if everything or last else None)
            at_prompt[:] = [] if out is None else [out.logits]
            self._wanted = None if found is None else found.rows
            return reading

        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {name: value for name, value in others.items() if value is not None}
        inputs["labels"] = None if prompted or found is not None else labels
        self._source = read
        try:
            out = base(**{name: value for name, value in inputs.items() if value is not None}, return_dict=True)
        finally:
            self._source = self._wanted = None
        rows = None
        if at_prompt:
            rows = at_prompt[0].expand(len(given), -1, -1) if use.place is None else at_prompt[0][use.place]
        if found is not None:
            own = out.logits if rows is None else torch.cat([rows[found.starts, -1], out.logits])
            self._lose(out, own[None], found.labels[None], others)
            out["logits"] = own[:-1]
        elif prompted and labels is not None:
            first = labels.new_full((len(labels), 1), others.get("ignore_index", -100))
            assert rows is not None
            self._lose(out, torch.cat([rows[:, -1:], out.logits], 1), torch.cat([first, labels], 1), others)
        if rows is not None and everything:
            out["logits"] = torch.cat([rows, out.logits], 1)
        as_dict = getattr(base.config, "return_dict", True) if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _lose(self, out: Any, logits: Tensor, labels: Tensor, others: dict[str, Any]) -> None:
        """The model's own loss, where a row's label is the next row's."""
        base = self.model.get_base_model()
        known = {name: value for name, value in others.items() if name in ("num_items_in_batch", "ignore_index")}
        out["loss"] = base.loss_function(logits=logits, labels=labels, vocab_size=base.config.vocab_size, **known)
        out.move_to_end("loss", last=False)

    def _generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, task_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As PEFT's generate, with any cache."""
        base = self.model.get_base_model()
        if self.model._adapters_disabled:
            return base.generate(*args, **kwargs)
        given = args[0] if args else next(kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if name in kwargs)
        use = self._use(adapter_names, task_ids, len(given))
        made: list[Reading] = []

        def make(call: dict[str, Any]) -> Reading:
            made[:] = [self._read(use, None)[0]]
            return made[0]

        def read(call: dict[str, Any]) -> Reading:
            rows = next(call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None)
            times = len(rows) // len(given)  # beams and repeated sequences
            return Reading(made[0].prefix, None if use.place is None else use.place.repeat_interleave(times))

        with torch.no_grad():
            self._wiring.run(make)
        self._source = read
        try:
            return base.generate(*args, **kwargs)
        finally:
            self._source = None


class _Use(NamedTuple):
    """Adapters in use, each sample's place among their prompts, and the tasks that a multitask adapter makes prompts for."""

    names: list[str]
    place: Tensor | None
    tasks: Tensor | None


class _Labelled(NamedTuple):
    """Where a label is for: samples whose first token has one (the prompt's last row says it), own rows (b, t) in reading
    order and any one more, and the labels one place later than their rows.
    """

    starts: Tensor
    rows: tuple[Tensor, Tensor]
    labels: Tensor


def _labelled(labels: Tensor, ignored: int, prompted: bool) -> _Labelled:
    known = labels.cpu()  # one sync instead of one for every size
    there = known != ignored
    starts = there[:, 0].nonzero()[:, 0] if prompted else there.new_empty(0, dtype=torch.int64)
    b, t = there[:, 1:].nonzero(as_tuple=True)
    one = torch.tensor([ignored])
    targets = torch.cat([one, known[starts, 0], known[b, t + 1]])
    zero, device = torch.zeros(1, dtype=torch.int64), labels.device
    rows = (torch.cat([b, zero]).to(device), torch.cat([t, zero]).to(device))
    return _Labelled(starts.to(device), rows, targets.to(device))


# ---- Adapters ----


def load_peft(folder: str | os.PathLike[str]) -> tuple[SoftPrompt | PrefixKV, dict[str, Any]]:
    """(prompt, configuration) of an adapter that PEFT saved, or `save_peft`: PROMPT_TUNING, P_TUNING, PREFIX_TUNING or
    CARTRIDGE (whose first tokens are `PrefixKV`'s frozen ones).

    P_TUNING and a reparameterised prefix are what their encoder gave, as PEFT saves them. Nothing in the folder is code.

    Raises:
        CheckpointError: another kind of folder or adapter, damage, tensors that do not fit the configuration.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG} and {PAYLOAD}, got no folder")
    config = _parsed(folder / CONFIG)
    kind = _check(config, folder / CONFIG)
    if not (folder / PAYLOAD).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
        got = f"{pickles[0]}, a pickle, which is never read" if pickles else "none"
        raise CheckpointError(f"{folder / PAYLOAD}: expected a safetensors file, got {got}")
    try:
        tensors = safetensors.torch.load((folder / PAYLOAD).read_bytes())
    except Exception as error:
        raise CheckpointError(f"{folder / PAYLOAD}: expected a safetensors file, got {error}") from error
    if set(tensors) != {KEY}:
        raise CheckpointError(f"{folder / PAYLOAD}: expected the tensor {KEY} alone, got {sorted(tensors)}")
    rows, tokens = tensors[KEY], config["num_virtual_tokens"]
    width = config["token_dim"] * (1 if kind not in _PREFIXES else 2 * config["num_layers"])
    if tuple(rows.shape) != (tokens, width) or not rows.is_floating_point():
        raise CheckpointError(f"{folder / PAYLOAD}: expected {KEY} [{tokens}, {width}], got {list(rows.shape)} {rows.dtype}")
    if kind not in _PREFIXES:
        prompt: SoftPrompt | PrefixKV = SoftPrompt(tokens, width, init=rows)
    else:
        frozen = config["num_frozen_tokens"] if kind == "CARTRIDGE" else 0
        prompt = PrefixKV.from_flat(rows, config["num_layers"], config["num_attention_heads"], frozen=frozen)
    return prompt.to(rows.dtype), config


def save_peft(
    folder: str | os.PathLike[str], prompt: SoftPrompt | PrefixKV, config: Mapping[str, Any] | None = None, *,
    base_model: str | None = None, task_type: str = "CAUSAL_LM",
) -> None:  # fmt: skip
    """Writes a prompt as PEFT saves one; what `load_peft` gave is written back byte for byte.

    Args:
        folder: made if it is not there; files of a previous save survive a failure.
        prompt: one `SoftPrompt` or `PrefixKV`; a reparameterised one as its reparameterisation gives it.
        config: what `load_peft` gave. Default: made from the prompt. Grouped queries need nothing: PEFT too counts the heads
            of keys (num_attention_heads) and their width (token_dim).
        base_model: the model's name or path, for PEFT.
        task_type: PEFT's, such as "CAUSAL_LM" or "SEQ_CLS".
    """
    if not isinstance(prompt, (SoftPrompt, PrefixKV)):
        raise TypeError(f"prompt: expected a SoftPrompt or PrefixKV, got {type(prompt).__name__}")
    if prompt.prompts != 1:
        raise bad("prompt", "one prompt, as an adapter of PEFT holds", f"{prompt.prompts}")
    rows = prompt().detach()[0] if isinstance(prompt, SoftPrompt) else prompt.flat().detach()
    made = {"num_virtual_tokens": prompt.length, "token_dim": rows.shape[1], "peft_type": "PROMPT_TUNING"}
    if isinstance(prompt, PrefixKV):
        made = {"num_virtual_tokens": prompt.length, "peft_type": "PREFIX_TUNING", "num_layers": prompt.layers}
        if prompt.frozen or (config is not None and config.get("peft_type") == "CARTRIDGE"):
            made |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": prompt.frozen}
        made |= {"token_dim": prompt.kv_heads * prompt.head_dim, "num_attention_heads": prompt.kv_heads}
    if config is None:
        common = {"base_model_name_or_path": base_model, "inference_mode": True, "num_transformer_submodules": 1}
        config = {**common, "auto_mapping": None, "task_type": task_type, **made}
    else:
        wrong = {name: config.get(name) for name in made if name != "peft_type" and config.get(name) != made[name]}
        if wrong or (config.get("peft_type") in _PREFIXES) != isinstance(prompt, PrefixKV):
            raise bad("config", f"that of this prompt, {made}", wrong or config.get("peft_type"))
    _check(config, "config")
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    payload = safetensors.torch.save({KEY: rows.cpu().contiguous()}, {"format": "pt"})
    checkpoint.write(Path(folder), {PAYLOAD: payload, CONFIG: text})


def _parsed(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > 1 << 20:
        raise CheckpointError(f"{path}: expected a JSON file of at most 1 MB, got {'more' if path.is_file() else 'none'}")
    try:
        config = json.loads(path.read_bytes(), object_pairs_hook=checkpoint.no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _check(config: Mapping[str, Any], where: object) -> str:
    """The type of an adapter, after everything in its configuration that this package relies on."""
    kind = config.get("peft_type")
    if kind not in _FILES:
        raise CheckpointError(f"{where}: expected peft_type {', '.join(_FILES)}, got {kind!r}")
    if config.get("auto_mapping") is not None:
        got = str(config["auto_mapping"])[:80]
        raise CheckpointError(f"{where}: expected no auto_mapping, which names a class to import (set a task_type), got {got}")
    if config.get("num_transformer_submodules") not in (None, 1):
        got = config["num_transformer_submodules"]
        raise CheckpointError(f"{where}: expected num_transformer_submodules 1 (no encoder-decoder), got {got!r}")
    if config.get("modules_to_save"):
        raise CheckpointError(f"{where}: expected no modules_to_save, got {config['modules_to_save']!r}")
    names = ("num_virtual_tokens", "token_dim") + (("num_layers", "num_attention_heads") if kind in _PREFIXES else ())
    for name in names:
        size = config.get(name)
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 31:
            raise CheckpointError(f"{where}: expected {name} as a positive number, got {size!r}")
    if kind in _PREFIXES and config["token_dim"] % config["num_attention_heads"]:
        got = f"{config['token_dim']} for {config['num_attention_heads']}"
        raise CheckpointError(f"{where}: expected token_dim as a multiple of num_attention_heads, got {got}")
    if kind == "CARTRIDGE":
        frozen, tokens = config.get("num_frozen_tokens"), config["num_virtual_tokens"]
        if isinstance(frozen, bool) or not isinstance(frozen, int) or not 0 <= frozen < tokens:
            raise CheckpointError(f"{where}: expected num_frozen_tokens from 0 to {tokens - 1}, got {frozen!r}")
    return kind
