"""Make transformers know the quantization method "dqbart", without importing transformers.

transformers has no entry points for quantizers, so something has to run after its registry exists. `install`
registers at once if transformers is loaded already, and otherwise leaves a finder that runs once, right after
`transformers.quantizers.auto` was executed. `import dqbart` thus costs nothing, and
`AutoModelForSeq2SeqLM.from_pretrained` works whichever of the two is imported first.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register now or as soon as transformers' registry is imported. Calling it again does nothing."""
    if REGISTRY in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from dqbart.packed import plugin

    plugin.register()


class _Finder(MetaPathFinder):
    """Finds one module as the other finders would, and adds a step after its execution."""

    searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY or self.searching:
            return None
        self.searching = True  # for the search below this finder isn't there
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, inner: Loader, finder: _Finder) -> None:
        self.inner, self.finder = inner, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.inner
        if module.__spec__ is not None:
            module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        sys.meta_path.remove(self.finder)
        _register()
