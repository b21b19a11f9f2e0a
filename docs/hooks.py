"""MkDocs hook: docstrings name things by Sphinx roles (``:class:`~bayesmeta.MAML```); show them as plain code."""

import re

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>(~?)([\w.]+)</code>")


def on_page_content(html, **_):
    """Drop the role, and after a tilde all but the last part of the name."""
    return _ROLE.sub(lambda m: f"<code>{m[2].rsplit('.', 1)[-1] if m[1] else m[2]}</code>", html)
