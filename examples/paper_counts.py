"""Sizes and multiply-adds of the paper's networks, published and counted.

python examples/paper_counts.py           # prints the tables
python examples/paper_counts.py --docs    # writes them into docs/paper.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from documents import fill, markdown
from paper.counts import NETWORKS, OPERATION_CASES, counted_bits, operations

DOCUMENT = Path(__file__).parent.parent / "docs" / "paper.md"


def size_table() -> str:
    """Every published size beside the counted one, in millions of bits."""
    rows = []
    for name, network in NETWORKS.items():
        for stored, published, rule in network.figures():
            ours = counted_bits(network.build, stored, rule) / 1e6
            kind = f"p = {stored}" if isinstance(stored, int) else stored
            lam = f"{rule.min_size:,}" if isinstance(stored, int) else ""
            digits = len(published.partition(".")[2])
            difference = ""
            if published and f"{ours:.{digits}f}" != published:
                difference = f"{100 * (ours / float(published) - 1):+.2f} %"
            rows.append([name, kind, published or "not given", f"{ours:.3f}", difference, lam, str(rule)])
    header = ["network", "weights", "published", "counted", "differs by", "lambda", "rule"]
    return markdown(header, rows, ("network", "weights", "rule"))


def operation_table() -> str:
    """Bit-operations of the float networks and the saving of computing each distinct filter once."""
    rows = []
    for name, size, p, min_size in OPERATION_CASES:
        found = operations(name, size, p, min_size)
        rows.append([name, f"{found.dense_operations:.2f}", str(p), f"{min_size:,}", f"{found.saving:.2f}x"])
    return markdown(["network", "float [1e9 bit-operations]", "p", "lambda", "saving"], rows, ("network",))


def tables() -> dict[str, str]:
    """The tables of ``docs/paper.md`` by name."""
    return {"sizes": size_table(), "operations": operation_table()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/paper.md")
    arguments = parser.parse_args(argv)
    if arguments.docs:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), tables()))
    else:
        print("\n\n".join(tables().values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
