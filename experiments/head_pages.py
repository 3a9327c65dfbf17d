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

    titles = ["head", "parameters", "updates", "training minutes", "top-1 by offset", f"top-{RANKS} by offset"]
    titles.append("simulated MAT, 16")
    lines = ["", "## Draft heads", "", f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for path in paths:
        head = load_draft_head(path, None)
        figures, offsets = head.figures, range(1, head.config.offsets + 1)
        shares = [" ".join(f"{figures[f'{name}_{k}']:.2f}" for k in offsets) for name in ("top1", f"top{RANKS}")]
        trained = f"{figures['parameters']:,} | {figures['step']} | {figures['minutes']:.1f}"
        name = f"{path.parent.name} ({head.config.type})"
        lines.append(f"| {name} | {trained} | {shares[0]} | {shares[1]} | {figures['mat_16']:.2f} |")
    told = "At later offsets chimera, clover and eagle know the tokens before, the right ones here; other heads do not."
    lines += ["", told]
    return lines
