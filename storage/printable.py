"""How text of others is shown: what could steer a terminal, or hide in a line, stands there as an escape."""

import unicodedata

_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters (C1 too), of formats (bidirectional, of no width, tags), of lone
surrogates, and of separators of lines and paragraphs. What is left has a shape and a place in its line."""


def printable(text: str, keep: str = "") -> str:
    r"""The text with escapes such as `\x1b` and `\u202e` in place of what would not be seen.

    Args:
        text: of anybody.
        keep: characters that stay, such as line ends of our own.
    """
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode() if char not in keep and unicodedata.category(char) in _ESCAPED else char
        for char in text
    )
