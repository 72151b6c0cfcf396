"""What a verification of an exported file measured: a table for the terminal and the model card."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: what was measured.
        value: the result.
        limit: what is accepted.
        passed: whether the result is.
        detail: what differs first, on one line; "" if nothing does.
    """

    name: str
    value: str
    limit: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class VerificationReport:
    """All measurements of one export.

    Attributes:
        rows: the measurements.
        notes: what was measured otherwise than usual, or not at all, and why.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every result is accepted."""
        return all(row.passed for row in self.rows)

    def table(self) -> str:
        """The report for a terminal: a line for each measurement, difference and note."""
        cells = [("verification", "result", "limit")]
        cells += [(row.name, row.value, row.limit) for row in self.rows]
        name, value, limit = (max(map(len, column)) for column in zip(*cells, strict=True))
        verdicts = ["", *("ok" if row.passed else "FAILED" for row in self.rows)]
        lines = [
            f"{a:<{name}}  {b:<{value}}  {c:<{limit}}  {verdict}".rstrip()
            for (a, b, c), verdict in zip(cells, verdicts, strict=True)
        ]
        lines += [f"{row.name}: {row.detail}" for row in self.rows if row.detail]
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        """The report for a model card."""
        cells = [("verification", "result", "limit", ""), ("---", "---", "---", "---")]
        cells += [
            (row.name, row.value, row.limit, "ok" if row.passed else "**failed**")
            for row in self.rows
        ]
        lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in cells]
        details = [f"- {row.name}: {row.detail}" for row in self.rows if row.detail]
        items = [*details, *(f"- {note}" for note in self.notes)]
        return "\n".join([*lines, *(["", *map(_escaped, items)] if items else [])])


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, inside a table too."""
    return "".join("\\" + c if c in "|<>`*_[]" and text != "**failed**" else c for c in text)
