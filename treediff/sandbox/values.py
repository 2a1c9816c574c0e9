"""Values of a program as plain data: JSON out of a process that is not trusted, and values again where they are judged.

    decode(json.loads(json.dumps(encode(value)))) == value            # for every plain value
    decode(encode(object()))                                          # <object>, which equals nothing
    for frame in frames(sock): ...                                    # what the program's side sends, never trusted

Nothing that is decoded is ever executed: lists, tuples, sets, mappings, numbers, text, bytes, numpy's arrays and the
standard library's numbers and containers come back as what they were, subclasses as equal values of another type,
anything else as an `Opaque`.
"""

from __future__ import annotations

import collections
import contextlib
import decimal
import fractions
import hashlib
import json
import marshal
import math
import numbers
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

FRAME = 32 << 20
"""Longest answer to one test [bytes]; a longer one is no answer."""
BULK = 200_000
"""Most items that an output may hold to be sent whole rather than as a digest."""


class Opaque:
    """Stands for a value that is no plain data. Equal to nothing but itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Digest(NamedTuple):
    """Stands for a value too big to send: equal to one of the same type, length and content."""

    type: str
    length: int
    sha256: str

    def __repr__(self) -> str:
        return f"<{self.type} of length {self.length}, SHA-256 {self.sha256[:12]}>"


_PLAIN = (list, tuple, set, frozenset, dict, str, bytes, bytearray, float, complex, int)
_LIKE = {base: type(f"other_{base.__name__}", (base,), {}) for base in _PLAIN}
_RAW = frozenset({str, bool, type(None), int, float})
_SCALAR = frozenset({bool, type(None), int, float})
_EXACT = frozenset({str, int, type(None), bytes})
_SEQUENCES = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": frozenset,  # a view of keys or items: equal to a set, to no list
}
_MAPPINGS = {
    "dict": dict,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda pairs: collections.defaultdict(None, pairs),
}
_DTYPE = re.compile(r"[<>|=]?([biufc]\d{1,2}|[SU]\d{1,6})")


def pack(x: Any) -> Any:
    """`x` as a JSON value that `decode` turns into an equal one: plain data by content, anything else by name.

    JSON's own types stand for themselves; every other type is an object of one key, its name. Only the base
    type's methods are asked for the content, so a subclass says nothing about itself but its type's name.
    """
    t = type(x)
    if t is int:
        return x if -(1 << 63) <= x < 1 << 63 else {"int": hex(x)}
    if t in _RAW:
        return x
    if t is list:
        kinds = set(map(type, x))
        if kinds <= _RAW and (int not in kinds or _small(x)):
            return x
        return [pack(v) for v in x]
    name = t.__name__
    if t in (tuple, set, frozenset, collections.deque):
        return {name: [pack(v) for v in x]}
    if t in (dict, collections.Counter, collections.OrderedDict, collections.defaultdict):
        return {name: [[pack(k), pack(v)] for k, v in x.items()]}
    if t in (bytes, bytearray):
        return {name: x.hex()}
    if t is complex:
        return {"complex": [x.real, x.imag]}
    if t is decimal.Decimal:
        return {"Decimal": str(x)}
    if t is fractions.Fraction:
        return {"Fraction": [pack(x.numerator), pack(x.denominator)]}
    if t is range:
        return {"range": [pack(x.start), pack(x.stop), pack(x.step)]}
    if t in (type({}.keys()), type({}.items())):
        return {"keys": [pack(v) for v in x]}
    if t.__module__ == "numpy":
        return _encode_numpy(x, name)
    for base in _PLAIN:  # type(x).__mro__, not isinstance: `__class__` may lie
        if base in t.__mro__:
            return {"like": [base.__name__, pack(_content(base, x))]}
    if isinstance(x, numbers.Integral):
        return {"like": ["int", pack(int(x))]}
    return {"opaque": str(name)[:80]}


def abridged(x: Any) -> Any:
    """`encode(x)`, or the digest of an `x` of more than `BULK` items (Mbpp/255 returns 1.7 million tuples of 77).

    Equal values have equal digests as long as sets and mappings inside them have the same order.
    """
    if type(x) in _SCALAR or _items(x, 0) <= BULK:
        return pack(x)
    total = hashlib.sha256()
    if type(x) in (str, bytes):
        total.update(marshal.dumps(x, 2))  # version 2: by type and value alone, no references
    elif type(x) in (list, tuple):
        for item in x:
            total.update(marshal.dumps(_canonical(item), 2))
    elif type(x) in (set, frozenset, dict):  # in no order: the sum of the items' digests
        items = x.items() if type(x) is dict else x
        digests = (hashlib.sha256(marshal.dumps(_canonical(item), 2)).digest() for item in items)
        total.update((sum(int.from_bytes(d, "big") for d in digests) % (1 << 256)).to_bytes(32, "big"))
    else:
        return {"opaque": type(x).__name__}
    return {"digest": [type(x).__name__, len(x), total.hexdigest()]}


def _canonical(x: Any) -> Any:
    """`x` with its numbers written in one way: 1 for 1.0 and True. What is unequal to itself differs every time."""
    t = type(x)
    if t is float:
        return int(x) if x.is_integer() else x if x == x else os.urandom(16)
    if t is bool:
        return int(x)
    if t in (list, tuple) and not set(map(type, x)) <= _EXACT:
        return t([_canonical(v) for v in x])
    return x


def _items(x: Any, so_far: int) -> int:
    """How many items `x` holds at any depth, text counting by 4 characters; stops counting beyond `BULK`."""
    t = type(x)
    if t in (str, bytes):
        return so_far + len(x) // 4
    if t is dict:
        return _items(list(x.values()), so_far + len(x))
    if t not in (list, tuple, set, frozenset):
        return so_far
    so_far += len(x)
    kinds = set(map(type, x))
    if so_far > BULK or kinds <= _SCALAR:
        return so_far
    if kinds == {str}:
        return so_far + sum(map(len, x)) // 4
    for item in x:
        so_far = _items(item, so_far)
        if so_far > BULK:
            break
    return so_far


def _small(values: list) -> bool:
    """Whether all integers among `values` fit 64 bits."""
    return all(-(1 << 63) <= v < 1 << 63 for v in values if type(v) is int)


def _content(base: type, x: Any) -> Any:
    """`x`, an instance of a subclass of `base`, as a plain `base`, by the methods of `base` alone."""
    if base is dict:
        return dict(dict.items(x))
    if base in (list, tuple, set, frozenset):
        return base(base.__iter__(x))
    if base is str:
        return str.__str__(x) if type(str.__str__(x)) is str else "".join(str.__iter__(x))
    if base in (bytes, bytearray):
        return base(memoryview(x))
    if base is complex:
        return complex.__pos__(x)
    return base.__pos__(x)


def _encode_numpy(x: Any, name: str) -> Any:
    """A numpy scalar or array by its dtype, shape and values; object arrays and others by name."""
    dtype = getattr(x, "dtype", None)
    shape = getattr(x, "shape", None)
    if not _DTYPE.fullmatch(getattr(dtype, "str", "") or "") or not isinstance(shape, tuple):
        return {"opaque": name}
    if name == "ndarray":
        return {"ndarray": [dtype.str, list(shape), pack(x.reshape(-1).tolist())]}
    return {"numpy": [dtype.str, pack(x.item())]} if shape == () else {"opaque": name}


def unpack(v: Any) -> Any:
    """The value that `encode` wrote. Raises ValueError or TypeError for anything that it cannot have written."""
    t = type(v)
    if t is list:
        return v if set(map(type, v)) <= _RAW else [unpack(i) for i in v]
    if t is not dict:
        return v
    if len(v) != 1:
        raise ValueError("not one key")
    ((tag, body),) = v.items()
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([unpack(i) for i in _list(body)])
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({unpack(k): unpack(i) for k, i in _list(body)})
    if tag == "int":
        return int(body, 16)
    if tag in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(body)
    if tag == "complex":
        real, imag = _list(body)
        return complex(float(real), float(imag))
    if tag == "Decimal":
        return decimal.Decimal(body)
    if tag == "Fraction":
        return fractions.Fraction(*map(unpack, _list(body)))
    if tag == "range":
        return range(*map(unpack, _list(body)))
    if tag in ("numpy", "ndarray"):
        return _decode_numpy(tag, _list(body))
    if tag == "like":
        base, content = _list(body)
        kind = next(b for b in _PLAIN if b.__name__ == base)
        return _LIKE[kind](unpack(content))
    if tag == "digest":
        name, length, digest = _list(body)
        return Digest(str(name), int(length), str(digest))
    if tag == "opaque":
        return Opaque(str(body)[:80])
    raise ValueError(f"unknown tag {tag[:40]!r}")


def _list(body: Any) -> list:
    if type(body) is not list:
        raise ValueError("not a list")
    return body


def _decode_numpy(tag: str, body: list) -> Any:
    import numpy as np

    if not _DTYPE.fullmatch(body[0]):
        raise ValueError("not a plain dtype")
    dtype = np.dtype(body[0])
    if tag == "numpy":
        return dtype.type(unpack(body[1]))
    _, shape, values = body
    if dtype.itemsize * len(_list(values)) > FRAME or math.prod(shape) != len(values):
        raise ValueError("not an array")
    return np.array(unpack(values), dtype=dtype).reshape(shape)


# --- frames: how plain data crosses a socket --------------------------------------------------------------------------
def send(sock: socket.socket, body: bytes, kind: bytes = b"j") -> None:
    sock.sendall(kind + struct.pack("I", len(body)) + body)


def receive(sock: socket.socket) -> bytes:
    """One frame's body, however long: the caller is trusted."""
    header = _exactly(sock, 5)
    return _exactly(sock, struct.unpack("I", header[1:])[0])


