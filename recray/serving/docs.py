"""The page at /docs: the OpenAPI document for people, in one file that loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid #8886; margin-top: 1.5rem }
h2 code { font-size: 1rem } h2 b { color: #2a7ae2; margin-right: .5rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem .6rem .2rem 0 }
td { border-top: 1px solid #8883; vertical-align: top }
textarea, input { width: 100%; box-sizing: border-box; font: 14px/1.4 ui-monospace, monospace }
pre { overflow: auto; background: #8881; padding: .6rem } button { margin: .5rem 0; padding: .3rem 1rem }
"""

_SCRIPT = """
document.querySelector('form').addEventListener('submit', async (event) => {
  event.preventDefault();
  const form = event.target, headers = {'content-type': 'application/json'};
  if (form.token.value) headers.authorization = 'Bearer ' + form.token.value;
  const out = document.querySelector('#answer');
  try {
    const url = location.pathname.replace(/docs$/, 'v1/recommend');
    const answer = await fetch(url, {method: 'POST', headers, body: form.body.value});
    out.textContent = answer.status + '\\n' + JSON.stringify(await answer.json(), null, 2);
  } catch (error) { out.textContent = String(error) }
});
"""


def page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document, with a form that asks POST /v1/recommend."""
    schemas = document["components"]["schemas"]
    parts = [
        _operation(path, method, spec, schemas)
        for path, methods in document["paths"].items()
        for method, spec in methods.items()
    ]
    example = escape(json.dumps({"history": ["item-1", "item-2"], "k": 5}))
    info = document["info"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(info['title'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['summary'])}. "
        'The same as <a href="openapi.json">openapi.json</a>.</p>'
        "<form><label>Token, if the server asks for one <input name=token type=password "
        "autocomplete=off></label><label>POST /v1/recommend <textarea name=body rows=4>"
        f"{example}</textarea></label><button>Ask</button></form><pre id=answer></pre>"
        f"{''.join(parts)}<script>{_SCRIPT}</script></body></html>"
    )


def _operation(path: str, method: str, spec: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td><code>{escape(p['name'])}</code><td>{p['in']}<td>{escape(_type(p['schema']))}</tr>"
        for p in spec.get("parameters", [])
    ]
    if "requestBody" in spec:
        model = schemas[spec["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/")[-1]]
        for name, field in model["properties"].items():
            rows.append(
                f"<tr><td><code>{escape(name)}</code><td>{escape(_type(field))}"
                f"<td>{escape(field.get('description', ''))}</tr>"
            )
    answers = "".join(
        f"<tr><td>{status}<td>{escape(answer['description'])}</tr>"
        for status, answer in spec["responses"].items()
    )
    return (
        f"<section><h2><b>{method.upper()}</b><code>{escape(path)}</code></h2><p>{escape(spec['summary'])}</p>"
        f"<table>{''.join(rows)}</table><table>{answers}</table></section>"
    )


def _type(field: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(part) for part in field["anyOf"]))
    kind = str(field.get("type", "any"))
    if kind == "array":
        return f"list of {_type(field['items'])}"
    if kind == "object" and isinstance(field.get("additionalProperties"), Mapping):
        return f"mapping to {_type(field['additionalProperties'])}"
    low, high = field.get("minimum"), field.get("maximum")
    return f"{kind} {low}..{high}" if low is not None and high is not None else kind
