"""What a table says of the draft heads that its rows use: how good they are by themselves, and what they took."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.method_table import TableRow


def head_section(rows: Sequence["TableRow"]) -> list[str]:
    """Returns lines with a table of the rows' draft heads, each once; none where there are no such rows.

    Accuracy is that on held-out text: the share of right tokens that stand first, and among the first ten, at each
    offset; heads that are told the tokens before a guess are told the right ones. Simulated MAT is that of the tree of
    16 nodes on the same text.
    """
    paths = list(dict.fromkeys(row.head for row in rows if row.head is not None and not row.draft))
    if not paths:
        return []
    from decoding.speculative.head_trees import RANKS
    from finetune.saved_heads import load_draft_head

    lines = ["", "## Draft heads", ""]
    lines += [f"| head | parameters | training minutes | top-1 by offset | top-{RANKS} by offset | simulated MAT, 16 |"]
    lines += [f"|{' --- |' * 6}"]
    for path in paths:
        head = load_draft_head(path, None)
        figures, offsets = head.figures, range(1, head.config.offsets + 1)
        shares = [" ".join(f"{figures[f'{name}_{k}']:.2f}" for k in offsets) for name in ("top1", f"top{RANKS}")]
        lines.append(
            f"| {path.parent.name} ({head.config.type}) | {figures['parameters']:,} | {figures['minutes']:.1f} | "
            f"{shares[0]} | {shares[1]} | {figures['mat_16']:.2f} |"
        )
    lines += ["", "At later offsets clover and eagle know the tokens before, the right ones here; other heads do not."]
    return lines
