"""State dicts of modules: restored after a forward pass, and loaded from a checkpoint."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from cnn.errors import Refused
from cnn.utils.checkpoint import clone_tree


@contextlib.contextmanager
def state_preserved(*modules: nn.Module) -> Iterator[None]:
    """Restores the state dicts of modules at the end of a `with` block.

    The state dicts are restored even after an exception. A forward pass in the block can change
    buffers, even in evaluation mode. Parameters that a lazy layer creates in the block are kept.

    Args:
        modules: the modules, which are changed in place.

    Raises:
        Refused: a module has changed so much that the earlier state dict cannot be loaded.
    """
    saved = [
        {k: clone_tree(v, None) for k, v in module.state_dict().items() if not is_lazy(v)}
        for module in modules
    ]
    try:
        yield
    finally:
        for module, state in zip(modules, saved):
            try:
                load_state(module, state, strict=False)
            except RuntimeError as error:
                fault = "what its forward pass changes can neither be put back nor be resumed"
                reason = str(error).splitlines()[-1].strip()
                raise Refused(f"{type(module).__name__}: {fault}: {reason}") from None


def load_state(module: nn.Module, state: dict[str, Any], *, strict: bool = True) -> None:
    """Loads a state dict into a module, and ignores PyTorch's version numbers.

    PyTorch converts a state dict without version numbers, as if the state dict were old. The
    checkpoints of this project have no version numbers, but are not old. Therefore, the function
    assumes the current version of every submodule.

    Args:
        module: the module, which is changed in place.
        state: the state dict.
        strict: whether missing and unexpected keys are errors, as in `nn.Module.load_state_dict`.

    Raises:
        RuntimeError: the state dict does not fit the module.
    """
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata
    module.load_state_dict(versioned, strict=strict)
