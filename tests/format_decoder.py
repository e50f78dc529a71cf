#!/usr/bin/env python3
"""A second decoder of the segment formats, written from docs/block-format.md and from nothing else.

  format_decoder.py tests/golden/codec      decodes every golden file and compares, bit for bit

Python's standard library only; frames of zstd go to the program of that name, and files that hold one are left out
where it is missing. Numbers are doubles here; every decoded value is rounded to fp32 once at its end, as the document says.
"""

import pathlib
import shutil
import struct
import subprocess
import sys

KEYS, VALUES = 0, 1
GROUP = 64          # channels that share a value scale
STEP = 16           # tokens that a quad's codes fill whole steps of
QUAD = 4            # codes that stand side by side
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
    return tokens * -(-head_dim // GROUP) * 2, -(-tokens // QUAD) * QUAD * head_dim * bits // 8


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
            for first in range(0, head_dim, QUAD):
                row = next_row(QUAD * -(-tokens // STEP) * STEP)
                for t in range(tokens):
                    for c in range(first, first + QUAD):
                        value = row[QUAD * t + c - first]
                        out[(t * heads + h) * head_dim + c] = fp32(value * scales[c] + zeros[c])
        else:
            scales = [read_scale(b) for b in numbers]
            groups = -(-head_dim // GROUP)
            for first in range(0, tokens, QUAD):
                row = next_row(QUAD * head_dim)
                for t in range(first, min(first + QUAD, tokens)):
                    for c in range(head_dim):
                        scale = scales[t * groups + c // GROUP]
                        out[(t * heads + h) * head_dim + c] = fp32(row[QUAD * c + t - first] * scale)
    return out


def decode(codec, kind, tokens, heads, head_dim, ranges):
    """The segment [tokens][heads][head_dim] at cut len(ranges) - 1; Malformed where a reader must refuse."""
    for cut, data in enumerate(ranges):
        if len(data) != range_bytes(codec, kind, tokens, heads, head_dim, cut):
            raise Malformed(f"range {cut} has {len(data)} bytes")
    if CODECS[codec][1]:
        return decode_raw(codec, kind, tokens, heads, head_dim, ranges[0])
    return decode_tile(codec, kind, tokens, heads, head_dim, ranges)


TOTAL, LANES, LOWEST = 4096, 32, 1 << 16     # rANS: probabilities in 1/4096, states, where they start
ESCAPE, ZERO_ROW = 12, 15
STORED, RANS, ZSTD = 0, 1, 2


class NoZstd(Exception):
    pass


class Reader:
    """Takes bytes off the front; Malformed where they lack."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        if count > len(self.data) - self.at:
            raise Malformed("it ends too early")
        self.at += count
        return self.data[self.at - count:self.at]

    def byte(self):
        return self.take(1)[0]

    def rest(self):
        return self.take(len(self.data) - self.at)


def read_table(reader):
    """The frequencies of a rANS table, one a symbol."""
    frequencies = [0] * (reader.byte() + 1)
    s = 0
    while s < len(frequencies):
        f = reader.byte()
        if f >= 128:
            f = (f - 128) * 256 + reader.byte()
        elif f == 0:
            s += reader.byte()
        if f:
            frequencies[s] = f
        s += 1
    if sum(frequencies) != TOTAL or frequencies[-1] == 0:
        raise Malformed("frequencies")
    return frequencies


def normalised(counts):
    """Frequencies of 1/4096 for these counts."""
    total = sum(counts)
    rare = [count * TOTAL < total for count in counts]
    left = TOTAL - sum(r and count > 0 for r, count in zip(rare, counts))
    scale = (left << 40) // sum(count for r, count in zip(rare, counts) if not r)
    out = [0 if count == 0 else 1 if r else max(1, (count * scale + (1 << 39)) >> 40)
           for r, count in zip(rare, counts)]
    while sum(out) != TOTAL:
        out[out.index(max(out))] += 1 if sum(out) < TOTAL else -1
    return out


def pair_table(table):
    counts = [0] * 256
    for second, b in enumerate(table):
        for first, a in enumerate(table):
            counts[16 * second + first] = a * b
    return normalised(counts)


def decode_rans(tables, table_of_symbol, count, data):
    """`count` symbols of a stream that takes all of data."""
    reader = Reader(data)
    states = list(struct.unpack(f"<{LANES}I", reader.take(4 * LANES)))
    if min(states) < LOWEST:
        raise Malformed("a state")
    slots = [bytes(s for s, f in enumerate(table) for _ in range(f)) for table in tables]
    out = bytearray()
    for i in range(count):
        x = states[i % LANES]
        table, of_slot = tables[table_of_symbol[i]], slots[table_of_symbol[i]]
        symbol = of_slot[x % TOTAL]
        x = table[symbol] * (x // TOTAL) + x % TOTAL - of_slot.index(symbol)
        if x < LOWEST:
            x = x * 65536 + struct.unpack("<H", reader.take(2))[0]
        states[i % LANES] = x
        out.append(symbol)
    if reader.rest() or any(x != LOWEST for x in states):
        raise Malformed("it does not end where it must")
    return bytes(out)


def read_plane(coding, of_pairs, data, count):
    if coding == RANS:
        reader = Reader(data)
        table = read_table(reader)
        if of_pairs:
            if len(table) > 16:
                raise Malformed("a table of no pairs")
            table = pair_table(table)
        return decode_rans([table], bytes(count), count, reader.rest())
    if coding == ZSTD:
        if shutil.which("zstd") is None:
            raise NoZstd
        done = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False)
        if done.returncode:
            raise Malformed("zstd")
        data = done.stdout
    if len(data) != count:
        raise Malformed("a plane's length")
    return data


def decode_lossless(kind, tokens, heads, head_dim, data):
    """The bf16 elements in the order of `raw`."""
    rows, width = (heads * head_dim, tokens) if kind == KEYS else (heads * tokens, head_dim)
    count = rows * width
    reader = Reader(data)
    form = reader.byte()
    if form == 0:
        data = reader.rest()
        if len(data) != 2 * count:
            raise Malformed("a stored segment's length")
        return list(struct.unpack(f"<{count}H", data))
    top, codings, zero, symbol_bytes, escapes = struct.unpack("<3B2I", reader.take(11))
    symbol_coding, rest_coding = codings >> 1 & 3, codings >> 3 & 3
    if form != 1 or zero or codings >> 5 or symbol_coding > ZSTD or rest_coding > ZSTD:
        raise Malformed("a header")
    tops = [top] * rows
    if codings & 1:
        pairs = reader.take((rows + 1) // 2)
        distances = [pairs[r // 2] >> 4 * (r % 2) & 15 for r in range(rows)]
        tops = [0 if d == ZERO_ROW else top - d & 255 for d in distances]
    pairs = read_plane(symbol_coding, True, reader.take(symbol_bytes), count // 2)
    symbols = [pair & 15 for pair in pairs] + [pair >> 4 for pair in pairs]
    exponents = [tops[i // width] - symbol & 255 for i, symbol in enumerate(symbols)]
    escaped = [i for i, symbol in enumerate(symbols) if symbol == ESCAPE]
    if len(escaped) != escapes:
        raise Malformed("escapes")
    for i, exponent in zip(escaped, reader.take(escapes)):
        exponents[i] = exponent
    rest = read_plane(rest_coding, False, reader.rest(), count)
    return [(r & 128) << 8 | e << 7 | r & 127 for e, r in zip(exponents, rest)]


def verify_lossless(path):
    """An error text, or None."""
    data = path.read_bytes()
    magic, kind, good, _, tokens, heads, head_dim, _, size = struct.unpack_from("<8s2B5HI", data)
    if magic != b"KVLOSS01":
        return "not a golden file"
    segment, elements = data[24:24 + size], data[24 + size:]
    try:
        decoded = decode_lossless(kind, tokens, heads, head_dim, segment)
    except Malformed as error:
        return f"refused: {error}" if good else None
    if not good:
        return "decoded, but must be refused"
    return None if struct.pack(f"<{len(decoded)}H", *decoded) == elements else "decodes to other bits"


def verify_rans(path):
    """An error text, or None."""
    reader = Reader(path.read_bytes())
    if reader.take(8) != b"KVRANS01":
        return "not a golden file"
    tables, chosen, good, count, size = struct.unpack("<H2B2I", reader.take(12))
    tables = [read_table(reader) for _ in range(tables)]
    table_of_symbol = reader.take(count) if chosen else bytes(count)
    stream = reader.take(size)
    try:
        decoded = decode_rans(tables, table_of_symbol, count, stream)
    except Malformed as error:
        return f"refused: {error}" if good else None
    if not good:
        return "decoded, but must be refused"
    return None if decoded == reader.rest() else "decodes to other symbols"


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
    verifiers = {".bin": verify_file, ".lossless": verify_lossless, ".rans": verify_rans}
    files = sorted(path for path in directory.iterdir() if path.suffix in verifiers)
    failed = 0 if {path.suffix for path in files} == set(verifiers) else 1
    for path in files:
        try:
            error = verifiers[path.suffix](path)
        except NoZstd:
            print(f"{path.name}: left out, there is no program zstd")
            continue
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
