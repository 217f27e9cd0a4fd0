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
    """Restores the state dicts of the modules at the end of the block, however it ends.

    A forward pass may change buffers, even in evaluation mode. Parameters that a lazy layer creates
    in the block stay.

    Raises:
        Refused: a module changed in a way that its state dict cannot restore.
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
                raise Refused(
                    f"{type(module).__name__}: what its forward pass changes can neither be put"
                    f" back nor be resumed: {str(error).splitlines()[-1].strip()}"
                ) from None


def load_state(module: nn.Module, state: dict[str, Any], *, strict: bool = True) -> None:
    """Loads a state dict without the version numbers of its modules, assuming today's versions."""
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata
    module.load_state_dict(versioned, strict=strict)
