"""Writes tokenizer_ids.json: what the Hugging Face tokenizer classes make of TEXTS, for each of MODELS.

Run from the repository's root, with transformers installed: `python -m tests.golden.make_tokenizer_ids`. The ids come
from transformers' own classes on the vocabulary of each model's file, not from our tokenizer. A change of the JSON file
means that TEXTS changed, that a model's file changed, or that transformers changed a tokenizer.
"""

import json
from pathlib import Path
from typing import Any

from models.weights.fetch import fetch
from models.weights.gguf import GGUFFile

FILE = Path(__file__).with_name("tokenizer_ids.json")

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma3-270m")

# Ours, written to be awkward: scripts, joiners, digits, white space, code, control characters, tokens inside text.
TEXTS = {
    "plain": "The old lighthouse keeper counted seventeen ships before breakfast; none of them waved back.",
    "spaces": " one  two   three    four" + " " * 17 + "seventeen" + " " * 33 + "thirty-three ",
    "leading": "   three spaces first, then a tab:\tand a trailing run   ",
    "lines": "first\nsecond\n\nfourth\n\n\n\n\neighth\r\nwindows\r\n\r\n\tindented\n" + "\n" * 34 + "end\n",
    "numbers": "1234567.89 + 0x1F4A9 = -42e-10; call 555-0199 by 07:45, pay $1,299.00 or 12 345 678,90 €."
    " ٣٤٥ ４２ ½ x² Ⅻ",
    "contractions": "I'll say we've done what they'd ask, I'M SURE YOU'RE RIGHT; it's the dogs' o'clock, isn’t it?"
    " 'tis",
    "python": 'def area(r: float) -> float:\n    """Area."""\n    if r < 0:\n        raise ValueError(f"{r=}")\n'
    "\treturn 3.14159*r**2  # tab!\n\n\nprint([area(x)for x in(1,2,  3)])\n",
    "c": '#include <stdio.h>\nint main(void){\n\t\tfor(int i=0;i<10;++i)\n\t\t\tprintf("%d\\t%s\\n", i, argv[i]);\n'
    "\t\treturn 0;\n}",
    "markup": '<table><tr><td class="x">a &amp; b</td></tr></table>\n<!-- done -->'
    " **bold** `code` [link](https://ex.org/?q=1#top)",
    "german": "Übermüdete Bäcker süßen große Käseküchlein; wer prüft das? ÄÖÜẞ, Straßenbahnhaltestellenschild",
    "french": "L’été dernier, à Besançon, où l’œuf coûtait déjà 3 €, Zoë a vu un cygne « naïf ».",
    "vietnamese": "Trời hôm nay đẹp quá, chúng ta đi uống cà phê sữa đá ở phố cổ nhé!",
    "russian": "Вчера ёжик нёс домой подъёмный кран, а объяснить зачем — не смог.",
    "greek": "Ο γρήγορος σκύλος πηδάει πάνω από τον ήλιο· «καλημέρα», ᾧ φίλε.",
    "arabic": "السَّلَامُ عَلَيْكُمْ، كيف حالك اليوم؟ العدد ٢٠٢٦.",
    "hebrew": "שָׁלוֹם עוֹלָם! היום יום ג׳, 14:30 \u200fRTL\u200e LTR",
    "hindi": "नमस्ते दुनिया, क्या आप मुझे रास्ता बता सकते हैं? १२३४",
    "thai": "วันนี้อากาศดีมากเราไปเดินเล่นที่สวนสาธารณะกันเถอะ",
    "chinese": "今天天气很好，我们去公园散步吧！繁體字：龍龜鬱。全角　空格",
    "japanese": "雪の朝、駅前の猫は傘の下で「ﾍﾟﾝｷﾞﾝ」の歌を聞いた。ガラス、か\u3099らす",
    "korean": "안녕하세요, 만나서 반갑습니다. \u1112\u1161\u11ab\u1100\u1173\u11af 자모",
    "others": "ქართული ენა · հայերեն · አማርኛ · ខ្មែរ · བོད་ཡིག · தமிழ் · ᚠᚢᚦᚨᚱᚲ · 𐍈𐌰𐌹 · 𓂀 · ꙮ",
    "emoji": "👍🏽 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪🇯🇵 1️⃣ ❤️\u200d🔥 🧑🏿\u200d🚀 🫠😀😀😀 ☺︎ ☕",
    "combining": "e\u0301 é, n\u0303 ñ, A\u030a Å Å, q\u0307\u0323"
    " q\u0323\u0307, Z\u0351\u036b\u0343a\u0363\u0308l\u0300g\u0321o, ﬁ ﬀ ①",
    "symbols": "∀ε>0 ∃δ: |x−a|<δ ⇒ ‖f(x)−L‖≤ε; √2≈1.414… ∑ᵢ₌₁ⁿ i² ≠ ∫₀^∞ ℯ^{-x²} dx ▁ ▁▁ → ␣ ‽ – — “„”",
    "controls": "bell\x07 null\x00 escape\x1b[31mred\x1b[0m delete\x7f \u00a0nbsp\u2003em"
    "\u200bzero\ufeffbom\u2028line\ue000private\U0010ffff",
    "specials": "<|im_start|>user\nHi<|im_end|><|endoftext|><bos><start_of_turn>a<end_of_turn>\n"
    "<tool_call>{}</tool_call> <s>x</s> <|im_end |> <0x0A> [PAD151700] <unused7> <eos>",
    "empty": "",
    "space": " ",
}


