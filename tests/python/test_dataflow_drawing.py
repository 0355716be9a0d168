"""Drawings of a pipeline: whatever the labels are, the drawing says what the graph says, and the same graph gives the same."""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsline.dataflow.drawing import mermaid, svg
from dsline.errors import InvalidArgumentError

SVG = "{http://www.w3.org/2000/svg}"

DIAMOND = {
    "nodes": [
        {"id": "read", "label": "shm://camera", "kind": "source"},
        {"id": "detect", "label": "map Detect\nordered", "kind": "map", "workers": 4},
        {"id": "count", "label": "count", "kind": "map", "workers": 1},
        {"id": "join", "label": "merge", "kind": "merge"},
        {"id": "write", "label": "file://boxes", "kind": "sink"},
    ],
    "edges": [
        {"from": "read", "to": "detect", "label": "8 x 6 MiB, block"},
        {"from": "read", "to": "count"},
        {"from": "detect", "to": "join"},
        {"from": "count", "to": "join", "label": None},
        {"from": "join", "to": "write"},
    ],
    "groups": [{"id": "main", "label": "this process", "nodes": ["join", "write"]}],
}


def drawn(graph):
    root = ET.fromstring(svg(graph))
    boxes = [
        tuple(float(r.get(k)) for k in ("x", "y", "width", "height"))
        for r in root.iter(f"{SVG}rect")
        if r.get("class") == "n"
    ]
    texts = [t.text for t in root.iter(f"{SVG}text")]
    paths = [p.get("d") for p in root.iter(f"{SVG}path") if p.get("class") == "e"]
    size = float(root.get("width")), float(root.get("height"))
    return size, boxes, texts, paths


def test_mermaid_of_a_diamond():
    assert mermaid(DIAMOND) == (
        "flowchart TD\n"
        '  subgraph g0["this process"]\n'
        '    n3["merge"]\n'
        '    n4(["file://boxes"])\n'
        "  end\n"
        '  n0(["shm://camera"])\n'
        '  n1["map Detect<br/>ordered<br/>4 workers"]\n'
        '  n2["count<br/>1 worker"]\n'
        '  n0 -->|"8 x 6 MiB, block"| n1\n'
        "  n0 --> n2\n"
        "  n1 --> n3\n"
        "  n2 --> n3\n"
        "  n3 --> n4\n"
    )


def test_svg_of_a_diamond():
    _, boxes, texts, paths = drawn(DIAMOND)
    read, detect, count, join, write = boxes
    assert read[1] < detect[1] == count[1] < join[1] < write[1]
    assert detect[0] < count[0]
    assert len(paths) == 5
    assert texts == [
        "this process",
        "8 x 6 MiB, block",
        "shm://camera",
        "map Detect",
        "ordered",
        "4 workers",
        "count",
        "1 worker",
        "merge",
        "file://boxes",
    ]
    # The edge from read to detect begins under the one and ends on top of the other.
    start = f"M{read[0] + read[2] / 2:.1f} {read[1] + read[3]:.1f}"
    assert paths[0].startswith(start)
    assert paths[0].endswith(f" {detect[0] + detect[2] / 2:.1f} {detect[1]:.1f}")


@st.composite
def graphs(draw):
    count = draw(st.integers(0, 12))
    # Without control characters that would be a new line of the label.
    text = st.text(max_size=20)
    nodes = [
        {
            "id": f"s{number}",
            "label": draw(text),
            "kind": draw(st.sampled_from(["source", "map", "sink"])),
            "workers": draw(st.integers(0, 3)),
        }
        for number in range(count)
    ]
    pairs = [(a, b) for b in range(count) for a in range(b)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=20)) if pairs else []
    edges = [{"from": f"s{a}", "to": f"s{b}", "label": draw(text)} for a, b in chosen]
    shuffled = draw(st.permutations(nodes))
    cut = draw(st.integers(0, count))
    groups = [{"id": "g", "label": draw(text), "nodes": [node["id"] for node in shuffled[:cut]]}]
    return {"nodes": shuffled, "edges": edges, "groups": groups}


@given(graphs())
@settings(max_examples=100, deadline=None)
def test_any_graph_is_drawn_whole(graph):
    (width, height), boxes, _texts, paths = drawn(graph)
    assert svg(graph) == svg(graph)
    assert len(boxes) == len(graph["nodes"])
    assert len(paths) == len(graph["edges"])
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width + 0.1 and y + h <= height + 0.1
    for one, (x, y, w, h) in enumerate(boxes):
        for ox, oy, ow, oh in boxes[:one]:
            assert x >= ox + ow or ox >= x + w or y >= oy + oh or oy >= y + h
    place = {node["id"]: box for node, box in zip(graph["nodes"], boxes, strict=True)}
    for edge in graph["edges"]:
        assert place[edge["from"]][1] + place[edge["from"]][3] < place[edge["to"]][1]
    text = mermaid(graph)
    assert text == mermaid(graph)
    assert text.count("-->") == len(graph["edges"])
    labels = re.findall(r'"([^"]*)"', text)
    assert text.count('"') == 2 * len(labels)
    for label in labels:
        for part in label.split("<br/>"):
            assert re.fullmatch(r"(?:[\w .,:+/=()-]|#\d+;)*", part)


@pytest.mark.parametrize(
    "label",
    [
        "</text><script>alert(1)</script>",
        '"]; click n0 "x',
        "a & b < c > d",
        "`*_~`",
        "end",
        "\x00\x1b[31m\ufffe\ud800",
        "日本 ü",
    ],
)
def test_labels_are_only_labels(label):
    graph = {"nodes": [{"id": "a", "label": label}], "edges": [], "groups": []}
    svg(graph).encode("utf-8")
    _, _, texts, _ = drawn(graph)
    assert texts == [re.sub("[\x00\x1b\ufffe\ud800]", "?", label)]
    line = mermaid(graph).splitlines()[1]
    inside = re.fullmatch(r'  n0\["([^"]*)"\]', line)[1]
    assert html.unescape(re.sub(r"#(\d+);", r"&#\1;", inside)) == html.unescape(
        re.sub(r"[^\w .,:+/=()-]", lambda found: f"&#{ord(found[0])};", label)
    )


def test_what_is_no_graph_is_refused():
    node = {"id": "a"}
    other = {"id": "b"}
    with pytest.raises(InvalidArgumentError, match="'a' comes twice"):
        mermaid({"nodes": [node, node], "edges": []})
    for draw in (mermaid, svg):
        with pytest.raises(InvalidArgumentError, match="'x', which is not there"):
            draw({"nodes": [node], "edges": [{"from": "a", "to": "x"}]})
        with pytest.raises(InvalidArgumentError, match="'y', which is not there"):
            draw({"nodes": [node], "groups": [{"nodes": ["y"]}]})
        with pytest.raises(InvalidArgumentError, match="two groups"):
            draw({"nodes": [node], "groups": [{"nodes": ["a"]}, {"nodes": ["a"]}]})
    ends = [{"from": "a", "to": "b"}, {"from": "b", "to": "a"}]
    with pytest.raises(InvalidArgumentError, match="cycle through 'a', 'b'"):
        svg({"nodes": [node, other], "edges": ends})
