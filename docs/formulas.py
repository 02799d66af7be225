"""Formulas as MathML, made when the site is built: browsers fetch no script for them.

Run by MkDocs after it has rendered a page, where pymdownx.arithmatex has marked what is
between dollars.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_MARKED = re.compile(
  r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(content: str, **_: Any) -> str:
  """Called by MkDocs: the page with its formulas typeset."""
  return _MARKED.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
  _, bracket, formula = match.groups()
  display = "block" if bracket == "[" else "inline"
  return convert(html.unescape(formula), display=display)