def reference(name: str, fields: dict[str, Any]) -> Any:
    """Returns transformers' tokenizer for a model's vocabulary: called with a text, it gives `input_ids`.

    Args:
        name: the model's name.
        fields: the metadata of its GGUF file.
    """
    if name.startswith("gemma3"):
        return _gemma(fields)
    return (_smollm2 if name.startswith("smollm2") else _qwen2)(fields)


def _added_tokens(tokens: list[str], types: list[int]) -> list[Any]:
    """Returns the control tokens (special) and the user-defined ones (not special), as transformers wants them."""
    from transformers import AddedToken

    rows = zip(tokens, types, strict=True)
    return [AddedToken(token, special=kind == 3, normalized=False) for token, kind in rows if kind in (3, 4)]


def _byte_level_parts(fields: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns vocabulary (without the rows that only pad the embedding) and merges of a byte-level BPE."""
    rows = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    vocab = {token: index for index, (token, kind) in enumerate(rows) if kind != 5}
    return vocab, [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]


def _smollm2(fields: dict[str, Any]) -> Any:
    """SmolLM2 has no class of its own: its published tokenizer.json splits digits, then cuts as GPT-2 does."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab, merges = _byte_level_parts(fields)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.add_tokens(_added_tokens(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]))
    return tokenizer


def _qwen2(fields: dict[str, Any]) -> Any:
    """Qwen2.5 is built by transformers' Qwen2Tokenizer."""
    from transformers import Qwen2Tokenizer

    vocab, merges = _byte_level_parts(fields)
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>")
    tokenizer.add_tokens(_added_tokens(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]))
    return tokenizer


def _gemma(fields: dict[str, Any]) -> Any:
    """Gemma is built by transformers' GemmaTokenizer, with merges from scores as its converter makes them."""
    from transformers import GemmaTokenizer
    from transformers.tokenization_utils_base import generate_merges

    types = fields["tokenizer.ggml.token_type"]
    tokens = [
        "▁" * len(token) if kind == 4 and not token.strip(" ") else token
        for token, kind in zip(fields["tokenizer.ggml.tokens"], types, strict=True)
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    # The file overwrote the score of user-defined pieces, which SentencePiece stores as 0.
    scores = {
        token: 0.0 if kind == 4 else score
        for token, score, kind in zip(tokens, fields["tokenizer.ggml.scores"], types, strict=True)
        if kind in (1, 4)
    }
    tokenizer = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores), add_bos_token=True)
    tokenizer.add_tokens(_added_tokens(tokens, types))
    return tokenizer


def main() -> None:
    """Writes the JSON file."""
    ids = {}
    for model in MODELS:
        tokenizer = reference(model, GGUFFile(fetch(model)).fields)
        ids[model] = {name: tokenizer(text)["input_ids"] for name, text in TEXTS.items()}
    text = json.dumps({"texts": TEXTS, "ids": ids}, separators=(",", ":"))
    FILE.write_text(text.replace('},"', '},\n"').replace('],"', '],\n"') + "\n")  # one list of ids on a line
    print(f"{FILE}: {len(TEXTS)} texts, models {', '.join(MODELS)}")


if __name__ == "__main__":
    main()
