"""Validation methods shared by the configuration sections."""

import difflib

from sheepop_jax.errors import InputError

# The float32 range: larger values overflow to infinity, smaller ones underflow to zero.
TINY, HUGE = 1.2e-38, 3.4e38
BELOW_ONE = 1 - 2**-25  # this and larger values round to 1 in float32


class Section:
    """Base class of the sections; failed checks raise `InputError` with field, value and rule."""

    prefix = ""

    def require(self, ok: bool, field: str, expected: str, hint: str = "") -> None:
        if not ok:
            raise InputError(f"{self.prefix}{field}", getattr(self, field), expected, hint)

    def at_least(self, low: int, *fields: str) -> None:
        for field in fields:
            self.require(getattr(self, field) >= low, field, f"at least {low}")

    def count(self, low: int, *fields: str) -> None:
        """For fields that JAX handles as int32."""
        self.at_least(low, *fields)
        for field in fields:
            self.require(getattr(self, field) < 2**31, field, "at most 2**31 - 1")

    def one_of(self, field: str, *choices: str) -> None:
        value = getattr(self, field)
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"{near[0]!r}" if near else ""
        self.require(value in choices, field, "one of " + ", ".join(choices), hint)

    def fraction(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self.require(0 <= value < BELOW_ONE, field, "a number in [0, 1), also in float32")

    def positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self.require(TINY <= value <= HUGE, field, "a positive finite number, also in float32")

    def not_negative(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self.require(
                0 <= value <= HUGE, field, "a finite number of at least 0, also in float32"
            )
