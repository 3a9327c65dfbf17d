"""The tokenizer of models trained from scratch: one id per byte, so that no vocabulary has to be learnt or fetched."""

import tokenizers

from models.weights.tokenizer import Tokenizer

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Returns a tokenizer of 258 ids: the 256 bytes of UTF-8, an end of turn (256) and an end of text (257, its EOS).

    Both ends stop a generation. The chat template writes `<role>content` and an end of turn for each message.
    """
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TURN, END_OF_TEXT])
    turn, text = (backend.token_to_id(token) for token in (END_OF_TURN, END_OF_TEXT))
    return Tokenizer(backend, bos_id=None, eos_id=text, pad_id=None, stop_ids=(turn, text), chat_template=_TEMPLATE)
