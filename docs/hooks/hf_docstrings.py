"""Docstrings in Hugging Face's style, as griffe's parser of Google's style reads them.

Types in parentheses behind a name are dropped: signatures have them, and their defaults. [`Name`] becomes a link to
where the name is documented, and stays code where it is not.
"""

import re
from collections import defaultdict

from griffe import Extension


TYPE_BEHIND_NAME = re.compile(r"^(\s+\w+) \(`.*?\):", re.MULTILINE)
TYPE_OF_RESULT = re.compile(r"(Returns:\n\s+)`([^`]+)`:")
LINK = re.compile(r"\[`~?([\w.]+)`\]")


class HuggingFaceDocstrings(Extension):
    def on_package(self, *, pkg, **kwargs):
        objects = list(_objects(pkg))
        paths = defaultdict(list)
        for each in objects:
            if not each.is_module:
                paths[each.name].append(each.path)
        for each in objects:
            if each.docstring:
                each.docstring.value = rewritten(each.docstring.value, paths)


def rewritten(text, paths):
    text = TYPE_BEHIND_NAME.sub(r"\1:", text)
    text = TYPE_OF_RESULT.sub(r"\1\2:", text)
    return LINK.sub(lambda match: _link(match[1], paths), text)


def _link(name, paths):
    found = [path for path in paths.get(name.split(".")[-1], ()) if f".{path}".endswith(f".{name}")]
    if len(found) != 1:
        return f"`{name}`"
    return f'<autoref identifier="{found[0]}" optional><code>{name.removeprefix("hf_flashcp.")}</code></autoref>'


def _objects(parent):
    yield parent
    for member in parent.members.values():
        if not member.is_alias:
            yield from _objects(member) if member.members else [member]
