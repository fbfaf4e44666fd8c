"""What a model writes, as HTML that is safe to show: Markdown with tables, code in colours, TeX left for the browser.

Nothing of the text becomes a tag, an attribute or a request: HTML is shown as typed, images become links, and only
http, https and mailto links can be clicked. `Growing` renders an answer while it is written, at a cost that does not
grow with its length.
"""

import html
import re
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

LINK = re.compile(r"(https?:|mailto:)", re.IGNORECASE)
MATH = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False))  # never a single $: prices are not formulas
COLOURED_UP_TO = 50_000  # characters of one code block; longer ones stay plain


@cache
def _markdown() -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": False, "maxNesting": 30}).enable(["table", "strikethrough"])
    reader.validateLink = lambda url: bool(LINK.match(url))
    reader.inline.ruler.before("escape", "math", _inline_math)
    reader.block.ruler.before("fence", "math_block", _block_math, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    for name, rule in (
        ("fence", _fence),
        ("code_block", _fence),
        ("image", _image),
        ("link_open", _link),
        *((name, _sided) for name in ("bullet_list_open", "ordered_list_open", "blockquote_open", "table_open")),
        ("math", _math),
        ("math_block", _math),
        ("table_close", lambda *_: "</table></div>"),
    ):
        reader.renderer.rules[name] = rule
    return reader


def markdown(text: str, *, open_end: bool = False) -> str:
    """`open_end`: the text is not whole yet, so a last code block that is not closed stays without colours."""
    return "".join(_blocks(text, open_end)[0])


class Growing:
    """Markdown that grows at its end. `done` holds the HTML of blocks that cannot change any more, `last` that of the rest."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.last = ""
        self._start = 0  # of the last block, in the text
        self._text = ""

    def feed(self, text: str) -> None:
        """`text` is all there is so far, and begins with what was fed before."""
        if text == self._text:
            return
        self._text = text
        blocks, starts = _blocks(text[self._start :], open_end=True)
        if len(blocks) > 1:
            self.done += blocks[:-1]
            self._start += starts[-1]
        self.last = blocks[-1] if blocks else ""


def _blocks(text: str, open_end: bool) -> tuple[list[str], list[int]]:
    """HTML of each top-level block, and where each begins in the text."""
    reader, env = _markdown(), {"open_end": open_end, "lines": text.count("\n") + 1}
    tokens = reader.parse(text, env)
    groups: list[list[Token]] = []
    for token in tokens:
        if token.level == 0 and token.nesting >= 0:
            groups.append([])
        groups[-1].append(token)
    starts_of_lines = [0, *(found.end() for found in re.finditer(r"\r\n|\r|\n", text))]
    rendered = [reader.renderer.render(group, reader.options, env) for group in groups]
    return rendered, [starts_of_lines[(group[0].map or [0])[0]] for group in groups]


def code(text: str, language: str, *, colours: bool = True) -> str:
    name = re.sub(r"[^\w+#.-]", "", language.split(" ")[0])[:30] if language else ""
    body = (_coloured(text, name) if colours and name else None) or html.escape(text)
    return (
        f'<div class="code"><div class="code-head"><span>{html.escape(name)}</span>'
        f'<button type="button" data-do="copy-code"></button></div><pre tabindex="0"><code>{body}</code></pre></div>'
    )


def _coloured(text: str, language: str) -> str | None:
    if len(text) > COLOURED_UP_TO:
        return None
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None
    return highlight(text, lexer, HtmlFormatter(nowrap=True, classprefix="c-"))


def _fence(tokens: list[Token], place: int, options: Any, env: dict[str, Any]) -> str:
    token = tokens[place]
    still_open = env["open_end"] and bool(token.map) and token.map[1] >= env["lines"]
    return code(token.content, token.info.strip(), colours=not still_open)


def _image(tokens: list[Token], place: int, options: Any, env: dict[str, Any]) -> str:
    """An image would be fetched, and fetching tells. So it is named, and the person may follow."""
    source, words = str(tokens[place].attrs.get("src", "")), html.escape(tokens[place].content)
    if not LINK.match(source):
        return f'<span class="image">{words}</span>'
    address = html.escape(source)
    return f'<a class="image" href="{address}" target="_blank" rel="noopener noreferrer nofollow">{words or address}</a>'


def _link(tokens: list[Token], place: int, options: Any, env: dict[str, Any]) -> str:
    tokens[place].attrSet("target", "_blank")
    tokens[place].attrSet("rel", "noopener noreferrer nofollow")
    return _markdown().renderer.renderToken(tokens, place, options, env)


def _sided(tokens: list[Token], place: int, options: Any, env: dict[str, Any]) -> str:
    """Bullets, bars and columns begin on the side where their script does."""
    tokens[place].attrSet("dir", "auto")
    made = _markdown().renderer.renderToken(tokens, place, options, env)
    return f'<div class="table">{made}' if tokens[place].type == "table_open" else made


def _math(tokens: list[Token], place: int, options: Any, env: dict[str, Any]) -> str:
    token = tokens[place]
    tag, kind = ("div", " display") if token.block else ("span", " display" if token.info == "display" else "")
    shown = html.escape(token.markup + token.content + token.meta["close"])
    if not token.meta["close"]:
        return f"<p>{shown}</p>"
    return f'<{tag} class="math{kind}" data-tex="{html.escape(token.content)}">{shown}</{tag}>'


def _inline_math(state: StateInline, silent: bool) -> bool:
    for opening, closing, display in MATH:
        if not state.src.startswith(opening, state.pos):
            continue
        begin = state.pos + len(opening)
        end = state.src.find(closing, begin)
        if end < 0 or not state.src[begin:end].strip():
            return False
        if not silent:
            token = state.push("math", "", 0)
            token.content, token.markup, token.meta = state.src[begin:end], opening, {"close": closing}
            token.info = "display" if display else ""
        state.pos = end + len(closing)
        return True
    return False


def _block_math(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    """A formula that begins a line and ends one, with blank lines between or not."""
    begin = state.bMarks[first] + state.tShift[first]
    opened = next((kind for kind in MATH if kind[2] and state.src.startswith(kind[0], begin)), None)
    if opened is None or state.is_code_block(first):
        return False
    opening, closing, _ = opened
    start = begin + len(opening)
    for line in range(first, last):
        if line > first and not state.isEmpty(line) and state.sCount[line] < state.blkIndent:
            return False
        low = start if line == first else state.bMarks[line] + state.tShift[line]
        text = state.src[low : state.eMarks[line]].rstrip()
        if closing in text:
            content = state.src[start : low + len(text) - len(closing)]
            if text.index(closing) != len(text) - len(closing) or not content.strip():
                return False
            return silent or _push_math(state, content, opening, closing, first, line + 1)
    if state.env["open_end"] and state.level == 0:  # its end may still come
        return silent or _push_math(state, state.src[start:], opening, "", first, last)
    return False


def _push_math(state: StateBlock, content: str, opening: str, closing: str, first: int, end: int) -> bool:
    token = state.push("math_block", "", 0)
    token.block, token.content, token.markup, token.meta = True, content, opening, {"close": closing}
    token.map = [first, end]
    state.line = end
    return True
