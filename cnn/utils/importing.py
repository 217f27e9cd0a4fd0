"""Objects of the user's own, named in the configuration as package.module:name."""

import importlib
import os
import sys
from typing import Any

from cnn.config import Refused


def import_object(path: str, key: str) -> Any:
    """Imports what `package.module:name` names; the current folder is searched too.

    Args:
        path: the name.
        key: the setting that holds it, for the message.

    Raises:
        Refused: the module or the name is not there.
    """
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the module is there; something that it imports is not
        raise Refused(
            f"{key}: expected package.module:name of Python code, got {path}: no module"
            f" {error.name!r} in {os.getcwd()} or on the Python path"
        ) from None
    if not hasattr(module, name):
        raise Refused(
            f"{key}: the module {module_name} ({getattr(module, '__file__', 'built in')}) has no {name!r}"
        )
    return getattr(module, name)
