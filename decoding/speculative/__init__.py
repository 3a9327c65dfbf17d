"""Draft and verify: one loop, one tree, one verifier, and a file per drafter."""
