"""Turns as DiffusionGemma writes them, good and bad, each with what it means by construction. Knows no parser."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

GENERATED = 100
LONG = 1500  # characters of an argument that is sent before its call is complete

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "zip": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "where": {"$ref": "#/$defs/Place"},
    },
    "$defs": {"Place": {"type": "object", "properties": {"name": {"type": "string"}, "lat": {"type": "number"}}}},
}
TOOLS: Mapping[str, object] = {"get_weather": WEATHER, "files.write-text": {}, "now": {}, "f": None}


@dataclass(frozen=True)
class Called:
    """A call; one that is broken off has the JSON text so far instead of arguments."""

    name: str
    arguments: Mapping[str, Any] | str


@dataclass(frozen=True)
class Transcript:
    """A turn's text, what was asked for, and what the text means."""

    name: str
    text: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[Called, ...] = ()
    tools: Mapping[str, object] | None = None
    cut: bool = False  # by the token limit
    parallel: bool = True
    primed: str = ""


def corpus() -> tuple[Transcript, ...]:
    """The same ones every time."""
    return (*_plain(), *_channels(), *_good_calls(), *_bad_calls(), *_cut_calls(), *_options(), *_generated())


# ---------------------------------------------------------------- written by hand

TEXTS = (
    "Hello.",
    "  indented, and a line at the end\n",
    "a < b, c <= d, <p>HTML</p>, x << 2, y <| z |> w",
    'if (a<b) { f("x"); } // <|channel, <|tool_call, <turn',
    "```python\ncall = {'a': [1, {'b': 2}]}\nprint(f\"{call!r}<|\")\n```",
    "\u00fcn\u00efc\u00f6d\u00e9 \u6f22\u5b57 \U0001f389 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u2066rtl\u2069",
    "<|channel without its last character, <| channel> with a space",
    "call:get_weather{city:Paris} is no call without its marker",
    "<",
    "<<<<",
    "<|",
    '<|"',
    "ends like a marker <|tool_cal",
    "<mask> and <eos> are words",
    "| a | b |\n|---|---|\n| 1 | <2 |\n",
    "",
)


def _plain() -> Iterator[Transcript]:
    for index, text in enumerate(TEXTS):
        yield Transcript(f"plain {index}", text, content=text)
        yield Transcript(f"plain {index}, ended", text + "<turn|>", content=text, tools=TOOLS)
        if text.strip():
            thinking = f"<|channel>thought\nHm.\n{text}\n<channel|>\n{text}"
            yield Transcript(f"thought {index}", thinking, f"Hm.\n{text}".strip(), text.strip())


def _channels() -> Iterator[Transcript]:
    rows = (
        ("empty thought", "<|channel>thought\n<channel|>Hi", "", "Hi"),
        ("empty thought, white space", "<|channel>thought\n \n<channel|>\n\n", "", ""),
        ("no label's end", "<|channel>thought<channel|>Hi", "", "Hi"),
        ("label and space", "<|channel>thought and so on<channel|>Hi", "and so on", "Hi"),
        ("no label", "<|channel>So: it is 4.<channel|>4", "So: it is 4.", "4"),
        ("one word", "<|channel>Hm<channel|>4", "Hm", "4"),
        ("label is one line", "<|channel>\nHm<channel|>4", "Hm", "4"),
        ("a long label", f"<|channel>{'x' * 32}\nHm<channel|>4", "Hm", "4"),
        ("too long a label", f"<|channel>{'x' * 33}\nHm<channel|>4", "x" * 33 + "\nHm", "4"),
        ("another label", "<|channel>analysis\nHm<channel|>4", "Hm", "4"),
        ("final", "<|channel>thought\nHm<channel|><|channel>final\n4", "Hm", "4"),
        ("final, closed", "<|channel>final\n4<channel|>\n", "", "4"),
        ("unclosed", "<|channel>thought\nHm, so", "Hm, so", ""),
        ("closed by the turn's end", "<|channel>thought\nHm, so\n<turn|>\n", "Hm, so", ""),
        ("cut in the label", "<|channel>thou", "", ""),
        ("two", "<|channel>thought\nA\n<channel|>x <|channel>thought\n B<channel|>y", "A\n\nB", "x y"),
        ("one in another", "<|channel>thought\nA<|channel>thought\nB<channel|>y", "A\n\nB", "y"),
        ("an empty one between", "<|channel>thought\nA<channel|><|channel>thought\n<channel|>\ny", "A", "y"),
        ("after the answer", "y\n<|channel>thought\nA\n<channel|>\n", "A", "y"),
        ("white space first", "\n<|channel>thought\nA\n<channel|>\n\n  y\n\n z \n", "A", "y\n\n z"),
        ("closed twice", "<|channel>thought\nA<channel|><channel|>y<channel|>", "A", "y"),
        ("quote markers", '<|channel>thought\n<|"|>A<|"|><channel|>say <|"|>y<|"|>', '"A"', 'say "y"'),
        ("markers of prompts", "<|think|>a<|tool>b<tool|>c<tool_response|>d<|image|>", "", "abcd"),
        ("a marker made of two", "a <|chan<|think|>nel>b", "", "a  b"),
        ("the turn's end", "a<turn|>\n<|turn>user\nb", "", "a"),
        ("a new turn", "a<|turn>user\nb", "", "a"),
    )
    for name, text, reasoning, content in rows:
        yield Transcript(f"channel: {name}", text, reasoning, content, tools=TOOLS, cut=name.startswith("cut"))


