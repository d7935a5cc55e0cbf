"""Damage to files, the same for the same seed: in their bytes, and in the values of their JSON."""

import copy
import json
import random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400,
    float("nan"), float("inf"), "", "x", "x" * 5000, "\ud800", "\0", "\n", "../x", "/etc/passwd",
    "{{ 1", "[/bold]", [], {}, [None], [[]], {"": None}, [1, "a"], {"content": 7}, ["x"] * 3000,
]  # fmt: skip


def of_bytes(draw: random.Random, data: bytes) -> bytes:
    """Cut, flip, insert, repeat or overwrite; early bytes more often, where headers are."""
    damaged = bytearray(data)
    size = len(damaged)
    limit = draw.choice((size, size, min(size, 600), min(size, 40)))
    place = draw.randrange(max(1, limit))
    match draw.randrange(7):
        case 0:
            del damaged[place:]
        case 1:
            for _ in range(draw.randint(1, 6)):
                damaged[draw.randrange(limit)] ^= 1 << draw.randrange(8)
        case 2:
            damaged[place : place + 8] = (
                draw.choice((0, 1, 2**63, 2**64 - 1, draw.getrandbits(64))) >> draw.randrange(64)
            ).to_bytes(8, "little")
        case 3:
            pieces = (b"9", b'"', b"-", b"e9", b"{", b",", b"\\u0000", b"\xff", b"\0", b"[" * 5000)
            damaged[place:place] = draw.choice(pieces)
        case 4:
            damaged[place:place] = damaged[place : place + draw.randrange(1, 200)]
        case 5:
            del damaged[place : place + draw.randrange(1, 60)]
        case 6:
            damaged[place] = draw.randrange(256)
    return bytes(damaged)


def of_json(draw: random.Random, text: bytes) -> bytes:
    """Change, drop, add or move some values of a JSON document, which stays one."""
    value = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        inside = [node for node in _containers(value) if node]
        if not inside or draw.random() < 0.01:
            value = copy.deepcopy(draw.choice(VALUES))
            continue
        node = draw.choice(inside)
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        match draw.randrange(6):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[draw.choice(("x", "", "\ud800", key + "x"))] = node.pop(key)
            case 2:
                node[key] = [node[key]]
            case 3:
                node[key] = copy.deepcopy(draw.choice(inside))
            case _:
                node[key] = copy.deepcopy(draw.choice(VALUES))
    return json.dumps(value).encode()


def _containers(value: Any) -> list[Any]:
    """List every object and list inside a value, the shallow ones first."""
    found = [value] if isinstance(value, (dict, list)) else []
    for node in found:
        inner = node.values() if isinstance(node, dict) else node[:50]
        found += [child for child in inner if isinstance(child, (dict, list))]
    return found
