"""Modules of a package that are there as its attributes without an import of their own: ``package.module.name``."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType


@functools.cache
def modules_of(package: str) -> tuple[str, ...]:
    """Names of a package's public modules and packages, in order; nothing is imported but the package.

    Args:
        package: its full name.
    """
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return tuple(sorted(each.name for each in found if not each.name.startswith("_")))


def module_of(package: str, name: str) -> ModuleType:
    """A module of a package, imported on first use: what the package's ``__getattr__`` gives.

    Args:
        package: its full name, ``__name__`` there.
        name: of the module.

    Raises:
        AttributeError: when there is none of that name, as of any missing attribute.
    """
    # the names of Python itself are asked for all the time, also while the package is still being imported
    if name.startswith("_") or name not in modules_of(package):
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")


def attributes(package: str) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose modules are its attributes.

    Args:
        package: its full name, ``__name__`` there.
    """

    def there() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules_of(package)})

    return functools.partial(module_of, package), there
