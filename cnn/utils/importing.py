"""Importing: the user's own objects, named as package.module:name, and large packages."""

import contextlib
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cnn.errors import Refused

OURS = ("cnn", "train", "evaluate", "predict", "export", "compare", "sweep", "tests", "bench")


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """For imports of large packages: what they make stays, so looking for garbage is in vain.

    A quarter of the time that torch takes goes into that.
    """
    was_enabled, is_rank0 = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        if is_rank0:
            gc.freeze()  # nor is it looked through later, at every full collection


def outside_code(path: str) -> bool:
    """Whether `package.module:name` is code from elsewhere than the user's current folder.

    Looks where the module would come from, and imports nothing.
    """
    top = path.partition(":")[0].partition(".")[0]
    _search_here()
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return True
    if spec is None:
        return False  # nowhere: import_object will say so
    if top in sys.stdlib_module_names or top in OURS:
        return True
    places = list(spec.submodule_search_locations or ())
    if spec.has_location:
        places.append(spec.origin)
    return not places or any(
        not Path(place).resolve().is_relative_to(Path.cwd()) or "site-packages" in place
        for place in places
    )


def _search_here() -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def import_object(path: str, key: str) -> Any:
    """Imports what `package.module:name` names; the current folder is searched too.

    Args:
        path: the name.
        key: the setting that holds it, for the message.

    Raises:
        Refused: the module or the name is not there.
    """
    module_name, _, name = path.partition(":")
    _search_here()
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
