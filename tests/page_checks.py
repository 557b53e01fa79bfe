"""What every page must be: well-formed, self-contained, accessible, safe."""

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "rect", "line", "circle", "path", "col"}


class Page(HTMLParser):
    """Reads a page: its problems, ids, attributes, texts by id, and the contents of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.problems, self.ids, self.attributes, self.open = [], [], [], []
        self.texts, self.scripts, self.tags = {}, {}, []
        self.feed(text)
        self.close()
        self.problems += [f"never closed: {tag}" for tag, _ in self.open]

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.attributes += [(tag, name, value) for name, value in attributes.items()]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1][0] != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        for tag, id in self.open:
            if id:
                kept = self.scripts if tag == "script" else self.texts
                kept[id] = kept.get(id, "") + data


def check_page(text):
    page = Page(text)
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids))
    for tag, name, value in page.attributes:
        if name in ("src", "srcset", "data", "poster", "action") or (tag == "link" and name == "href"):
            assert value.startswith("data:"), (tag, name, value[:80])
        assert not name.startswith("on"), (tag, name)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|sendBeacon|WebSocket", text)
    assert "default-src 'none'" in text
    targets = {value[1:] for tag, name, value in page.attributes if tag == "a" and value.startswith("#")}
    known = set(page.ids) | set(json.loads(page.scripts["data"])["synsets"])
    assert targets <= known
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    described = [a[key] for _, a in page.tags for key in ("aria-labelledby", "aria-controls") if key in a]
    assert set(" ".join(described).split()) <= set(page.ids) | {"sheet-title"}  # the script makes that one
    assert [tag for tag, _ in page.tags].count("h1") == 1
    return page
