"""Slow and obvious oracles of syntax and alignment, which share no code with what they check."""

import numpy as np

from treediff.masking.languages import LANGUAGES, Table
from treediff.masking.tiers import CONDITION, CONTROL, DATA, DEFAULT, SKELETON, parse

OWNERS = ("innermost", "outermost", "keyword")


def tier_by_type(language: str) -> dict[str, int]:
    table = LANGUAGES[language]
    lists = {SKELETON: table.skeleton, DATA: table.data, CONDITION: table.condition, CONTROL: table.control}
    return {name: tier for tier, names in lists.items() for name in names.split()}


def reach(table: Table, node) -> int:
    """End of what a tiered node owns."""
    for entry in table.headers.split():
        name, _, field = entry.partition(":")
        if name == node.type:
            body = node.child_by_field_name(field or "body")
            return body.start_byte if body else node.end_byte
    return node.end_byte


def leaves(root):
    """Every leaf with its ancestors, root first and the leaf last."""
    stack = [(root, ())]
    while stack:
        node, above = stack.pop()
        path = (*above, node)
        if node.child_count == 0:
            yield path
        stack.extend((child, path) for child in reversed(node.children))


def byte_tiers(source: bytes, owner: str, language: str = "python", root=None) -> np.ndarray:
    """Byte by byte: every node that covers the byte, from the root down; then the rule, read off the definitions."""
    table, tier_of = LANGUAGES[language], tier_by_type(language)
    root = root or parse(source, language).tree.root_node
    comments = table.comments.split()
    out = np.zeros(len(source), np.uint8)
    inside_comment = np.zeros(len(source), bool)

    def own(node) -> int | None:
        if node.type == "ERROR":
            return DEFAULT
        return tier_of.get(node.type) if node.is_named else None

    stack = [(root, ())]
    while stack:
        node, above = stack.pop()
        tier = own(node)
        path = above if tier is None else (*above, (tier, reach(table, node)))
        if node.type in comments and node.is_named:
            inside_comment[node.start_byte : node.end_byte] = True
        for at in range(node.start_byte, node.end_byte):
            if owner != "keyword":
                here = [t for t, end in path if at < end]
                out[at] = (here[-1] if owner == "innermost" else here[0]) if here else DEFAULT
            elif node.child_count == 0:
                parent = node.parent
                out[at] = (tier or 0) if node.is_named else ((parent and own(parent)) or 0)
        stack.extend((child, path) for child in node.children)
    for at, byte in enumerate(source):
        walrus = table.walrus and (source[at : at + 2] == b":=")
        if inside_comment[at]:
            out[at] = DEFAULT
        elif byte in table.punctuation and not walrus:
            out[at] = SKELETON
    return out


def spans(source: bytes, language: str = "python") -> list[tuple[int, int, int]]:
    """Extent and tier of every named node but the root, in the order of a recursive walk."""
    tier_of, out = tier_by_type(language), []
    stack = list(reversed(parse(source, language).tree.root_node.children))
    while stack:
        node = stack.pop()
        if node.is_named:
            out.append((node.start_byte, node.end_byte, DEFAULT if node.is_error else tier_of.get(node.type, DEFAULT)))
        stack.extend(reversed(node.children))
    return out


def error_bytes(source: bytes, language: str = "python") -> int:
    covered, stack = set(), [parse(source, language).tree.root_node]
    while stack:
        node = stack.pop()
        if node.is_error:
            covered |= set(range(node.start_byte, node.end_byte))
        stack.extend(node.children)
    return len(covered)


def token_tiers(pieces: list[bytes], tiers: np.ndarray, weights: list[float] | None, blank_owner: str) -> list[int]:
    """The rule of ownership, token by token: `pieces` is what each token spells."""
    out, at = [], 0
    for piece in pieces:
        blank = len(piece) - len(piece.lstrip())
        held = [int(t) for t in tiers[at : at + len(piece)]]
        if blank == len(piece) and blank_owner == "none":
            held = [0]
        held = held if blank == len(piece) else held[blank:]
        out.append(held[0] if weights is None else max(held, key=lambda t: weights[t]))  # `max` takes the first
        at += len(piece)
    return out


def token_spans(anchors: list[int], byte_spans: list[tuple[int, int, int]]) -> list[list[int]]:
    out = []
    for start, end, tier in byte_spans:
        inside = [k for k, at in enumerate(anchors) if start <= at < end]
        if inside:
            out.append([inside[0], inside[-1] + 1, tier])
    return out
