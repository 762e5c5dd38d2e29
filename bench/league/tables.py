"""Tables in Markdown, and their places in a document."""

import re


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def replace_place(text: str, name: str, lines: list[str]) -> str:
    """Returns a document with these lines between `<!-- NAME -->` and `<!-- end -->`.

    Raises a KeyError if the document has no such place.
    """
    place = re.search(f"<!-- {re.escape(name)} -->\\n(.*?)<!-- end -->", text, re.DOTALL)
    if place is None:
        raise KeyError(f"there is no place <!-- {name} -->")
    return text[: place.start(1)] + "\n".join(lines) + "\n" + text[place.end(1) :]
