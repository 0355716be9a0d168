"""Drawings of a pipeline: Mermaid text and SVG, from the neutral structure that a plan gives.

A graph is ``{"nodes": [{"id", "label", "kind", "workers"}], "edges": [{"from", "to", "label"}], "groups": [{"id", "label",
"nodes"}]}``. `kind`, `workers`, the labels of edges and the groups may be missing. Groups are what runs in one place and
follow one another along the edges. The same graph gives the same drawing, byte by byte. Labels may hold anything.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsline.errors import InvalidArgumentError

__all__ = ["mermaid", "svg"]

Graph = Mapping[str, Sequence[Mapping[str, Any]]]

_LETTER = 7.3  # px, of the font's 12 px in a monospaced face
_LINE = 16
_PAD = 12
_GAP_X, _GAP_Y = 26, 46
_FILLS = {"source": "#dff0e0", "sink": "#e0e8f6"}
_STYLE = (
    "text{font:12px ui-monospace,monospace;fill:#1a1a1a;text-anchor:middle}"
    ".n{stroke:#444}.g{fill:#f6f6f6;stroke:#bbb;stroke-dasharray:4 3}.gl{fill:#666;text-anchor:start}"
    ".e{fill:none;stroke:#555}.el{fill:#555;paint-order:stroke;stroke:#fff;stroke-width:4px}"
)


def mermaid(graph: Graph) -> str:
    """Write a graph as a Mermaid flowchart.

    Raises
    ------
    InvalidArgumentError
        A node comes twice, or an edge or group speaks of one that is not there.
    """
    nodes, edges, groups = _checked(graph)
    names = {name: f"n{number}" for number, name in enumerate(nodes)}
    lines = ["flowchart TD"]
    drawn: set[str] = set()

    def node(name: str, indent: str) -> str:
        drawn.add(name)
        text = "<br/>".join(map(_mermaid_text, _text_of(nodes[name])))
        left, right = ('(["', '"])') if nodes[name].get("kind") in _FILLS else ('["', '"]')
        return f"{indent}{names[name]}{left}{text}{right}"

    for number, group in enumerate(groups):
        lines.append(f'  subgraph g{number}["{_mermaid_text(str(group.get("label", "")))}"]')
        lines += [node(name, "    ") for name in group["nodes"]]
        lines.append("  end")
    lines += [node(name, "  ") for name in nodes if name not in drawn]
    for edge in edges:
        label = _mermaid_text(str(edge.get("label") or ""))
        arrow = f'-->|"{label}"|' if label else "-->"
        lines.append(f"  {names[edge['from']]} {arrow} {names[edge['to']]}")
    return "\n".join(lines) + "\n"


def svg(graph: Graph) -> str:
    """Draw a graph as an SVG picture, from top to bottom.

    Raises
    ------
    InvalidArgumentError
        A node comes twice, or an edge or group speaks of one that is not there, or there is a cycle.
    """
    nodes, edges, groups = _checked(graph)
    sizes = {name: _size(_text_of(node)) for name, node in nodes.items()}
    layers = _layers(nodes, edges, groups)
    columns = [sum(sizes[name][0] for name in layer) + _GAP_X * (len(layer) - 1) for layer in layers]
    labels = max((len(str(edge.get("label") or "")) for edge in edges), default=0) * _LETTER
    titles = max((len(str(group.get("label", ""))) for group in groups), default=0) * _LETTER
    width = max([*columns, labels, titles, 60.0]) + 4 * _PAD
    boxes: dict[str, tuple[float, float, float, float]] = {}
    top = 3.0 * _PAD
    for layer, column in zip(layers, columns, strict=True):
        left = (width - column) / 2
        for name in layer:
            boxes[name] = (left, top, *sizes[name])
            left += sizes[name][0] + _GAP_X
        top += max(sizes[name][1] for name in layer) + _GAP_Y
    height = top - _GAP_Y + 2 * _PAD if layers else 4 * _PAD
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
    ]
    for group in groups:
        parts += _drawn_group(group, boxes)
    for edge in edges:
        parts += _drawn_edge(edge, boxes)
    for name, node in nodes.items():
        parts += _drawn_node(node, boxes[name])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _checked(graph: Graph) -> tuple[dict[str, Mapping[str, Any]], list[Any], list[Any]]:
    nodes: dict[str, Mapping[str, Any]] = {}
    for node in graph["nodes"]:
        if node["id"] in nodes:
            raise InvalidArgumentError(f"node {node['id']!r} comes twice")
        nodes[node["id"]] = node
    edges, groups = list(graph.get("edges", ())), list(graph.get("groups", ()))
    used = [edge[end] for edge in edges for end in ("from", "to")]
    members = [name for group in groups for name in group["nodes"]]
    for name in [*used, *members]:
        if name not in nodes:
            raise InvalidArgumentError(f"an edge or a group speaks of node {name!r}, which is not there")
    if len(set(members)) < len(members):
        raise InvalidArgumentError("a node is in two groups")
    return nodes, edges, [group for group in groups if group["nodes"]]


def _text_of(node: Mapping[str, Any]) -> list[str]:
    lines = str(node.get("label") or node["id"]).split("\n")
    workers = node.get("workers") or 0
    return [*lines, f"{workers} workers" if workers > 1 else "1 worker"] if workers else lines


def _mermaid_text(text: str) -> str:
    """Whatever Mermaid, Markdown or HTML could read as its own becomes a number."""
    return re.sub(r"[^\w .,:+/=()-]", lambda found: f"#{ord(found[0])};", text.replace("\n", " "))


# What XML has no way to say.
_ILLEGAL = re.compile("[^\t\n\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _xml(text: str) -> str:
    return html.escape(_ILLEGAL.sub("?", text))


def _size(lines: Sequence[str]) -> tuple[float, float]:
    return max(map(len, lines)) * _LETTER + 2 * _PAD, len(lines) * _LINE + _PAD


def _layers(
    nodes: Mapping[str, Any], edges: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Each node below all those before it; in a layer, below the middle of those it comes from."""
    before: dict[str, list[str]] = {name: [] for name in nodes}
    for edge in edges:
        before[edge["to"]].append(edge["from"])
    depth: dict[str, int] = {}
    left = list(nodes)
    while left:
        ready = [name for name in left if all(other in depth for other in before[name])]
        if not ready:
            raise InvalidArgumentError(f"the graph has a cycle through {', '.join(map(repr, left))}")
        for name in ready:
            depth[name] = max((depth[other] + 1 for other in before[name]), default=0)
        left = [name for name in left if name not in depth]
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name in nodes:
        layers[depth[name]].append(name)
    group_of = {name: number for number, group in enumerate(groups) for name in group["nodes"]}
    place: dict[str, float] = {}
    for layer in layers:
        middle = {
            name: sum(place[other] for other in before[name]) / len(before[name]) if before[name] else 0.5
            for name in layer
        }
        layer.sort(
            key=lambda name: (middle[name], group_of.get(name, -1))
        )  # stable: else in the order of the graph
        place.update({name: (at + 0.5) / len(layer) for at, name in enumerate(layer)})
    return layers