def _good_calls() -> Iterator[Transcript]:
    rows: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
        ("Gemma's string", 'get_weather{city:<|"|>Paris<|"|>,days:3}', {"city": "Paris", "days": 3}),
        ("JSON", 'get_weather{"city": "Paris", "days": 3}', {"city": "Paris", "days": 3}),
        ("both", 'get_weather{"city": <|"|>Paris<|"|>, days: 3}', {"city": "Paris", "days": 3}),
        ("quoted keys", 'f{<|"|>a b<|"|>:1,<|"|>c:d<|"|>:[{<|"|>e<|"|>:{}}]}', {"a b": 1, "c:d": [{"e": {}}]}),
        ("a bare string", "get_weather{city:New York,zip:02134}", {"city": "New York", "zip": "02134"}),
        ("a string's type", "get_weather{city:12,days:12,zip:null}", {"city": "12", "days": 12, "zip": None}),
        ("a reference", "get_weather{where:{name:7,lat:7}}", {"where": {"name": "7", "lat": 7}}),
        (
            "literals",
            "f{a:true,b:False,c:null,d:None,e:-1,f:1.5e-3,g:[]}",
            dict(zip("abcdefg", _LITERALS, strict=True)),
        ),
        ("odd numbers", "f{a:+5,b:.5,c:5.,d:007,e:1e,f:12:30}", _ODD_NUMBERS),
        ("no arguments", "now{}", {}),
        ("no braces", "now", {}),
        ("white space", 'f {\n  "a" : [ 1 , 2 , ] ,\n}\n', {"a": [1, 2]}),
        ("a brace too many", "f{a:1}}", {"a": 1}),
        ("escapes", r'f{"a": "\"\\\n\u00e9\ud83c\udf89\/", "b\n": "<"}', {"a": '"\\\n\u00e9\U0001f389/', "b\n": "<"}),
        ("escapes of nothing", r'f{"a": "C:\Users\x \u12"}', {"a": "C:\\Users\\x \\u12"}),
        ("raw line breaks", 'f{"a": "1\n\t2"}', {"a": "1\n\t2"}),
        ("quote marker in JSON's", 'f{"a": "x<|"|>y"}', {"a": 'x"y'}),
        ("braces in strings", 'f{a:<|"|>}{][,:"\\<|"|>,b:"}{\\""}', {"a": '}{][,:"\\', "b": '}{"'}),
        ("nearly markers in strings", 'f{a:<|"|><|tool_call <|" |"|> <<|"|>}', {"a": '<|tool_call <|" |"|> <'}),
        ("odd names", 'files.write-text{path:<|"|>a<|"|>}', {"path": "a"}),
        ("long", f'files.write-text{{text:<|"|>{_LONG_TEXT}<|"|>,n:1}}', {"text": _LONG_TEXT, "n": 1}),
    )
    for name, body, arguments in rows:
        called = Called(body.split("{")[0].strip(), arguments)
        yield Transcript(
            f"call: {name}", f"<|tool_call>call:{body}<tool_call|>", calls=(called,), tools=TOOLS, cut="long" in name
        )
    one = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    x, thought = Called("f", {"a": "x"}), "<|channel>thought\nHm"
    yield Transcript("calls: next to each other", one * 3 + "<|tool_response>", calls=(x,) * 3, tools=TOOLS)
    yield Transcript("calls: ended by the next", one[:-12] * 2 + "<turn|>", calls=(x, x), tools=TOOLS)
    yield Transcript("calls: white space", f"\n{one}\n{one}\n", calls=(x, x), tools=TOOLS)
    yield Transcript("calls: in an open thought", f"{thought}{one}", "Hm", calls=(x,), tools=TOOLS)
    yield Transcript("calls: text around", f"A:\n{one}\nB:\n{one} C", content="A:\n\nB:\n C", calls=(x, x), tools=TOOLS)
    yield Transcript("calls: no call", "<|tool_call>: f{a:x}<tool_call|>", calls=(x,), tools=TOOLS)
    yield Transcript("calls: results made up", f"{one}<|tool_response>response:f{{}}", calls=(x,), tools=TOOLS)
    yield Transcript("calls: a thought behind", f"{one}{thought}", "Hm", calls=(x,), tools=TOOLS)


