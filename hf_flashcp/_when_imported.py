"""Runs a callback as soon as a given module has been imported (like `wrapt.when_imported`)."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def when_imported(module_name: str, callback: Callable[[], None]) -> None:
    """Call `callback` immediately if `module_name` is already imported, otherwise right after its first import."""
    if module_name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _CallAfterImport(module_name, callback))


class _CallAfterImport(MetaPathFinder):
    def __init__(self, module_name: str, callback: Callable[[], None]):
        self.module_name = module_name
        self.callback = callback

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.callback()

        spec.loader.exec_module = exec_module
        return spec
