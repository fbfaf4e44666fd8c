"""Does the file cut, join and frame text as the model's own tokenizer does? `tokenizers` is the judge."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from convert.dialogue import Template
from convert.errors import Refused
from convert.llama import Model
from convert.vocabulary import Vocabulary

HARD = (
    "",
    " ",
    "\n",
    " \n\t\r\n  \n",
    "a  b   c\t\td",
    "don't DON'T we'll they're I'd it's I'm you've O'S",
    "1234567890 3.14159 1,000,000 0x1F ²³ ½ ٣٤ ४५ Ⅷ",
    "e\u0301 cafe\u0301 Å Å ﬁ ｆｕｌｌ ㎏",
    "你好，世界。「引用」 日本語のテキスト 한국어 띄어쓰기 ภาษาไทย",
    "مرحبا بالعالم שלום עולם नमस्ते দুনিয়া",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 👍🏽 ❤️ ☃",
    "def f(x):\n\treturn x**2  # über\n\n\n\nif True:\n        pass\n",
    "<b>bold</b></s><s>[INST] <EOT> <PAD> [PAD] <eos> &nbsp; </think",
    "https://example.org/a?b=c&d=%20#e  me@example.org",
    "\u200b\u200d\ufeff\u00a0\u2028\u3000\x00\x07\x1b[0m",
    "A" * 300 + " " * 300 + "\n" * 50 + "!" * 300,
    "<think>\n\n</think>\n\n<tool_call>\n{}\n</tool_call>",
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|><|im_start|",
)
KINDS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "      \n\n\t\r",
    "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~\\",
    "äöüßéèêñçøåÆŒšžłğİı",
    "абвгдежзийклмнопрстуфхцчшщъыьэюя",
    "的一是在不了有和人这中大为上个国我以要他时来用们",
    "あいうえおアイウエオ가나다라마바사",
    "ابتثجحخدذرزकखगघचछजझกขฃคฅ",
    "🙂🙃😀🎉👍🏽🧑‍🚀❤️",
    "\u0301\u0308\u0327\u200b\u200d\u00a0\u2028²½Ⅷ٣",
)
PAIRS = (
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
    [
        {"role": "user", "content": "é 你好\n\n  x"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"},
        {"role": "user", "content": "why?"},
    ],
)


@dataclass(frozen=True)
class Parity:
    """What was compared, all of it equal."""

    strings: int
    templates: int
    ends: tuple[int, ...]  # every token that ends an answer in llama.cpp


def any_character(random: Random) -> str:
    while True:
        character = chr(random.randrange(1, 0x110000))
        if unicodedata.ucd_3_2_0.category(character) not in ("Cn", "Cs", "Co"):
            return character


def random_strings(count: int, seed: int) -> Iterator[str]:
    """Words of one kind of character and of mixed kinds, and any character that Unicode 3.2 knows.

    Not any at all: what Unicode 15 and later call letters is none to llama.cpp, which may put a space after it elsewhere.
    """
    random = Random(seed)
    for _ in range(count):
        words = []
        for _ in range(random.randrange(1, 12)):
            draw = random.random()
            if draw < 0.1:
                words.append(any_character(random))
            else:
                letters = random.choice(KINDS) if draw < 0.8 else "".join(random.sample(KINDS, 3))
                words.append("".join(random.choices(letters, k=random.randrange(1, 9))))
        yield random.choice(("", " ")).join(words)


def check_parity(model: Model, tokenizer_file: Path, vocabulary: Vocabulary, count: int, seed: int = 0) -> Parity:
    """Compare `count` random and all hard strings, special ids, end tokens and rendered templates.

    Raises Refused at the first difference, with the text and both answers.
    """
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(tokenizer_file))

    def compare(text: str) -> None:
        normal = unicodedata.normalize("NFC", text)
        expected = theirs.encode(normal, add_special_tokens=False).ids
        found = model.tokenize(normal, special=True)
        if found != expected:
            raise Refused(f"The tokenizer differs on {text!r}: the model's own gives {expected}, the file gives {found}.")
        if not any(theirs.id_to_token(i) is None for i in expected):
            back = model.text(found)
            if back != normal.encode():
                raise Refused(f"The tokenizer does not give {text!r} back: {back!r}.")

    for text in (*HARD, *random_strings(count, seed)):
        compare(text)
    stated = model.special()
    for key in ("eos", "eot", "bos", "padding"):
        if stated[key] != getattr(vocabulary, key):
            raise Refused(f"The file states {key} {stated[key]}; the source means {getattr(vocabulary, key)}.")
    if model.adds():
        raise Refused("The file adds a token before or after every text; Qwen3 adds none.")
    ends = model.ends()
    missing = set(vocabulary.ends) - ends
    if missing:
        raise Refused(f"The file does not end an answer at {sorted(missing)}, as generation_config.json asks.")
    if model.template() != vocabulary.template:
        raise Refused("The chat template in the file is not the source's, byte for byte.")
    template, rendered = Template(vocabulary.template), 0
    for messages in PAIRS:
        for ask in (False, True):
            compare(template.render(messages, ask=ask))
            rendered += 1
    return Parity(len(HARD) + count, rendered, tuple(sorted(ends)))
