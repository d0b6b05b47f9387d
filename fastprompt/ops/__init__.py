"""Registered operators (`torch.ops.fastprompt.*`) and their `autograd.Function`s: schemas, implementations, fakes."""
