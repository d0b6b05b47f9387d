"""Prompts in models that exist already: where to attach, nothing else."""

from fastprompt.integrations.handle import Attached, attach

__all__ = ["Attached", "attach"]
