"""The one error that formats raise: what was found, what was expected, and where."""


class FormatError(ValueError):
    """Raised when bytes are not what they should be; the text is one line and names the place."""


class LimitError(FormatError):
    """Raised when a file asks for more than a safety limit allows."""


class ChecksumError(FormatError):
    """Raised when the data section does not match the digest in its header."""


def printable(text: str, *, limit: int = 80) -> str:
    """`text` safe to print on a terminal: control characters escaped, cut to `limit` characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    escaped = escaped.encode("utf-8", "backslashreplace").decode("utf-8")
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"
