"""Parts of a bundle that requests choose by name, such as control networks."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from runtime.errors import InvalidInput, did_you_mean


def check_names(field: str, what: str, names: Sequence[str], known: Collection[str], remedy: str) -> None:
    """Raises InvalidInput naming `field` for a name that is not `known`, or that is given twice. `what` is a word for
    such a part, `remedy` what to do about two of one.
    """
    for name in names:
        if name not in known:
            raise InvalidInput(field, f"there is no {what} '{name}': {did_you_mean(name, known)}")
        if names.count(name) > 1:
            raise InvalidInput(field, f"'{name}' is given twice: {remedy}")
