"""What people see in a browser. Only Jinja is loaded, so that Airflow's API server can render it, too."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from mlpipe.pages import svg


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: read(name)),
    )
    environment.globals["style"] = Markup(read("style.css") + svg.STYLE)  # noqa: S704 - constants
    return environment


def read(name: str) -> str:
    """The text of a file of this folder."""
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def render(name: str, **values: Any) -> str:
    """A page from the template of that name; values are escaped."""
    return _environment().get_template(name).render(**values)
