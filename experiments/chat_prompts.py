"""Prompts for a model to write texts behind: what is asked, times what it is about.

Topics are divided among training, calibration and testing, so that no text of one is about what another's are about.
"""

import random
from typing import NamedTuple

from finetune.self_texts import SPLITS

_ASKED = (
    "Explain {} to a beginner.",
    "What are the main advantages and disadvantages of {}?",
    "Write a short story in which {} plays a part.",
    "Give me five practical tips about {}.",
    "Summarize the history of {} in one paragraph.",
    "How has {} changed over the last hundred years?",
    "Write a friendly email to a colleague about {}.",
    "List common mistakes that people make with {}, and how to avoid them.",
    "What questions should I ask an expert on {}?",
    "Describe {} as a scientist would.",
    "Write a dialogue between two friends who disagree about {}.",
    "Make a plan for a one-hour lesson on {}.",
    "Why does {} matter? Answer in three short paragraphs.",
    "Write a Python function that could help somebody who works with {}, and explain it.",
    "Compare {} in a city and in the countryside.",
    "What would a museum show about {}? Describe three exhibits.",
)
_ABOUT = (
    "bread baking, bicycles, bridges, beekeeping, the water cycle, volcanoes, chess, public libraries, coffee, clocks, "
    "whales, soap, the printing press, mountain weather, tea ceremonies, glass, railways, honey, lighthouses, maps, "
    "compost, sailing boats, wool, earthquakes, theatre, vaccination, paper, desert plants, radio, wooden furniture, "
    "rivers, marathon running, cheese, satellites, pottery, city parks, bats, elevators, folk music, solar panels, "
    "kites, salt, photography, coral reefs, chocolate, calendars, migration of birds, steel, night trains, gardening, "
    "prime numbers, insurance, dreams, sign language, mushrooms, windmills, fairy tales, dinosaurs, silk, airports, "
    "ice skating, school lunches, batteries, sculpture, penguins, tunnels, wine, perfume, wildfires, carnival, "
    "knitting, telescopes, rice, submarines, dictionaries, street markets, horses, origami, tides, bees, juggling, "
    "local newspapers, electric cars, cotton, snow, opera, camping, robots, pearls, canals, spices, comets, markets "
    "for used books, sourdough, drums, cactus gardens, hospitals, mirrors, apple trees, postage stamps"
)
_TOPICS = tuple(" ".join(topic.split()) for topic in _ABOUT.split(","))
_SHARE = {"train": range(8), "calibration": (8,), "test": (9,)}  # of every ten topics


class Prompt(NamedTuple):
    """A prompt; `again` says how often it has been given before."""

    split: str
    text: str
    again: int


def chat_prompts(counts: dict[str, int], seed: int = 0) -> list[Prompt]:
    """Returns so many prompts of each split, the splits one behind the other.

    A split's prompts are all different as long as there are enough; then they come round again. More of them begin with
    the same ones.

    Args:
        counts: {split: how many}.
        seed: of their order.
    """
    found = []
    for split in SPLITS:
        topics = [topic for place, topic in enumerate(_TOPICS) if place % 10 in _SHARE[split]]
        pairs = [asked.format(topic) for asked in _ASKED for topic in topics]
        random.Random(f"{split} {seed}").shuffle(pairs)
        found += [
            Prompt(split, pairs[place % len(pairs)], place // len(pairs)) for place in range(counts.get(split, 0))
        ]
    return found
