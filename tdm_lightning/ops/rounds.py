"""How many tokens rounds of matching can merge away."""

from __future__ import annotations

from tdm_lightning.errors import SettingError


def pairs_per_round(n: int, keep: int, rounds: int) -> list[int]:
    """How many of ``n`` tokens each round merges away; as equal as may be, as each at most halves.

    Raises:
        ValueError: if the rounds cannot reach ``keep``; it names the least that they can.

    >>> pairs_per_round(196, 138, 4)
    [14, 14, 15, 15]
    """
    check_rounds(n, keep, rounds)
    pairs = []
    for later in range(rounds - 1, -1, -1):
        fewer = (n - keep) // (later + 1)
        while fewest_after(n - fewer, later) > keep:
            fewer += 1
        pairs.append(fewer)
        n -= fewer
    return pairs


def check_rounds(n: int, keep: int, rounds: int) -> None:
    """Whether rounds that each at most halve can leave ``keep`` of ``n`` tokens.

    Raises:
        ValueError: if not; it names the least that they can.
    """
    if keep < (least := fewest_after(n, rounds)):
        raise SettingError(
            f"{rounds} rounds that each at most halve make at least {least} of {n} tokens, and"
            f" {keep} are asked for"
        )


def fewest_after(n: int, rounds: int) -> int:
    """How few of ``n`` tokens rounds can leave that each at most halve.

    >>> fewest_after(196, 4)
    13
    """
    for _ in range(rounds):
        n -= n // 2
    return n
