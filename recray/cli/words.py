"""Types for argparse: the lists, pairs and counts that options are written in."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """A whole number not below `lowest`."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return value

    return whole_number


def names(text: str) -> list[str]:
    """`a,b,c` as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pairs(text: str) -> dict[str, str]:
    """`user=customer,item=stock_code` as a dict."""
    found: dict[str, str] = {}
    for part in names(text):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if not (key and value):
            raise ArgumentTypeError(f"cannot read {part!r}: write NAME=VALUE,NAME=VALUE")
        if key in found:
            raise ArgumentTypeError(f"{key!r} is given twice")
        found[key] = value
    return found


def numbers(text: str) -> dict[str, float]:
    """`view=1,buy=5` as a dict of numbers."""
    try:
        return {key: float(value) for key, value in pairs(text).items()}
    except ValueError:
        raise ArgumentTypeError(f"cannot read {text!r}: write for example view=1,buy=5") from None


def crew(text: str) -> int | tuple[int, int]:
    """`4` workers, or `2-4` of them as the cluster has room."""
    least, dash, most = text.partition("-")
    if dash and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most):
        return (int(least), int(most)) if int(least) < int(most) else int(most)
    if text.isdecimal():
        return int(text)
    raise ArgumentTypeError(f"{text!r} is neither a number of workers nor a range of them: write 4, or 2-4")
