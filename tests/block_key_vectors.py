"""The vectors of docs/block-key.md, computed from that page alone: prints them as the page has them.

With a path as argument it checks that the page says the same, and exits 1 if not."""
import hashlib
import hmac
import struct
import sys


def u32(value):
    return struct.pack("<I", value)


def sized(data):
    return u32(len(data)) + data


def domain_secret(cluster, name):
    return hmac.new(cluster, sized(b"kvant.domain.v1") + sized(name), hashlib.sha256).digest()


def key(secret, parent, tokens, numerics=b"raw/bf16", extra=b""):
    text = sized(b"kvant.block-key.v1") + secret + hashlib.sha256(b"model").digest()
    text += u32(4) + u32(0) + u32(2) + u32(0) + u32(1) + sized(bytes([0, 1])) + sized(numerics)
    text += parent + u32(len(tokens)) + b"".join(u32(token) for token in tokens) + sized(extra)
    return hashlib.sha256(text).digest()


alice = domain_secret(b"cluster", b"alice")
first = key(alice, bytes(32), [1, 2, 3, 4])
rows = [
    ("domain secret of alice", alice),
    ("domain secret of bob", domain_secret(b"cluster", b"bob")),
    ("domain secret of alice, empty cluster secret", domain_secret(b"", b"alice")),
    ("block 1 2 3 4, first of its chain", first),
    ("block 5 6 7 8 after it", key(alice, first, [5, 6, 7, 8])),
    ("tail 5 6 after it", key(alice, first, [5, 6])),
    ("block 1 2 3 4, numerics class tile8", key(alice, bytes(32), [1, 2, 3, 4], b"tile8")),
    ("block 1 2 3 4, extra \"lora\"", key(alice, bytes(32), [1, 2, 3, 4], extra=b"lora")),
    ("block 1 2 3 4, domain bob", key(domain_secret(b"cluster", b"bob"), bytes(32), [1, 2, 3, 4])),
]
table = "| what | bytes |\n| --- | --- |\n"
table += "".join(f"| {what} | `{value.hex()}` |\n" for what, value in rows)
if len(sys.argv) > 1:
    with open(sys.argv[1], encoding="utf-8") as page:
        sys.exit(0 if table in page.read() else "the vectors of the page differ from these:\n" + table)
sys.stdout.write(table)
