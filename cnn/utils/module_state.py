"""Modules that are run, and left as they were; and the way from a checkpoint into a module."""

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
    """Puts back what the modules' state dicts held, however the context ends.

    A forward pass may move a buffer, in evaluation too. What is made in the context, such as the
    weights of a lazy layer, stays.
    """
    held = [
        {
            key: clone_tree(value, None)
            for key, value in module.state_dict().items()
            if not is_lazy(value)
        }
        for module in modules
    ]
    try:
        yield
    finally:
        for module, state in zip(modules, held):
            try:
                load_state(module, state, strict=False)
            except RuntimeError as error:
                raise Refused(
                    f"{type(module).__name__}: what its forward pass changes can neither be put back nor"
                    f" be resumed: {str(error).splitlines()[-1].strip()}"
                ) from None


def load_state(module: nn.Module, state: dict[str, Any], *, strict: bool = True) -> None:
    """Loads a plain dict, which holds no versions of modules: they are taken for today's."""
    whole = OrderedDict(state)
    whole._metadata = module.state_dict()._metadata
    module.load_state_dict(whole, strict=strict)
