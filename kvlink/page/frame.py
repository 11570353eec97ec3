"""The frame of all pages: templates that escape what they are given.

Does not know: what a page shows. Place on the path: inside a page.
"""

from __future__ import annotations

from typing import Any

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("kvlink.page", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def fill(template: str, **values: Any) -> str:
    """The template with its values; texts are escaped, SVG of `plots` is marked as safe there."""
    return _ENVIRONMENT.get_template(template).render(**values)
