"""A model's modules and weights as they are now, walked over in one pass.

`nn.Module.modules()` and `.parameters()` make a generator for every module and sort names out: on a
GPU that has nothing to do meanwhile, deep models make that felt.
"""

from __future__ import annotations

from torch import Tensor, nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The model and all modules in it, each once."""
    found = {model: None}
    new = [model]
    while new:
        module = new.pop()
        for child in module._modules.values():
            if child is not None and child not in found:
                found[child] = None
                new.append(child)
    return list(found)


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Its parameters; one that several modules hold comes as often."""
    return [
        parameter
        for module in modules_of(model)
        for parameter in module._parameters.values()
        if parameter is not None
    ]


def set_training(model: nn.Module, on: bool) -> None:
    """Put a policy or a critic into training mode if it then recomputes activations, which is all
    that hangs on it there; out of training mode otherwise.
    """
    modules = modules_of(model)
    recomputes = on and any(vars(m).get("gradient_checkpointing") for m in modules)
    if recomputes or any(m.training for m in modules):
        model.train(recomputes)
