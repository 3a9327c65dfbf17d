"""The tokenizer `code` of new models: byte-level BPE learnt from the pairs that code writes, with CodeT5+'s tokens."""

import functools

import tokenizers

from finetune.code_pairs import code_pairs
from models.weights.tokenizer import Tokenizer

TASK_TOKENS = ("[CLS]", "[CLM]", "[Match]", "[CDec]", "[TDec]")
END, PAD = "<|endoftext|>", "<pad>"
SENTINELS = tuple(f"<extra_id_{k}>" for k in range(48))
_SIZE = 640  # ids in all
_LEARNT_FROM = 4000  # pairs


@functools.cache
def code_tokenizer() -> Tokenizer:
    """Returns the tokenizer: padding (0, which texts that are written begin with), tasks, sentinels, end of text, BPE.

    The 256 bytes are among its ids, so that it reads any text. It is the same whenever and wherever it is made.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    special = [PAD, *TASK_TOKENS, *SENTINELS, END]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_SIZE,
        special_tokens=special,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [example.prompt + example.completion for example in code_pairs(_LEARNT_FROM, 0, False)]
    backend.train_from_iterator(texts, trainer)
    end = backend.token_to_id(END)
    return Tokenizer(backend, bos_id=None, eos_id=end, pad_id=0, stop_ids=(end,), chat_template=None)
