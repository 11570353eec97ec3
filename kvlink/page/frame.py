"""The frame of all pages: templates that escape what they are given, and keep it apart.

Every text that a template shows passes the gate for foreign words: what a terminal obeys is written as its
escape here too. `|apart` puts it into an element of its own (`<bdi>`), so that no letter of another script
and no mark in it changes the order of what stands around it.

Does not know: what a page shows. Place on the path: inside a page.
"""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

from kvlink.quoting import shown_text


def _shown(value: Any) -> Any:
    """What a template is about to show. Markup is a template's own, and SVG of `plots`."""
    return shown_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _apart(value: Any, kind: str = "") -> Markup:
    """A foreign text in an element of its own. `kind`: its class, one of the template's."""
    named = Markup(' class="{}"').format(kind) if kind else ""
    return Markup("<bdi{}>{}</bdi>").format(named, _shown(str(value)))


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("kvlink.page", "templates"),
    autoescape=True,
    finalize=_shown,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["apart"] = _apart


def fill(template: str, **values: Any) -> str:
    """The template with its values; texts are escaped, SVG of `plots` is marked as safe there."""
    return _ENVIRONMENT.get_template(template).render(**values)
