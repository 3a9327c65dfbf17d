"""Texts that follow a grammar: what a grammar is, how it masks tokens, and sampling that stays true to the model."""

from decoding.grammar.asap import GrammarAligned as GrammarAligned
from decoding.grammar.asap import Sample as Sample
from decoding.grammar.grammar import Grammar as Grammar
from decoding.grammar.grammar import json_schema as json_schema
from decoding.grammar.grammar import lark as lark
from decoding.grammar.grammar import regex as regex
from decoding.grammar.matcher import GrammarMatcher as GrammarMatcher
from decoding.grammar.vocabulary import Vocabulary as Vocabulary