_LITERALS: tuple[Any, ...] = (True, False, None, None, -1, 1.5e-3, [])
_ODD_NUMBERS = {"a": 5, "b": 0.5, "c": 5.0, "d": "007", "e": "1e", "f": "12:30"}
_LONG_TEXT = "".join(f'{n}: "if a<b: {{f[{n}]}}"\n' for n in range(1000))[:LONG]


def _bad_calls() -> Iterator[Transcript]:
    bodies = (
        'call:f{a:<|"|>x<|"|>',
        "call:f{a:{b:1}",
        "call:f{a:[1,2}",
        "call:f{a:1]",
        'call:f{a:<|"|>x}',
        'call:f{a:"x}',
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:,b:1}",
        "call:f{,}",
        "call:f{a:1 {b:2}",
        'call:f{a:<|"|>x<|"|>y}',
        "call:f[1,2]",
        "call:f(a=1)",
        "call:{a:1}",
        "call:",
        '{"name": "f", "arguments": {}}',
        "f{a:1}",
        "call:unknown{a:1}",
        "call:unknown",
        "call:get weather{city:Paris}",
        "I would like to call the function f, but " + "I do not know how " * 20,
    )
    for body in bodies:
        shown = body.replace('<|"|>', '"').strip()
        yield Transcript(f"bad: {body[:40]}", f"<|tool_call>{body}<tool_call|>", content=shown, tools=TOOLS)
        mixed = f"A <|tool_call>{body}<tool_call|><|tool_call>call:now{{}}<tool_call|>"
        yield Transcript(f"bad, then good: {body[:40]}", mixed, "", f"A {shown}", (Called("now", {}),), TOOLS)
    yield Transcript("bad: open at the end", '<|tool_call>call:f{a:<|"|>x<turn|>', content='call:f{a:"x', tools=TOOLS)
    early = "call:f{a}" + " and so on" * 120
    yield Transcript("bad: early", f"<|tool_call>{early}<tool_call|>", content=early, tools=TOOLS)
    yield Transcript("bad: only markers", "<|tool_call><tool_call|><tool_call|>a", content="a", tools=TOOLS)
    good = "<|tool_call>call:f{a:1} and more<tool_call|>"
    yield Transcript("bad: text behind", good, content="and more", calls=(Called("f", {"a": 1}),), tools=TOOLS)
    text = json.dumps(_LONG_TEXT)[1:-1]
    long = f'<|tool_call>call:f{{a:<|"|>{_LONG_TEXT}<|"|> oops}}<tool_call|>'
    broken = Called("f", f'{{"a": "{text}"')
    yield Transcript("bad: long", long, content="oops}", calls=(broken,), tools=TOOLS)


def _cut_calls() -> Iterator[Transcript]:
    rows = (
        ("{", "{"),
        ("{ci", "{"),
        ('{city:<|"|>Par', '{"city": "Par'),
        ('{city:<|"|>Paris<|"|>', '{"city": "Paris"'),
        ('{city:<|"|>Paris<|"|>,da', '{"city": "Paris"'),
        ("{days:12", '{"days": '),
        ("{a:[1,2", '{"a": [1, '),
        ('{a:{b:<|"|>x<|"|>},c:{', '{"a": {"b": "x"}, "c": {'),
        ('{"a": "x\\', '{"a": "x'),
        ('{"a": "x\\u00e', '{"a": "x'),
    )
    for body, json_text in rows:
        text = f"Yes.<|tool_call>call:get_weather{body}"
        yield Transcript(
            f"cut: {body}", text, content="Yes.", calls=(Called("get_weather", json_text),), tools=TOOLS, cut=True
        )
    for body in ("", "call", "call:get_wea"):
        yield Transcript(f"cut: {body}", f"<|tool_call>{body}", content=body, tools=TOOLS, cut=True)


