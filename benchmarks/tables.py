"""The tables that a benchmark printed, as JSON: `python benchmarks/tables.py < printed.md > tables.json`.

What is printed around the tables, such as the device, is kept under "said"; a row has its cells by column.
"""

import json
import sys
from collections.abc import Iterable


def read(lines: Iterable[str]) -> dict:
    """`said`, the lines outside of tables, and `tables`, each a list of rows."""
    said, tables, place = [], [], 0  # of a line in its table: 0 has the columns, 1 the rule below them
    for line in map(str.strip, lines):
        if not line.startswith("|"):
            place = 0
            said += [line] if line else []
            continue
        cells = [cell.strip() for cell in line[1:].removesuffix("|").split("|")]
        if place == 0:
            columns = cells
            tables.append([])
        elif place > 1:
            tables[-1].append(dict(zip(columns, cells, strict=True)))
        place += 1
    return {"said": said, "tables": tables}


if __name__ == "__main__":
    json.dump(read(sys.stdin), sys.stdout, indent=1)
