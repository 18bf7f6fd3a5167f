"""What the pages of this package share: templates in which everything from outside is escaped and made visible."""

from typing import Any

import jinja2

from opd_jax.analysis import token_view


def make_environment() -> jinja2.Environment:
    """Templates of this package: everything escaped, what does not print made visible, a missing name an error."""
    loader = jinja2.PackageLoader("opd_jax.analysis", ".")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_visible)


def _visible(value: Any) -> Any:
    return token_view.visible(value) if type(value) is str else value
