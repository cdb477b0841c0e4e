"""Which tokens of a row are kept: by name, by slice, or by a user's function. No model is known here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gapprobe.errors import ConfigError
from gapprobe.store.format import MAX_POSITIONS, ROLES
from gapprobe.tracing.tokens import TokenTable

Chooser = Callable[[TokenTable], "Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]"]
Positions = Sequence[str] | Mapping[str, "str | Chooser"]

ALIASES: Mapping[str, str] = {"last_input": "prompt[-1]", "last_output": "answer[-1]"}
_RULE = re.compile(r"(\w+)(?:\[(-?\d+)\]|\[(-?\d*):(-?\d*)\])?")
# Roles that tokens of the prompt have, and "prompt" for all of them.
_IN_PROMPT = frozenset(ROLES) - {"answer", "padding", "start"} | {"prompt"}


@dataclass(frozen=True)
class Position:
    """A named choice of tokens.

    Attributes:
        name: what the store calls it.
        rule: the choice as text: a role, `prompt`, `answer`, `start` or `all`, perhaps with an index or a slice; of a
            function, where it is defined.
        of: the role or group.
        part: which of these.
        function: a user's function of the prompt's tokens.
    """

    name: str
    rule: str
    of: str
    part: slice
    function: Chooser | None = None

    @property
    def answers(self) -> bool:
        """Return whether it can choose generated tokens, which the model must then read back."""
        return self.of in ("answer", "all")

    @property
    def renamed(self) -> bool:
        """Return whether the name does not say what the rule is."""
        return self.function is not None or ALIASES.get(self.name, self.name) != self.rule

    @property
    def by_role(self) -> bool:
        """Return whether the choice depends on what the tokens are."""
        return self.function is not None or self.of not in ("prompt", "answer", "start", "all")

    def in_prompt(self, table: TokenTable) -> NDArray[np.int64]:
        """Return the chosen tokens of a prompt.

        Raises:
            ConfigError: the user's function returned what cannot be positions.
        """
        if self.function is not None:
            return self._asked(table)
        if self.of not in _IN_PROMPT and self.of != "all":
            return np.empty(0, dtype=np.int64)
        chosen = np.arange(len(table)) if self.of in ("prompt", "all") else table.where(self.of)
        return chosen[self.part]

    def in_answer(self, size: int) -> NDArray[np.int64]:
        """Return the chosen tokens of an answer of so many tokens."""
        return np.arange(size)[self.part] if self.answers else np.empty(0, dtype=np.int64)

    def _asked(self, table: TokenTable) -> NDArray[np.int64]:
        told = np.asarray(self.function(table) if self.function else [])
        if told.dtype == np.bool_ and told.shape == (len(table),):
            return np.flatnonzero(told)
        if not told.size:
            return np.empty(0, dtype=np.int64)
        whole = np.issubdtype(told.dtype, np.integer) and told.ndim == 1
        if not whole or told.min() < -len(table) or told.max() >= len(table):
            raise ConfigError(
                f"the function of position {self.name!r} returned {told!r:.100} for a prompt of {len(table)} tokens; "
                "it must return their indices, or one truth value a token"
            )
        return np.unique(told % len(table))


def parse_positions(positions: Positions) -> tuple[Position, ...]:
    """Return positions given as names and rules, or as a mapping from names to rules and functions.

    Raises:
        ConfigError: a rule that is not understood, a name twice, none, or more than a store can mark.
    """
    if isinstance(positions, str):
        raise ConfigError(f"positions {positions!r} must be a list, such as [{positions!r}]")
    given = positions if isinstance(positions, Mapping) else {name: name for name in positions}
    if not given or len(given) < len(positions):
        raise ConfigError(f"positions {list(positions)} must be at least one, each once")
    if len(given) > MAX_POSITIONS:
        raise ConfigError(f"{len(given)} positions are more than the {MAX_POSITIONS} that a store can mark")
    return tuple(_parse(name, rule) for name, rule in given.items())


def _parse(name: str, rule: str | Chooser) -> Position:
    if callable(rule):
        where = f"{getattr(rule, '__module__', '?')}.{getattr(rule, '__qualname__', type(rule).__name__)}"
        return Position(name, f"function {where}", "", slice(None), rule)
    found = _RULE.fullmatch(ALIASES.get(rule, rule))
    groups = sorted(_IN_PROMPT - {"prompt", "other"})
    if found is None or found[1] not in _IN_PROMPT | {"answer", "start", "all"}:
        raise ConfigError(
            f"position {rule!r} is not understood. Give last_input, last_output, prompt, answer, all, start (of a "
            f"decoder) or a role ({', '.join(groups)}), perhaps with an index or a slice such as entity[-1], "
            "prompt[-5:]; or a function from the table of tokens to indices"
        )
    of, index, start, stop = found.groups()
    if of == "all" and (index or start or stop):
        raise ConfigError(f"position {rule!r}: all has no parts; take prompt or answer")
    if index is not None:
        first = int(index)
        return Position(name, found[0], of, slice(first, None if first == -1 else first + 1))
    return Position(name, found[0], of, slice(int(start) if start else None, int(stop) if stop else None))
