"""Things that users know by name: ours, those a program registers, and those of installed packages (entry points)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Generic, TypeVar

from gapprobe.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Makers of things by name.

    Args:
        what: what they are, in words.
        group: of entry points by which packages add theirs.
    """

    def __init__(self, what: str, group: str) -> None:
        self._what, self._group = what, group
        self._kinds: dict[str, Callable[..., T]] = {}

    def add(self, kind: Callable[..., T]) -> None:
        """Make a kind known by its attribute `name`.

        Raises:
            ConfigError: it has none, or another kind has it.
        """
        name = str(getattr(kind, "name", ""))
        if not name:
            raise ConfigError(f"{kind!r} has no `name`: give the class one, users will type it")
        known = self._kinds.setdefault(name, kind)
        if known is not kind and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ConfigError(f"two {self._what}s are called {name!r}: {known!r} and {kind!r}; rename one")
        self._kinds[name] = kind

    def names(self) -> tuple[str, ...]:
        """Return the names of all."""
        return tuple(sorted({*self._kinds, *(point.name for point in self._points())}))

    def find(self, name: str) -> Callable[..., T]:
        """Return the kind of that name.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._kinds:
            for point in self._points():
                if point.name == name:
                    self.add(point.load())
        if name not in self._kinds:
            raise ConfigError(f"no {self._what} is called {name!r}; there are {', '.join(self.names())}")
        return self._kinds[name]

    def _points(self) -> Iterator[metadata.EntryPoint]:
        return iter(metadata.entry_points(group=self._group))
