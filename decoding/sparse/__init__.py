"""Attention policies for long contexts: decoding that reads a part of the cache. One file per paper."""
