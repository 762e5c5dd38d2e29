"""Tables in Markdown."""


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
