"""The text of Jupyter notebooks: the sources of their cells, without outputs and images."""

import json
import re

# Images pasted into the text of a cell.
_INLINE_IMAGE = re.compile(r"(data:image/[\w.+-]+;base64,)[A-Za-z0-9+/=\s]{64,}")


def notebook_text(content: str) -> str:
    """The sources of all cells, separated by blank lines.

    Raises:
        ValueError: `content` is not a notebook.
    """
    try:
        notebook = json.loads(content)
        sheets = notebook.get("worksheets", [notebook])  # format 3 and earlier has worksheets
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        # A source is a string or a list of lines; code of format 3 is named "input".
        sources = ["".join(cell.get("source", cell.get("input", ""))) for cell in cells]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        raise ValueError("not a notebook") from None
    return "\n\n".join(_INLINE_IMAGE.sub(r"\1", source) for source in sources if source)