def _options() -> Iterator[Transcript]:
    call = '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'
    x = Called("f", {"a": "x"})
    yield Transcript("no tools", f"A {call} B", content='A call:f{a:"x"} B')
    yield Transcript("no tools, thinking", f"<|channel>thought\nHm{call}", "Hm", 'call:f{a:"x"}')
    yield Transcript("one call only", f"A\n{call} B {call}", content="A", calls=(x,), tools=TOOLS, parallel=False)
    bad = "<|tool_call>call:g{}<tool_call|>"
    yield Transcript("one good call only", f"{bad}{call}{call}", "", "call:g{}", (x,), TOOLS, parallel=False)
    yield Transcript(
        "primed with a name", 'a:<|"|>x<|"|>}<tool_call|>', calls=(x,), tools=TOOLS, primed="<|tool_call>call:f{"
    )
    yield Transcript(
        "primed with a call", 'f{a:<|"|>x<|"|>}<tool_call|>', calls=(x,), tools=TOOLS, primed="<|tool_call>call:"
    )
    yield Transcript(
        "primed, malformed", "no{<tool_call|>", content="call:no{", tools=TOOLS, primed="<|tool_call>call:"
    )
    yield Transcript("primed with a thought", "Hm\n<channel|>\nA", "Hm", "A", primed="<|channel>thought\n")


# ---------------------------------------------------------------- generated

WORDS = (
    "Paris",
    "",
    " ",
    "true",
    "12",
    "null",
    'say "hi"',
    "a, b: {c} [d]",
    "1\n2\t3\r\n",
    "C:\\n\\path",
    "\u6f22\u5b57 \U0001f389",
)
STRINGS = (*WORDS, *(text for text in TEXTS if text))
KEYS = ("city", "n_days", "Content-Type", "\u043a\u043b\u044e\u0447", "two words", "x1")
NOTHING = ("", "", "\n")
THOUGHTS = ("Hm.", "1. a<b\n2. {x}\n\n3. call:f{}", "The user wants \u201cParis\u201d.", "")


def _generated() -> Iterator[Transcript]:
    for seed in range(GENERATED):
        yield _transcript(seed, random.Random(seed))


def _transcript(seed: int, draw: random.Random) -> Transcript:
    """Thoughts, text and calls in turns' usual order, with white space between them."""
    parts: list[str] = []
    shown: list[str] = []
    calls: list[Called] = []

    def show(*texts: str) -> str:
        shown.append(draw.choice(texts))
        parts.append(shown[-1])
        return shown[-1]

    thoughts = [draw.choice(THOUGHTS) for _ in range(draw.choice((0, 1, 1, 2)))]
    for thought in thoughts:
        parts.append(f"<|channel>thought\n{thought}{draw.choice(NOTHING)}<channel|>")
        show("", "\n", " \n")
    opening = show("", "Let me look.\n", *TEXTS)
    for _ in range(draw.randrange(5)):
        name, arguments = draw.choice(("f", "now", "files.write-text")), _object(draw, 2)
        write = draw.choice((_gemma, _gemma, json.dumps, _plain_json))
        parts.append(f"<|tool_call>call:{name}{write(arguments)}<tool_call|>")
        calls.append(Called(name, arguments))
        show(*NOTHING, "\nAnd then:\n")
    content = "".join(shown)
    if thoughts or calls:
        content = content.rstrip()
    if thoughts or (calls and not opening.strip()):
        content = content.lstrip()
    text = "".join(parts) + draw.choice(("", "<turn|>", "<|tool_response>"))
    reasoning = "\n\n".join(thought for thought in thoughts if thought)
    return Transcript(f"seed {seed}", text, reasoning, content, tuple(calls), TOOLS)


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    return {key: _value(draw, depth) for key in draw.sample(KEYS, draw.randrange(4))}


def _value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(7 if depth else 5)
    if kind == 5:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 6:
        return _object(draw, depth - 1)
    return (
        draw.choice(STRINGS),
        draw.choice(STRINGS),
        draw.randrange(-9, 999),
        draw.random() * 1e-3,
        draw.random() < 0.5,
    )[kind]


def _gemma(value: object) -> str:
    """As Gemma's chat template writes arguments."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_gemma(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_gemma, value)) + "]"
    return str(value)


def _plain_json(value: object) -> str:
    """As the demo's chat template writes them."""
    return json.dumps(value, ensure_ascii=False)
