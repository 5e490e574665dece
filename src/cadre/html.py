"""Pages made of templates that lie beside the code which fills them in."""

from __future__ import annotations

import jinja2


def page_environment(package: str) -> jinja2.Environment:
    """The templates of a package. What they are given is escaped, and a name that they are not given is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package, ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
