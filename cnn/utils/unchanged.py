"""Modules that are run, and left as they were."""

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parameter import is_lazy

from cnn.utils.checkpoint import snapshot


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Puts back what the modules' state dicts held, however the context ends.

    A forward pass may move a buffer, in evaluation too. What is made in the context, such as the
    weights of a lazy layer, stays.
    """
    held = [
        {
            key: snapshot(value, None)
            for key, value in module.state_dict().items()
            if not is_lazy(value)
        }
        for module in modules
    ]
    try:
        yield
    finally:
        for module, state in zip(modules, held):
            module.load_state_dict(state, strict=False)
