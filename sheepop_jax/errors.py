"""The exceptions for invalid input and failed runs; the command line prints each on one line."""

import logging
import re

_SECRET_NAME = (
    r"[^=&?#;\s]*(?:token(?!iz)|passw|secret|signature|credential|auth(?!or)|hmac"
    r"|(?:api|access|private|subscription)[-_]?key)[^=&?#;\s]*|key|sig|sas|pwd|pass|jwt"
)
# The second pattern is for passwords that are not quoted as a URL requires.
_USER_AND_PASSWORD = re.compile(
    r"(?<=://)(?:[^\s/?#:@]*:[^\s/?#]*@|[^\s/?#:@]*:(?!\d+(?:[/?#,\s'\")]|$))\S*@)"
)
_USER_OF_THE_WEB = re.compile(r"(https?://)[^\s/?#@]+@", re.IGNORECASE)  # often a token
_SECRET_PARAMETER = re.compile(rf"([?&#;](?:{_SECRET_NAME})=)[^&#\s'\",]+", re.IGNORECASE)


def masked(text: str) -> str:
    """Replaces passwords and tokens in the URLs of `text` by "…", for messages and saved files."""
    if "://" not in text:
        return text
    text = _USER_AND_PASSWORD.sub("…@", text)
    text = _USER_OF_THE_WEB.sub(r"\1…@", text)
    return _SECRET_PARAMETER.sub(r"\1…", text)


def is_masked(text: str) -> bool:
    """Whether `masked` has replaced something in a URL."""
    return "://" in text and "…" in text


class MaskingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without the secrets of URLs.

    Other libraries log and raise whole URLs, which --debug shows.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        return masked(super().format(record))


class InputError(ValueError):
    """Invalid input: a configuration field, a flag, a path or a file.

    The message is `<field>: got X; expected Y; try Z`. Exceptions of other types are bugs and keep
    their traceback.

    Attributes:
        field: dotted name of a configuration field, a flag, or a path.
        got: the invalid value; secrets in URLs are masked.
        expected: the rule, in words.
        hint: a suggestion, or "". In `expected` and `hint`, names of Python arguments and
            configuration fields are in backticks; the command line prints them as flags.
    """

    def __init__(self, field: str, got: object, expected: str, hint: str = ""):
        self.field, self.got, self.expected, self.hint = field, got, expected, hint
        if isinstance(got, str):
            self.got = masked(got)
        super().__init__(self.sentence(field, got, expected, hint))

    @staticmethod
    def sentence(field: str, got: object, expected: str, hint: str = "") -> str:
        """Formats the message on one line, without the secrets of URLs."""
        text = f"{field}: got {got!r}; expected {expected}" + (f"; try {hint}" if hint else "")
        return " ".join(masked(text).split())

    @classmethod
    def from_message(cls, message: str) -> "InputError":
        """Rebuilds the error of another process from its message."""
        error = cls.__new__(cls)
        ValueError.__init__(error, message)
        error.field = message.partition(":")[0]
        error.got, error.expected, error.hint = None, "", ""
        return error


class RunFailed(RuntimeError):
    """A run that failed despite valid input; saved checkpoints are intact."""
