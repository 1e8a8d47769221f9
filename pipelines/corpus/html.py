"""The visible text of HTML, with the standard library's parser: no scripts, styles or heads; a line for each block."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HIDDEN = frozenset({"script", "style", "head", "template", "noscript", "svg", "math"})
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption", "figure",
    "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "option", "p",
    "pre", "section", "table", "td", "th", "tr", "ul", "body", "html",
})  # fmt: skip
_SPACES = re.compile(r"[ \t\r\f\v\xa0]+")
_GAPS = re.compile(r" ?\n ?(?:\n ?)+")


class _Visible(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif tag in _BLOCKS:
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def visible_text(text: str) -> str:
    """The text a reader would see; `text` itself if it holds no tag and no reference."""
    if "<" not in text and "&" not in text:
        return text
    parser = _Visible()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError:  # the parser's answer to `<![` without a name it knows: the rest is no HTML
        pass
    return _GAPS.sub("\n\n", _SPACES.sub(" ", "".join(parser.parts))).strip()
