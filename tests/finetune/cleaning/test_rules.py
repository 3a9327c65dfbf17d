"""Rules that texts keep and break, each alone, and masks that leave nothing to mask."""

import pytest

from finetune.cleaning.planted import FAULTS, passages
from finetune.cleaning.rules import MASKS, RULES, RulesConfig, broken_rule, mask, rules_stage
from models.errors import InputError

GOOD = (
    "The committee met on Tuesday to discuss the plans for a new library in the town. Most of its members agreed that "
    "the old building had served well, but that readers now have to wait for seats. An architect presented three "
    "drawings, of which the second found the most support. Parking remains an open question, and will be taken up "
    "again with the results of a study that the council ordered in spring."
)
CONFIG = RulesConfig()


def test_a_good_text_keeps_every_rule():
    assert broken_rule(GOOD, CONFIG) == ""


BROKEN = {
    "length": GOOD[:80],
    "garbled": GOOD.replace("e", "\ufffd", 10),
    "blocked words": GOOD + " Casino.",
    "word length": " ".join(["a of to it"] * 3)
    + " "
    + " ".join(f"{a}{b} to of and" for a in "abcdef" for b in "ghijk"),
    "symbols": GOOD.replace(" ", " # ", 20),
    "bullets and ellipses": "\n".join(f"- {part}" for part in GOOD.split(", ")),
    "words without letters": GOOD + " 17" * 40,
    "stop words": " ".join(f"wort{a}{b}x" for a in "abcdefgh" for b in "ijklmnop"),
    "repeated lines": "\n".join([GOOD] + ["Read more about this here, dear reader, if you like."] * 8),
    "repeated n-grams": GOOD + " and then they all sat down to eat a cake" * 8,
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_broken_by_its_own_fault(rule):
    config = RulesConfig(blocked_words=("casino",))
    assert RULES[rule](BROKEN[rule], config) and not RULES[rule](GOOD, config)
    assert broken_rule(BROKEN[rule], config) == rule


def test_what_is_left_is_what_breaks_no_rule():
    texts = [GOOD, *BROKEN.values()]
    alone = [all(not breaks(text, CONFIG) for breaks in RULES.values()) for text in texts]
    verdicts = rules_stage(CONFIG).apply(texts, None)
    assert [verdict.text is not None for verdict in verdicts] == alone
    assert all((verdict.text is None) == bool(verdict.reason) for verdict in verdicts)


def test_masks_leave_nothing_to_mask():
    text = "Write to a.b+c@mail.example.org, or call +49 221-555-0134 or (030) 555 0199 before 2024-05-01 at 10.30."
    masked = mask(text)
    assert masked == "Write to <email>, or call <phone> or <phone> before 2024-05-01 at 10.30."
    assert not any(pattern.search(masked) for pattern, _ in MASKS) and mask(masked) == masked
    assert (
        rules_stage(RulesConfig(mask=False, min_words=1, min_stop_words=0, min_alphabetic=0.0))
        .apply([text], None)[0]
        .text
        == text
    )


def test_planted_faults_are_found_and_passages_are_not():
    import random

    rng, texts = random.Random(0), passages()[:60]
    assert sum(broken_rule(text, CONFIG) == "" for text in texts) >= 48
    for fault in ("garbled", "repeated n-grams", "too short", "list of symbols"):
        assert all(broken_rule(FAULTS[fault](rng, text), CONFIG) for text in texts[:20]), fault


@pytest.mark.parametrize("settings", [{"min_words": 9, "max_words": 8}, {"max_top_ngram": (0.1,)}])
def test_thresholds_that_do_not_fit(settings):
    with pytest.raises(InputError):
        RulesConfig(**settings)
