"""Human-readable formatting of numbers and text."""


def printable(text: str) -> str:
    """Escapes control characters, except line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def format_seconds(seconds: float) -> str:
    """Formats a duration: 1:02:03 or 4:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_flops(flops: float) -> str:
    """Formats FLOP/s with a prefix: 12.3 GFLOP/s."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3g} {prefix}FLOP/s"
    return f"{flops / 1e6:.3g} MFLOP/s"


def format_count(count: float) -> str:
    """Formats a count with four digits and a letter: 123.6M."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return f"{count:.0f}"


def format_bytes(count: float) -> str:
    """Formats bytes: 3.7 GB or 86 MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
