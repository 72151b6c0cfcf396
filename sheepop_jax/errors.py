"""The exceptions for invalid input and failed runs; the command line prints each on one line."""


class InputError(ValueError):
    """Invalid input: a configuration field, a flag, a path or a file.

    The message is `<field>: got X; expected Y; try Z`. Exceptions of other types are bugs and keep
    their traceback.

    Attributes:
        field: dotted name of a configuration field, a flag, or a path.
        got: the invalid value.
        expected: the rule, in words.
        hint: a suggestion, or "". In `expected` and `hint`, names of Python arguments and
            configuration fields are in backticks; the command line prints them as flags.
    """

    def __init__(self, field: str, got: object, expected: str, hint: str = ""):
        self.field, self.got, self.expected, self.hint = field, got, expected, hint
        super().__init__(self.sentence(field, got, expected, hint))

    @staticmethod
    def sentence(field: str, got: object, expected: str, hint: str = "") -> str:
        """Formats the message on one line."""
        text = f"{field}: got {got!r}; expected {expected}" + (f"; try {hint}" if hint else "")
        return " ".join(text.split())

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
