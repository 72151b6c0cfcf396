"""The two exceptions that mean something to the user; the command line prints them as one line."""


class InputError(ValueError):
    """Bad input: a configuration field, a flag, a path or a file.

    The message reads `<what>: got X; expected Y; try Z`. Anything else that escapes is a bug and
    keeps its traceback.
    """

    def __init__(self, what: str, got: object, expected: str, hint: str = ""):
        self.what = what
        message = f"{what}: got {got!r}; expected {expected}" + (f"; try {hint}" if hint else "")
        super().__init__(" ".join(message.split()))

    @classmethod
    def said_elsewhere(cls, message: str) -> "InputError":
        """The error of another process, word for word."""
        error = cls.__new__(cls)
        ValueError.__init__(error, message)
        error.what = message.partition(":")[0]
        return error


class RunFailed(RuntimeError):
    """Work that cannot go on, through no fault of the input; what was saved before is intact."""
