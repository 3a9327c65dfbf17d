"""From raw texts to a corpus: the stages of Yi's data cascade (2403.04652, section 2), each on its own; no JAX here.

Cheap stages come first: `rules`, `quality`, `near_copies`, `repeats`. A stage is three pure functions (`stage.Stage`);
`experiments.clean_corpus` runs them over shards.
"""
