"""Pages: what a person opens in a browser. Self-contained HTML, light and dark, no scripts.

Needs the extra `report` (jinja2, matplotlib), which is imported only when a page is made.

Does not know: models, transfers, how anything was measured. Place on the path: the face, like show.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from kvlink.errors import ConfigError

if TYPE_CHECKING:
    from kvlink.page.story import Story


def available() -> bool:
    """Whether the extra is installed."""
    return all(importlib.util.find_spec(name) for name in ("jinja2", "matplotlib"))


def require() -> None:
    """Raise ConfigError where the extra is not installed."""
    if not available():
        raise ConfigError("a report needs jinja2 and matplotlib: pip install 'kvlink[report]'")


def tables_page(report: dict[str, Any]) -> str:
    """The page of an evaluation: plots and all rows. `report`: what `kvlink eval --json` prints."""
    require()
    from kvlink.page.tables import render

    return render(report)


def story_page(story: Story) -> str:
    """The page of one transfer."""
    require()
    from kvlink.page.story import render

    return render(story)
