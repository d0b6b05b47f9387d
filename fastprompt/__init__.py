"""fastprompt: make a frozen PyTorch model do a new task, at the frozen model's own speed.

    import fastprompt
    prompt = fastprompt.nn.PaddedPrompt(canvas=224, image_size=32, mean=..., std=...)
    labels = fastprompt.nn.LabelMap(1000, 10, method="iterative")
    model = fastprompt.Reprogrammed(frozen, inputs=prompt, outputs=labels)
    fastprompt.fit(model, (images, targets), epochs=12)

`fastprompt.nn` has the modules, `fastprompt.functional` what they call, `fastprompt.taxonomy` where they lie.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastprompt import answers, clip, data, functional, hoist, instruction, nn, taxonomy
    from fastprompt.checkpoint import CheckpointError
    from fastprompt.integrations import attach
    from fastprompt.methods import build
    from fastprompt.profiling import profile
    from fastprompt.reprogram import Reprogrammed
    from fastprompt.training import evaluate, fit
    from fastprompt.warming import warmup

__all__ = [
    "CheckpointError",
    "Reprogrammed",
    "answers",
    "attach",
    "build",
    "clip",
    "data",
    "evaluate",
    "fit",
    "functional",
    "hoist",
    "instruction",
    "nn",
    "profile",
    "taxonomy",
    "warmup",
]

_HOMES = {
    "CheckpointError": "checkpoint",
    "Reprogrammed": "reprogram",
    "attach": "integrations",
    "build": "methods",
    "evaluate": "training",
    "fit": "training",
    "profile": "profiling",
    "warmup": "warming",
}


def __getattr__(name: str) -> Any:
    """Loads a public name on first use: `import fastprompt` alone costs nothing over torch."""
    if name not in __all__:
        raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
    module = import_module("fastprompt." + _HOMES.get(name, name))
    value = getattr(module, name) if name in _HOMES else module
    globals()[name] = value
    return value
