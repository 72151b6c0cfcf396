"""The two exceptions that a user can act on; the command line prints each as one line."""


class InputError(ValueError):
    """Bad input: a configuration field, a flag, a path or a file.

    The message reads `<field>: got X; expected Y; try Z`. Any exception of another type is a bug
    and keeps its traceback.

    Attributes:
        field: what is wrong: a field's dotted name, a flag, or a path.
        got: the value found there.
        expected: the rule, in words.
        hint: what to try; "" where there is nothing to suggest.
    """

    def __init__(self, field: str, got: object, expected: str, hint: str = ""):
        self.field, self.got, self.expected, self.hint = field, got, expected, hint
        message = f"{field}: got {got!r}; expected {expected}" + (f"; try {hint}" if hint else "")
        super().__init__(" ".join(message.split()))

    @classmethod
    def from_message(cls, message: str) -> "InputError":
        """The error of another process, of which only the message was sent."""
        error = cls.__new__(cls)
        ValueError.__init__(error, message)
        error.field = message.partition(":")[0]
        error.got, error.expected, error.hint = None, "", ""
        return error


class RunFailed(RuntimeError):
    """Work that cannot continue although the input is valid; what was saved before is intact."""
