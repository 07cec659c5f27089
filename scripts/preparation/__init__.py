"""What raw scans need before they are segmented: T2 registered to T1."""

from collections.abc import Sequence

from scripts.errors import InputError

STEPS = ("registration",)


def steps_of(prepare: str | Sequence[str]) -> tuple[str, ...]:
    """Return the steps that the setting prepare stands for: `auto` for all that a subject needs, or a list of STEPS.

    Raises:
        InputError: it is something else.
    """
    if prepare == "auto":
        return STEPS
    steps = tuple(prepare) if isinstance(prepare, list | tuple) else (prepare,)
    if unknown := [step for step in steps if step not in STEPS]:
        raise InputError(f"--prepare {unknown[0]}: must be auto, or a list of {', '.join(STEPS)}, or [] for nothing")
    return steps
