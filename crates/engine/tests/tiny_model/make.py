#!/usr/bin/env python3
"""Generates this folder's tokenizer, and reference.jsonl files for this or any other tokenizer.

A line of reference.jsonl is a text with its token ids, without (`plain`) and with (`special`) the
special tokens that the tokenizer adds. Texts are the same in every run.

usage: make.py tokenizer               writes tokenizer.json to the folder of this file
       make.py reference FOLDER COUNT  writes FOLDER/reference.jsonl from FOLDER/tokenizer.json
needs: pip install tokenizers
"""
import glob, json, os, random, sys, sysconfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
SCRIPTS = ["The quick brown fox, it's 3.14 o'clock! WE'LL see HTTPServer2 ", "你好，世界。今天天气怎么样？",
           "こんにちは世界、カタカナと漢字。", "안녕하세요 세계!", "Привет, мир! Как дела?", "مرحبا بالعالم، كيف الحال؟",
           "नमस्ते दुनिया", "สวัสดีชาวโลก", "🙂👍🏽👩‍👩‍👧‍👦🇫🇷🏳️‍🌈 zwj\u200d ", "Ünïcödé ﬁ ½ ² ℌ e\u0301 \u1e9b\u0323 Ⅳ ㎏ ",
           "x = {'a': [1,2,3]}\n\treturn foo(bar)->baz;\n    // comment\r\n", "0123456789 12,345.67 1e-9 0xDEADBEEF ",
           "   \n\n \t\t  \r\n\u00a0\u2003\u3000\u0085\u2028 ", "\x00\x01\x1b[0m\x7f\ufeff\ufffd\U0001F9FF\U000E0041"]


def corpus():
    """Yields source files of the Python standard library."""
    for name in sorted(glob.glob(sysconfig.get_paths()["stdlib"] + "/*.py"))[:180]:
        yield open(name, encoding="utf-8", errors="ignore").read()


def make_tokenizer():
    """Trains a byte-level BPE tokenizer with 1200 tokens and writes it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=1200, special_tokens=SPECIAL[:3], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_tokens(SPECIAL[3:])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.save(os.path.join(HERE, "tokenizer.json"), pretty=False)


def texts(special, count):
    """Yields about `count` texts: code, mixed scripts, chats with `special` tokens, tools, and long code."""
    sources = list(corpus())

    def snippet(max_length):
        source = random.choice(sources)
        start = random.randrange(len(source))
        return source[start:start + random.randint(1, max_length)]

    def mixed(part_count):
        for _ in range(part_count):
            kind = random.random()
            if kind < .5:
                script = random.choice(SCRIPTS)
                start = random.randrange(len(script))
                yield script[start:start + random.randint(1, 12)]
            elif kind < .6:
                yield chr(random.choice([random.randrange(32, 0x600), random.randrange(0x600, 0xd800), random.randrange(0xe000, 0x30000)]))
            elif kind < .75:
                yield random.choice([" ", "\n", "\t", "\r\n", "=", "-", "a"]) * random.randint(1, 20)
            else:
                yield snippet(60)

    yield from ["", " ", "\n"]
    for index in range(count):
        kind = index % 10
        if kind < 3:
            yield snippet(1200)
        elif kind < 6:
            yield "".join(mixed(random.randint(1, 40)))
        elif kind < 8:  # like a chat
            yield "".join(random.choice(special) + random.choice(["", "user\n", " ", "\n\n"]) + "".join(mixed(random.randint(0, 8)))
                          + random.choice(["", " ", "\n"]) for _ in range(random.randint(1, 8)))
        elif kind == 8:  # like a tool
            function = {"name": f"f{index}", "description": "".join(mixed(5)), "parameters": {"type": "object"}}
            yield json.dumps({"type": "function", "function": function}, ensure_ascii=random.random() < .5, indent=random.choice([None, 2, 4]))
        else:
            yield random.choice(SCRIPTS) * random.randint(1, 20)
    for _ in range(count // 100):
        yield snippet(28_000)


def make_reference(folder, count):
    """Writes the reference file for the tokenizer in `folder`."""
    path = os.path.join(folder, "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = [token["content"] for token in json.load(open(path))["added_tokens"]]
    special = random.sample(special, min(60, len(special)))
    with open(os.path.join(folder, "reference.jsonl"), "w") as out:
        for text in texts(special, count):
            text = text.encode("utf-8", "ignore").decode("utf-8")
            ids = [tokenizer.encode(text, add_special_tokens=add).ids for add in (False, True)]
            out.write(json.dumps({"text": text, "plain": ids[0], "special": ids[1]}, ensure_ascii=False, separators=(",", ":")) + "\n")


random.seed(7)
if sys.argv[1] == "tokenizer":
    make_tokenizer()
else:
    make_reference(sys.argv[2], int(sys.argv[3]))
