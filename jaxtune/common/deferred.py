"""Modules that are imported by others and seldom used: loaded at the first use of what they hold."""

import importlib.util
import sys
import threading
import types

_LOADING = threading.RLock()


def defer(name: str) -> None:
    """Lets `import NAME` succeed at once; the module is executed when something of it, or a part of it, is asked for.

    Nothing happens where the module is not installed or already imported.

    Args:
      name: of a top-level module.
    """
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None or spec.loader is None:
        return
    module = _Deferred(name)
    module.__spec__, module.__loader__, module.__package__ = spec, spec.loader, name
    if spec.origin:
        module.__file__ = spec.origin
    sys.modules[name] = module


class _Deferred(types.ModuleType):
    """A module that executes itself when it is asked for what it has not yet; then it is an ordinary one."""

    def __getattr__(self, name: str) -> object:
        # `__path__` is what an import of a part asks for; other names of this kind are asked of every module that is
        # loaded (by inspect, by warnings), and are no use of it.
        if name.startswith('__') and name.endswith('__') and name != '__path__':
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')
        with _LOADING:
            if '__path__' not in self.__dict__:
                _execute(self)
        return types.ModuleType.__getattribute__(self, name)


def _execute(module: _Deferred) -> None:
    spec = module.__spec__
    assert spec is not None
    assert spec.loader is not None  # `defer` has looked
    module.__path__ = spec.submodule_search_locations or []
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del module.__path__
        raise
    object.__setattr__(module, '__class__', types.ModuleType)
