"""Which of the processor's cores the network runs on."""

from __future__ import annotations

import os

from decoupled_policy_ros.errors import ConfigError


def read_cores(text: str) -> frozenset[int]:
    """The cores of a list such as '2,3' or '4-7'; none of an empty one.

    Raises:
        ConfigError: it is no such list, or names a core that this process may not run on.
    """
    cores: set[int] = set()
    usable = os.sched_getaffinity(0)
    for part in filter(None, (part.strip() for part in text.split(','))):
        first, _, last = part.partition('-')
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ConfigError(f"cores {text!r}: {part!r} is neither a number nor a range such as '4-7'")
        begin, end = int(first), int(last or first)
        if end < begin:
            raise ConfigError(f"cores {text!r}: {part!r} ends before it begins; valid: '{end}-{begin}'")
        # A range of many numbers is not written out before it is known to end where there are cores.
        named = {begin, end}.difference(usable) or set(range(begin, end + 1)).difference(usable)
        if named:
            raise ConfigError(
                f'cores {text!r}: this process may not run on {_listed(named)}; valid: {_listed(usable)}'
            )
        cores.update(range(begin, end + 1))
    return frozenset(cores)


def pin_thread(cores: frozenset[int]) -> None:
    """Let this thread, and those that it starts from now on, run on these cores only; on any where none are named."""
    if cores:
        os.sched_setaffinity(0, cores)


def _listed(cores: set[int] | frozenset[int]) -> str:
    return ', '.join(map(str, sorted(cores)))