def _exactly(sock: socket.socket, n: int) -> bytes:
    parts = bytearray()
    while len(parts) < n:
        part = sock.recv(min(1 << 20, n - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


class Frame(NamedTuple):
    """What the program's side sent: `o` the output of the next test (seconds, value); `e` an exception in it or `d`
    in defining the program (type, text)."""

    kind: bytes
    value: Any


class Silent(Exception):
    """The program sent nothing for longer than it may."""


def frames(
    sock: socket.socket, waits: Iterator[float] | None = None, ask: socket.socket | None = None
) -> Iterator[Frame]:
    """Frames until the program's side hangs up or sends what is no frame.

    `waits`: longest wait for each [s], not counting what `ask`, the guardian, says that the program waited for a core.
    """
    buffer, forgiven = bytearray(), 0.0
    while True:
        deadline = time.monotonic() + next(waits, 5.0) if waits else None
        while len(buffer) < 5 or len(buffer) < 5 + struct.unpack_from("I", buffer, 1)[0]:
            if len(buffer) >= 5 and struct.unpack_from("I", buffer, 1)[0] > FRAME:
                yield Frame(b"e", ["OutputTooLong", f"an output of more than {FRAME >> 20} MiB"])
                return
            if deadline is not None:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = sock.recv(1 << 18)
            except TimeoutError:
                owed = _ask(ask) - forgiven
                if owed < 0.01:
                    raise Silent from None
                forgiven += owed
                deadline = time.monotonic() + owed
                continue
            except OSError:
                part = b""
            if not part:
                return
            buffer += part
        end = 5 + struct.unpack_from("I", buffer, 1)[0]
        kind, body = bytes(buffer[:1]), bytes(buffer[5:end])
        del buffer[:end]
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if kind not in (b"o", b"e", b"d") or type(value) is not list or len(value) != 2:
            yield Frame(b"e", ["Forged", "the answer is not what the sandbox writes"])
            return
        yield Frame(kind, value)


def _ask(guardian: socket.socket) -> float:
    """How long the program has waited for a core so far [s]; for ever, if it has ended and its last words are near."""
    with contextlib.suppress(OSError):
        guardian.sendall(b"?")
    guardian.settimeout(60)
    if guardian.recv(1, socket.MSG_PEEK) != b"?":
        return 1e9
    return struct.unpack("<cd", _exactly(guardian, 9))[1]


def drain(sock: socket.socket) -> bytes:
    parts = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(1 << 16):
            parts += part
    return parts
