"""The error that a client sees: an HTTP status and OpenAI's error object."""

from typing import Any

from sheepop_jax.errors import InputError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_LONGEST_VALUE = 120  # characters of a refused value that a message repeats


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: the HTTP status.
        message: one line.
        param: the field of the request at fault, or None.
        code: a name for programs, or None.
        headers: of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }

    @classmethod
    def refused(cls, param: str, got: object, expected: str) -> "ApiError":
        """A 400 for the value of a field."""
        return cls(400, f"{param}: got {shortened(got)}; expected {expected}", param)

    @classmethod
    def from_input_error(cls, error: InputError) -> "ApiError":
        """A 400 from the library's error, without its hint, which names command-line flags."""
        if not error.expected:
            return cls(400, str(error))
        return cls.refused(error.field, error.got, error.expected.replace("`", ""))


def shortened(value: object) -> str:
    """The `repr` of a value, cut in the middle of a message."""
    # A long string is cut first: its repr may be four times as long.
    text = repr(value[:_LONGEST_VALUE] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
