"""Writes the table of thread blocks in docs/gpu.md: what a kernel starts for real packs, divided by length and not.

python docs/hooks/blocks_table.py [--kernel torch_flash]
"""

import argparse
from pathlib import Path

from hf_flashcp.data.lengths import sample_pack
from hf_flashcp.plan.kernel_calls import GRIDS, blocks_of_calls, deal_calls
from hf_flashcp.plan.rectangles import rank_rectangles
from hf_flashcp.planning import plan_documents


PAGE = Path(__file__).parents[1] / "gpu.md"
PACKS = {"pile": "Pile", "prolong64k": "ProLong-64K"}
STRATEGIES = ("search", "per_doc")
CP_SIZE, TOKENS, QUERY_HEADS = 8, 131072, 32
HEAD = (
    "| cp 8, 128K tokens: the rank with the most blocks, per query head, forward and backward | calls "
    "| blocks started | with one call per pass | useful |"
)


def table(kernel="torch_flash"):
    """Return the table in Markdown."""
    rows = [HEAD, "|---|---|---|---|---|"]
    for corpus, title in PACKS.items():
        for strategy in STRATEGIES:
            plan = plan_documents(sample_pack(corpus, TOKENS), CP_SIZE, strategy=strategy)
            ranks = [counts([local, *stages], kernel) for local, stages in rank_rectangles(plan)]
            calls, started, undivided, useful = max(ranks, key=lambda rank: rank[2])
            rows.append(f"| {title} pack, `{strategy}` | {calls} | {started:,} | {undivided:,} | {useful:,} |")
    return "\n".join(rows)


def counts(passes, kernel):
    """Return the number of calls of a rank's passes, and of blocks: started, with one call per pass, and useful."""
    sums = [0, 0, 0, 0]
    for rectangles in passes:
        for grid in GRIDS[kernel]:
            dealt = deal_calls(rectangles, grid, QUERY_HEADS)
            one_call = deal_calls(rectangles, grid._replace(padded=False), QUERY_HEADS)
            started, useful = blocks_of_calls(rectangles, dealt, grid)
            undivided, _ = blocks_of_calls(rectangles, one_call, grid)
            sums = [a + b for a, b in zip(sums, (len(dealt), started, undivided, useful))]
    return sums


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=GRIDS, default="torch_flash", help="print the table for another kernel")
    arguments = parser.parse_args()
    made = table(arguments.kernel)
    print(made)
    if arguments.kernel == "torch_flash":
        page = PAGE.read_text(encoding="utf-8")
        start = page.index(HEAD[:40])
        PAGE.write_text(page[:start] + made + page[page.index("\n\n", start) :], encoding="utf-8")


if __name__ == "__main__":
    main()
