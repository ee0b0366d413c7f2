"""Self-contained HTML pages: style and script are embedded, and a policy forbids everything else."""

import base64
import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files


def fill_page(package: str, parts: Mapping[str, str]) -> bytes:
    """Return `page/page.html` of a package in UTF-8, with its `{{names}}` replaced by `parts`, which are HTML already.

    `style`, `script` and `policy` (the Content-Security-Policy) come from `page.css` and `page.js` next to it.
    """
    folder = files(package) / "page"
    template, style, script = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    values = {**parts, "policy": policy, "style": style, "script": script}
    # In one pass, so that placeholders in the parts stay as they are.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], template).encode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
