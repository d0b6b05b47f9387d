"""PEFT: its models on this package's path, and its adapters as this package's prompts.

fast = accelerate(peft_model)          the same API and trained tensors, logits, loss and gradients
fast.restore()                         PEFT's own path again
prompt, config = load_peft(folder)     adapter_config.json and adapter_model.safetensors
save_peft(folder, prompt, config)      the same two files
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastprompt import checkpoint
from fastprompt.checkpoint import CheckpointError
from fastprompt.functional.checks import bad
from fastprompt.hoist import Inexact, Reading, Wiring
from fastprompt.nn import PrefixKV, SoftPrompt

CONFIG, PAYLOAD, KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
_KINDS = (*_PROMPTS, "PREFIX_TUNING")


# ---- Models ----


def accelerate(peft_model: nn.Module, *, prompt_logits: bool = True) -> Accelerated:
    """Runs a PEFT model of type PROMPT_TUNING, P_TUNING or PREFIX_TUNING on this package's path, in place.

    PEFT puts a prompt's rows, or a prefix's keys and values, into every sample; here they are made once a call. Calls with
    `adapter_names=[...]`, which PEFT ignores for these types, give each sample its own adapter. `position_ids` are kept,
    which PEFT drops for prompts; gradient checkpointing and a static cache work. A returned cache holds the samples' tokens
    alone.

    Args:
        peft_model: a `PeftModelForCausalLM`; with PREFIX_TUNING also one for sequence or token classification.
        prompt_logits: False leaves out the logits at the prompt's own rows, [B, P, V], which PEFT returns in front.

    Raises:
        TypeError: not such a model. Inexact (a ValueError): what cannot be done exactly, such as dropout that is active.
    """
    return Accelerated(peft_model, prompt_logits)


class Accelerated:
    """What `accelerate` did; `restore` undoes it."""

    def __init__(self, peft_model: Any, prompt_logits: bool) -> None:
        try:
            import peft
        except ImportError as missing:
            raise RuntimeError("accelerate needs peft, which is not installed") from missing
        if not isinstance(peft_model, peft.PeftModel):
            raise TypeError(f"peft_model: expected a model of peft, got {type(peft_model).__name__}")
        if isinstance(getattr(peft_model.forward, "__self__", None), Accelerated):
            raise bad("peft_model", "one as peft made it; call restore() first", "one that is accelerated")
        self.model, self.prompt_logits = peft_model, prompt_logits
        for name in peft_model.peft_config:
            self._config(name)
        self._wiring = Wiring(peft_model.get_base_model())
        peft_model.forward, peft_model.generate = self._forward, self._generate

    def restore(self) -> nn.Module:
        """PEFT's own path again."""
        del self.model.forward, self.model.generate
        self._wiring.restore()
        return self.model

    def __repr__(self) -> str:
        kinds = {name: self._config(name)[0] for name in self.model.peft_config}
        return f"{type(self.model).__name__} accelerated: {', '.join(f'{name}: {kind}' for name, kind in kinds.items())}"

    def _config(self, name: str) -> tuple[str, Any]:
        """(type, configuration) of an adapter, refused unless it is one of the three."""
        config, model = self.model.peft_config[name], self.model
        kind, task = (str(getattr(value, "value", value)) for value in (config.peft_type, config.task_type))
        if kind not in _KINDS:
            raise Inexact(f"peft_model: expected adapters of type {', '.join(_KINDS)}, got {name} of type {kind}")
        tasks = ("CAUSAL_LM",) if kind in _PROMPTS else ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")
        if task not in tasks:
            why = "; elsewhere a prompt depends on each sample" if kind in _PROMPTS else ""
            raise Inexact(f"peft_model: expected {kind} for {', '.join(tasks)}, got {name} for {task}{why}")
        base = model.get_base_model().config.model_type
        if kind == "PREFIX_TUNING" and base in ("bloom", "gpt_bigcode"):
            raise Inexact(f"peft_model: expected keys and values as [B, H, T, D], got a model of type {base}")
        return kind, config

    def _adapters(self, names: Sequence[str] | None, batch: int) -> tuple[list[str], Tensor | None]:
        """(the adapters in use, each sample's place among them)."""
        if names is None:
            return [self.model.active_adapter], None
        if len(names) != batch:
            raise bad("adapter_names", f"one for each of the {batch} samples", len(names))
        used = sorted(set(names))
        unknown = [name for name in used if name not in self.model.peft_config]
        if unknown or len({self._config(name)[0] in _PROMPTS for name in used}) > 1:
            raise bad("adapter_names", f"adapters of one kind among {', '.join(self.model.peft_config)}", used)
        return used, torch.tensor([used.index(name) for name in names], device=self.model.device)

    def _rows(self, name: str) -> Tensor:
        """[1, P, width] that an adapter trains, through its encoder once."""
        encoder, (_, config) = self.model.prompt_encoder[name], self._config(name)
        if config.inference_mode:
            return encoder.embedding.weight[None]
        ids = self.model.prompt_tokens[name][None].to(encoder.embedding.weight.device)
        return encoder(ids[:, : config.num_virtual_tokens])

    def _read(self, names: Sequence[str], index: Tensor | None) -> tuple[Reading, Any]:
        """What the samples read, and for prompts the model's output at the prompts' rows. Inside `attention`."""
        wiring, kind = self._wiring, self._config(names[0])[0]
        rows = [self._rows(name).to(wiring.base.dtype) for name in names]
        counts = {part.shape[1] for part in rows}
        if len(counts) > 1:
            raise bad("adapter_names", "adapters with as many virtual tokens", sorted(counts))
        whole = torch.cat(rows)
        if kind in _PROMPTS:
            prefix, out = wiring.shallow(whole, self.model.get_base_model())
            return Reading(prefix, index), out
        heads, layers = (getattr(self._config(names[0])[1], key) for key in ("num_attention_heads", "num_layers"))
        pairs = whole.unflatten(2, (layers, 2, heads, -1)).permute(2, 3, 0, 4, 1, 5)
        return Reading([(k, v) for k, v in (layer.unbind(0) for layer in pairs.unbind(0))], index), None

    def _forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, task_ids: Tensor | None = None, adapter_names: Sequence[str] | None = None,
        **others: Any,
    ) -> Any:  # fmt: skip
        """As PEFT's forward: logits [B, P + T, V] with a prompt, [B, T, V] with a prefix or `prompt_logits=False`."""
        base, given = self.model.get_base_model(), input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise bad("input_ids, inputs_embeds", "one of them", "neither")
        if output_attentions or output_hidden_states:
            raise bad("output_attentions, output_hidden_states", "False: the prompt's rows are not in every sample", True)
        names, index = self._adapters(adapter_names, len(given))
        at_prompt: list[Any] = []

        def read(kwargs: dict[str, Any]) -> Reading:
            reading, out = self._read(names, index)
            at_prompt[:] = [] if out is None else [out.logits]
            return reading

        prompted = self._config(names[0])[0] in _PROMPTS
        inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        inputs |= {name: value for name, value in others.items() if value is not None}
        inputs["labels"] = None if prompted else labels
        with self._wiring.reading(read):
            out = base(**{name: value for name, value in inputs.items() if value is not None}, return_dict=True)
        if prompted:
            self._join(base, out, at_prompt[0], index, labels, others)
        as_dict = getattr(base.config, "return_dict", True) if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _join(self, base: Any, out: Any, rows: Tensor, index: Tensor | None, labels: Tensor | None, others: Any) -> None:
        """The loss, which the prompt's last row has a share in, and the logits at the prompt's rows."""
        logits, kept = out.logits, others.get("logits_to_keep", 0)
        batch, whole = len(logits), bool(isinstance(kept, int) and kept == 0)
        rows = rows.expand(batch, -1, -1) if index is None else rows[index]
        if labels is not None:
            if not whole:
                raise bad("logits_to_keep", "0 with labels", kept)
            first = labels.new_full((batch, 1), -100)
            known = {name: value for name, value in others.items() if name in ("num_items_in_batch", "ignore_index")}
            out["loss"] = base.loss_function(
                logits=torch.cat([rows[:, -1:], logits], 1), labels=torch.cat([first, labels], 1),
                vocab_size=base.config.vocab_size, **known,
            )  # fmt: skip
            out.move_to_end("loss", last=False)
        if whole and self.prompt_logits:
            out["logits"] = torch.cat([rows, logits], 1)

    def _generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As PEFT's generate, with any cache."""
        base = self.model.get_base_model()
        if self.model._adapters_disabled:
            return base.generate(*args, **kwargs)
        given = args[0] if args else next(kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds") if name in kwargs)
        names, index = self._adapters(adapter_names, len(given))
        with torch.no_grad(), self._wiring.attention():
            reading, _ = self._read(names, index)

        def read(call: dict[str, Any]) -> Reading:
            rows = next(call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None)
            times = len(rows) // len(given)  # beams and repeated sequences
            return Reading(reading.prefix, None if index is None else index.repeat_interleave(times))

        with self._wiring.reading(read):
            return base.generate(*args, **kwargs)


# ---- Adapters ----


def load_peft(folder: str | os.PathLike[str]) -> tuple[SoftPrompt | PrefixKV, dict[str, Any]]:
    """(prompt, configuration) of an adapter that PEFT saved, or `save_peft`: PROMPT_TUNING, P_TUNING or PREFIX_TUNING.

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
    width = config["token_dim"] * (1 if kind in _PROMPTS else 2 * config["num_layers"])
    if tuple(rows.shape) != (tokens, width) or not rows.is_floating_point():
        raise CheckpointError(f"{folder / PAYLOAD}: expected {KEY} [{tokens}, {width}], got {list(rows.shape)} {rows.dtype}")
    if kind in _PROMPTS:
        prompt: SoftPrompt | PrefixKV = SoftPrompt(tokens, width, init=rows)
    else:
        prompt = PrefixKV.from_flat(rows, config["num_layers"], config["num_attention_heads"])
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
        made |= {"token_dim": prompt.kv_heads * prompt.head_dim, "num_attention_heads": prompt.kv_heads}
    if config is None:
        common = {"base_model_name_or_path": base_model, "inference_mode": True, "num_transformer_submodules": 1}
        config = {**common, "auto_mapping": None, "task_type": task_type, **made}
    else:
        wrong = {name: config.get(name) for name in made if name != "peft_type" and config.get(name) != made[name]}
        if wrong or (config.get("peft_type") == "PREFIX_TUNING") != isinstance(prompt, PrefixKV):
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
    if kind not in _KINDS:
        raise CheckpointError(f"{where}: expected peft_type {', '.join(_KINDS)}, got {kind!r}")
    if config.get("auto_mapping") is not None:
        got = str(config["auto_mapping"])[:80]
        raise CheckpointError(f"{where}: expected no auto_mapping, which names a class to import (set a task_type), got {got}")
    if config.get("num_transformer_submodules") not in (None, 1):
        got = config["num_transformer_submodules"]
        raise CheckpointError(f"{where}: expected num_transformer_submodules 1 (no encoder-decoder), got {got!r}")
    if config.get("modules_to_save"):
        raise CheckpointError(f"{where}: expected no modules_to_save, got {config['modules_to_save']!r}")
    names = ("num_virtual_tokens", "token_dim") + (("num_layers", "num_attention_heads") if kind == "PREFIX_TUNING" else ())
    for name in names:
        size = config.get(name)
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 1 << 31:
            raise CheckpointError(f"{where}: expected {name} as a positive number, got {size!r}")
    if kind == "PREFIX_TUNING" and config["token_dim"] % config["num_attention_heads"]:
        got = f"{config['token_dim']} for {config['num_attention_heads']}"
        raise CheckpointError(f"{where}: expected token_dim as a multiple of num_attention_heads, got {got}")
    return kind
