"""Cleans a corpus: `python -m experiments.clean_corpus --config configs/data/yi.yaml --source data/raw`.

Shards are .jsonl files with a text in each line. The stages are Yi's (2403.04652): rules, a quality scorer (where a
reference is named), near copies of whole texts, passages that stand more than once. What is left is in OUT/corpus, what
each stage did in OUT/counts.md and counts.json; the same command goes on where a run stopped.
"""

import dataclasses
import json
from pathlib import Path

from experiments.cascade import Counts, counts_page, find_shards, read_records, run_cascade
from experiments.config import load_config, save_config
from experiments.kept import locked
from experiments.runtime import run_main
from finetune.cleaning.near_copies import NearCopiesConfig, near_copies_stage
from finetune.cleaning.quality import QualityConfig, quality_stage
from finetune.cleaning.repeats import RepeatsConfig, repeats_stage
from finetune.cleaning.rules import RulesConfig, rules_stage
from finetune.cleaning.stage import Stage
from models.errors import InputError
from models.weights.whole import whole_file


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """A corpus to be cleaned; a stage that is null is left out."""

    source: Path = Path("data/raw")  # a folder of .jsonl files, or one
    out: Path = Path("data/clean")
    column: str = "text"  # of the text in each line; the others stay as they are
    rules: RulesConfig | None = RulesConfig()
    quality: QualityConfig | None = None
    near_copies: NearCopiesConfig | None = NearCopiesConfig()
    repeats: RepeatsConfig | None = RepeatsConfig()


def make_stages(config: CleanConfig) -> list[Stage]:
    """Returns the stages of a config, in the paper's order: the cheap ones first."""
    stages: list[Stage] = []
    if config.rules is not None:
        stages.append(rules_stage(config.rules))
    if config.quality is not None:
        path = config.quality.reference
        if not path.is_file():
            raise InputError(f"no such file: quality.reference {path}; name a .jsonl file of good texts")
        stages.append(quality_stage(config.quality, [r[config.column] for r in read_records(path, config.column)]))
    if config.near_copies is not None:
        stages.append(near_copies_stage(config.near_copies))
    if config.repeats is not None:
        stages.append(repeats_stage(config.repeats))
    if not stages:
        raise InputError("every stage is null: name at least one of rules, quality, near_copies and repeats")
    return stages


def clean(config: CleanConfig) -> list[Counts]:
    """Runs the stages as far as they were not run yet; returns their counts.

    Raises:
        InputError: no shards, a bad line (named by its number), no reference, a folder that cannot be written.
    """
    shards, stages = find_shards(config.source), make_stages(config)
    for shard in shards:  # bad lines are told before anything is written
        read_records(shard.path, config.column)
    with locked(config.out, "--out"):
        save_config(config, config.out / "config.yaml")
        counts = run_cascade(shards, stages, config.out, config.column)
        pages = {
            "counts.md": "\n".join(counts_page(counts)) + "\n",
            "counts.json": json.dumps([dataclasses.asdict(one) for one in counts], indent=1) + "\n",
        }
        for name, page in pages.items():
            with whole_file(config.out / name) as partial:
                partial.write_text(page, encoding="utf-8")
    return counts


def main(argv: list[str] | None = None) -> None:
    """Loads the config, cleans, prints the counts."""
    config = load_config(
        CleanConfig, argv, prog="python -m experiments.clean_corpus", description=(__doc__ or "").split("\n")[0]
    )
    counts = clean(config)
    print("\n".join(["", *counts_page(counts), "", f"saved in {config.out / 'corpus'}"]))


if __name__ == "__main__":
    run_main(main)
