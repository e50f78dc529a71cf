#!/usr/bin/env python3
"""A second decoder of the segment formats, written from docs/block-format.md and from nothing else.

  format_decoder.py tests/golden/codec      decodes every golden file and compares, bit for bit

Python's standard library only. Numbers are doubles here; every decoded value is rounded to fp32 once at its end, as the
document says.
"""

import pathlib
import struct
import sys

KEYS, VALUES = 0, 1
GROUP = 64          # channels that share a value scale
STEP = 16           # tokens that a channel's codes fill whole steps of
LARGEST, SMALLEST = 2.0 ** 120, 2.0 ** -126
# codec id: name, bytes of a raw element (or 0), bits of a plane, whether keys have zero points
CODECS = {1: ("raw", 2, 0, False), 2: ("tile8", 0, 4, False), 3: ("tile4", 0, 2, True),
          4: ("raw-fp16", 2, 0, False), 5: ("raw-fp32", 4, 0, False)}


class Malformed(Exception):
    pass


def fp32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def bf16(bits):
    return struct.unpack("<f", struct.pack("<I", bits << 16))[0]


def is_finite(value):
    return value - value == 0.0


def head_sizes(codec, kind, tokens, head_dim):
    """Bytes of a head: scales and zero points, codes of one plane."""
    _, _, bits, zeros = CODECS[codec]
    if kind == KEYS:
        padded = -(-tokens // STEP) * STEP
        return head_dim * (4 if zeros else 2), head_dim * padded * bits // 8
    return tokens * -(-head_dim // GROUP) * 2, tokens * head_dim * bits // 8


def range_bytes(codec, kind, tokens, heads, head_dim, cut):
    element = CODECS[codec][1]
    if element:
        return tokens * heads * head_dim * element
    scales, codes = head_sizes(codec, kind, tokens, head_dim)
    return heads * (codes + (scales if cut == 0 else 0))


def plane_codes(data, bits, count):
    """The codes of a plane: byte i holds codes i + k * size at bits k * bits."""
    size = count * bits // 8
    return [(data[i] >> (k * bits)) & ((1 << bits) - 1) for k in range(8 // bits) for i in range(size)]


def row_values(base, fine, bits, count):
    """A row in units of its scale. fine: None when only the base is there."""
    upper = plane_codes(base, bits, count)
    if fine is None:
        return [(u << bits) + ((1 << bits) - (1 << 2 * bits)) / 2 for u in upper]
    lower = plane_codes(fine, bits, count)
    return [(u << bits | v) + (1 - (1 << 2 * bits)) / 2 for u, v in zip(upper, lower)]


def read_scale(bits):
    scale = bf16(bits)
    if bits != 0 and not SMALLEST <= scale <= LARGEST:
        raise Malformed(f"scale {bits:#06x}")
    return scale


def read_zero(bits):
    zero = bf16(bits)
    if not -LARGEST <= zero <= LARGEST:
        raise Malformed(f"zero point {bits:#06x}")
    return zero


def decode_raw(codec, kind, tokens, heads, head_dim, data):
    count = tokens * heads * head_dim
    if codec == 5:
        elements = struct.unpack(f"<{count}f", data)
    elif codec == 4:
        elements = struct.unpack(f"<{count}e", data)
    else:
        elements = [bf16(bits) for bits in struct.unpack(f"<{count}H", data)]
    if not all(map(is_finite, elements)):
        raise Malformed("an element is not finite")
    out = []
    for t in range(tokens):
        for h in range(heads):
            for c in range(head_dim):
                at = (h * head_dim + c) * tokens + t if kind == KEYS else (h * tokens + t) * head_dim + c
                out.append(elements[at])
    return out


def decode_tile(codec, kind, tokens, heads, head_dim, ranges):
    _, _, bits, has_zeros = CODECS[codec]
    scale_bytes, code_bytes = head_sizes(codec, kind, tokens, head_dim)
    out = [0.0] * (tokens * heads * head_dim)
    for h in range(heads):
        start = h * (scale_bytes + code_bytes)
        numbers = struct.unpack_from(f"<{scale_bytes // 2}H", ranges[0], start)
        base = ranges[0][start + scale_bytes:start + scale_bytes + code_bytes]
        fine = ranges[1][h * code_bytes:(h + 1) * code_bytes] if len(ranges) > 1 else None
        at = 0

        def next_row(count):
            nonlocal at
            size = count * bits // 8
            row = row_values(base[at:at + size], fine and fine[at:at + size], bits, count)
            at += size
            return row

        if kind == KEYS:
            scales = [read_scale(b) for b in numbers[:head_dim]]
            zeros = [read_zero(b) for b in numbers[head_dim:]] if has_zeros else [0.0] * head_dim
            for c in range(head_dim):
                row = next_row(-(-tokens // STEP) * STEP)
                for t in range(tokens):
                    out[(t * heads + h) * head_dim + c] = fp32(row[t] * scales[c] + zeros[c])
        else:
            scales = iter([read_scale(b) for b in numbers])
            for t in range(tokens):
                for first in range(0, head_dim, GROUP):
                    scale = next(scales)
                    for c, value in enumerate(next_row(min(GROUP, head_dim - first))):
                        out[(t * heads + h) * head_dim + first + c] = fp32(value * scale)
    return out


def decode(codec, kind, tokens, heads, head_dim, ranges):
    """The segment [tokens][heads][head_dim] at cut len(ranges) - 1; Malformed where a reader must refuse."""
    for cut, data in enumerate(ranges):
        if len(data) != range_bytes(codec, kind, tokens, heads, head_dim, cut):
            raise Malformed(f"range {cut} has {len(data)} bytes")
    if CODECS[codec][1]:
        return decode_raw(codec, kind, tokens, heads, head_dim, ranges[0])
    return decode_tile(codec, kind, tokens, heads, head_dim, ranges)


def verify_file(path):
    """An error text, or None."""
    data = path.read_bytes()
    magic, codec, kind, cuts, good, tokens, heads, head_dim, zero = struct.unpack_from("<8s4B4H", data)
    if magic != b"KVGOLD01" or zero:
        return "not a golden file"
    sizes = struct.unpack_from(f"<{cuts}I", data, 20)
    at = 20 + 4 * cuts
    ranges = []
    for size in sizes:
        ranges.append(data[at:at + size])
        at += size
    if not good:
        try:
            decode(codec, kind, tokens, heads, head_dim, ranges)
        except Malformed:
            return None
        return "decoded, but must be refused"
    count = tokens * heads * head_dim
    x = struct.unpack_from(f"<{count}f", data, at)
    at += 4 * count
    for cut in range(cuts):
        declared, = struct.unpack_from("<f", data, at)
        expected = data[at + 4:at + 4 + 4 * count]
        at += 4 + 4 * count
        values = decode(codec, kind, tokens, heads, head_dim, ranges[:cut + 1])
        if struct.pack(f"<{count}f", *values) != expected:
            return f"cut {cut} decodes to other numbers"
        if max(abs(a - b) for a, b in zip(x, values)) > declared:
            return f"cut {cut} has a larger error than declared"
    return None if at == len(data) else "bytes are left over"


def verify_layout(path):
    """Payload offsets: keys cut 0, values cut 0, keys cut 1, ..., layers in order inside each."""
    ids = {name: codec for codec, (name, *_) in CODECS.items()}
    expected = {}
    for line in path.read_text().splitlines():
        name, *numbers = line.split()
        tokens, heads, head_dim, layers, kind, cut, layer, offset, length = map(int, numbers)
        expected.setdefault((ids[name], tokens, heads, head_dim, layers), []).append((kind, cut, layer, offset, length))
    for (codec, tokens, heads, head_dim, layers), rows in expected.items():
        offset, found = 0, []
        for cut in range(1 if CODECS[codec][1] else 2):
            for kind in (KEYS, VALUES):
                for layer in range(layers):
                    length = range_bytes(codec, kind, tokens, heads, head_dim, cut)
                    found.append((kind, cut, layer, offset, length))
                    offset += length
        if found != rows:
            return f"{CODECS[codec][0]}: another layout"
    return None


def main():
    directory = pathlib.Path(sys.argv[1])
    files = sorted(directory.glob("*.bin"))
    failed = 0 if files else 1
    for path in files:
        error = verify_file(path)
        if error:
            print(f"{path.name}: {error}")
            failed += 1
    error = verify_layout(directory / "payload_layout.txt")
    if error:
        print(f"payload_layout.txt: {error}")
        failed += 1
    print(f"{len(files)} golden files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