def _drawn_group(group: Mapping[str, Any], boxes: Mapping[str, tuple[float, ...]]) -> Iterator[str]:
    inside = [boxes[name] for name in group["nodes"]]
    left, top = min(box[0] for box in inside) - _PAD, min(box[1] for box in inside) - 1.6 * _PAD
    right = max(box[0] + box[2] for box in inside) + _PAD
    bottom = max(box[1] + box[3] for box in inside) + 0.6 * _PAD
    yield (
        f'<rect class="g" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="6"/>'
    )
    label = _xml(str(group.get("label", "")))
    yield f'<text class="gl" x="{left + 5:.1f}" y="{top + 13:.1f}">{label}</text>'


def _drawn_edge(edge: Mapping[str, Any], boxes: Mapping[str, tuple[float, ...]]) -> Iterator[str]:
    start, end = boxes[edge["from"]], boxes[edge["to"]]
    x1, y1, x2, y2 = start[0] + start[2] / 2, start[1] + start[3], end[0] + end[2] / 2, end[1]
    middle = (y1 + y2) / 2
    yield (
        f'<path class="e" d="M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}" '
        'marker-end="url(#a)"/>'
    )
    if edge.get("label"):
        yield f'<text class="el" x="{(x1 + x2) / 2:.1f}" y="{middle + 1:.1f}">{_xml(str(edge["label"]))}</text>'


def _drawn_node(node: Mapping[str, Any], box: tuple[float, float, float, float]) -> Iterator[str]:
    left, top, width, height = box
    fill = _FILLS.get(str(node.get("kind")), "#fdf6dd" if node.get("workers") else "#fff")
    yield (
        f'<rect class="n" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4" fill="{fill}"/>'
    )
    for number, line in enumerate(_text_of(node)):
        y = top + _PAD / 2 + _LINE * (number + 0.75)
        yield f'<text x="{left + width / 2:.1f}" y="{y:.1f}">{_xml(line)}</text>'
