"""Run a callback once a module has been imported, now or later (as `wrapt.when_imported` does)."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def when_imported(module_name: str, callback: Callable[[], None]) -> None:
    """Calls `callback` at once if `module_name` is imported already, else right after its first import."""
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
