#!/usr/bin/env python3
"""A second decoder of klt blocks and of exact extents.

  klt_decoder.py tests/golden/klt      decodes every golden file: levels and exact numbers must be the same, rows nearly

Python's standard library only. Numbers are doubles here; levels and what they stand for are rounded as fp32 is, and sums are
not, so that rows differ from fp32's in the last bits. Segments' checksums are not looked at.
"""

import functools
import hashlib
import json
import math
import pathlib
import struct
import sys

from format_decoder import KEYS, Malformed, Reader, bf16, decode_rans, fp32, normalised

TOKENS, SINKS, SOURCE_COEFFICIENTS, GROUP_WIDTH = 64, 4, 384, "3072"
LOWEST, HIGHEST, MOST_LOW_BITS = -3, 3, 20     # octaves that have tables of their own
RATIOS = 4 * (HIGHEST - LOWEST)
FIRST_TABLES = RATIOS + 4
TABLES, SYMBOLS, MEANS = FIRST_TABLES + 4 * RATIOS, 64, 8
ESCAPE, ESCAPE_BITS, LARGEST = SYMBOLS - 1, 22, 1 << 20
PARTS = [float.fromhex(x) for x in ("0x1.172b84p-1", "0x1.4bfdaep-1", "0x1.8ace54p-1", "0x1.d5818ep-1")]
NOWHERE = (-1, 0)
HALF = float.fromhex("0x1.6a09e6p-1")            # of an octave
NEAREST, FAR, FARTHEST = -8, 8, 47             # exact extents: quarters
MIDDLE, EXACT_ESCAPE, MOST_SCALE, NONE_MISSING = 63, 128, 511, 15


class Pack:
    """A codec pack as its file has it. slides: of each layer."""

    def __init__(self, path, slides):
        data = path.read_bytes()
        size, = struct.unpack_from("<Q", data)
        self.header = json.loads(data[8:8 + size])
        self.data = data[8 + size:]
        metadata = self.header["__metadata__"]
        assert metadata["format"] == "kvant-klt-4"
        self.cuts = [fp32(step) for _, step, _ in json.loads(metadata["cuts"])]
        self.sink_step, = self.tensor("sink_step")
        mean, frequencies = self.tensor("mean"), self.tensor("frequencies")
        self.mean = [mean[t * MEANS:(t + 1) * MEANS] for t in range(TABLES)]
        self.tables = [normalised([int(f) for f in frequencies[t * SYMBOLS:(t + 1) * SYMBOLS]]) for t in range(TABLES)]
        width = self.header["layers.0.weight"]["shape"][0]
        self.groups = groups_of(slides, width, int(metadata.get("group_width", GROUP_WIDTH)))
        for number, group in enumerate(self.groups):
            for part in ("bias", "sink_bias", "predictor", "synthesis", "deviation", "first_deviation", "sink_deviation"):
                group[part] = self.tensor(f"groups.{number}.{part}")

    def tensor(self, name):
        entry = self.header[name]
        data = self.data[slice(*entry["data_offsets"])]
        if entry["dtype"] == "F32":
            return struct.unpack(f"<{len(data) // 4}f", data)
        return [bf16(bits) for bits in struct.unpack(f"<{len(data) // 2}H", data)]


def groups_of(slides, width, group_width):
    """Layers that are coded together: those that see everything first, the others then, each kind in as few and as even parts
    as group_width allows. Each is predicted from the one before and from the last one that sees everything."""
    most = max(1, group_width // width)
    groups, last_global = [], None
    for sliding in (False, True):
        layers = [layer for layer, slide in enumerate(slides) if slide == sliding]
        count = -(-len(layers) // most)
        for i in range(count):
            sources = [len(groups) - 1] if groups else []
            if last_global is not None and last_global not in sources:
                sources.append(last_global)
            part = layers[i * len(layers) // count:(i + 1) * len(layers) // count]
            groups.append({"layers": part, "sources": sources})
        if not sliding and count:
            last_global = count - 1
    return groups


def quarters_of(deviation, step):
    """floor(4 log2(deviation / step) + 1/2); None for what is never coded."""
    ratio = fp32(deviation / step)
    if not ratio > 0:
        return None
    mantissa, exponent = math.frexp(ratio)
    return 4 * exponent - 4 + sum(mantissa >= part for part in PARTS)


def token_of(byte):
    """(half octaves that a token's step is finer, quarters of an octave that its coefficients are larger)."""
    return (byte >> 4) - 3, (byte & 15) - 8


def step_of(finer, step):
    whole = fp32(step * 2.0 ** -(finer >> 1))
    return fp32(whole * HALF) if finer & 1 else whole


def first_place(deviation, step, more=0):
    """(table or -1, low bits) of a coefficient in a block's first cut. more: quarters of its token."""
    quarters = quarters_of(deviation, step)
    if quarters is None or quarters + more < 4 * LOWEST:
        return NOWHERE
    quarters += more
    if quarters < 4 * HIGHEST:
        return quarters - 4 * LOWEST, 0
    above = min(quarters - 4 * HIGHEST, 4 * MOST_LOW_BITS - 1)
    return RATIOS + above % 4, 1 + above // 4


def refined_place(cut, significant, deviation, step, more):
    quarters = quarters_of(deviation, step)
    if quarters is None or quarters + more < 4 * LOWEST and not significant:
        return NOWHERE
    quarters += more
    ratio = min(max(quarters - 4 * LOWEST, 0), RATIOS - 1)
    return FIRST_TABLES + (2 * (cut - 1) + significant) * RATIOS + ratio, 0


class LowBits:
    """Bits off bytes, the lowest of each first."""

    def __init__(self, data):
        self.bytes, self.bits, self.used = len(data), int.from_bytes(data, "little"), 0

    def take(self, count):
        if self.used + count > 8 * self.bytes:
            raise Malformed("low bits")
        value = self.bits >> self.used & (1 << count) - 1
        self.used += count
        return value

    def end(self):
        if -(-self.used // 8) != self.bytes:
            raise Malformed("bytes are left over")


def read_levels(pack, places, extent):
    """A level for each place, 0 where it has no table."""
    reader = Reader(extent)
    size, = struct.unpack("<I", reader.take(4))
    coded = [table for table, _ in places if table >= 0]
    symbols = iter(decode_rans(pack.tables, coded, len(coded), reader.take(size)))
    low = LowBits(reader.rest())
    levels = []
    for table, low_bits in places:
        if table < 0:
            levels.append(0)
            continue
        folded = next(symbols)
        if folded == ESCAPE:
            folded = low.take(ESCAPE_BITS)
        folded = folded << low_bits | low.take(low_bits)
        if folded > 2 * LARGEST:
            raise Malformed("a level")
        levels.append((folded + 1) // 2 if folded & 1 else -(folded // 2))
    low.end()
    return levels


def read_group(pack, group, cuts, position, extents):
    """What each cut of a group has: levels, and the coefficients of it and those before. cuts: of the pack's."""
    count = len(group["deviation"])
    sinks_end = (SINKS if position == 0 else 0) * count
    values, signs = [0.0] * (TOKENS * count), [0] * (TOKENS * count)
    found = []
    if len(extents[0]) < TOKENS:
        raise Malformed("tokens")
    tokens = [token_of(byte) for byte in extents[0][:TOKENS]]
    if position == 0 and any(token != (0, 0) for token in tokens[:SINKS]):
        raise Malformed("a sink")
    extents = [extents[0][TOKENS:], *extents[1:]]
    for number, cut in enumerate(cuts):
        step = pack.cuts[cut]
        places = []
        for i in range(TOKENS * count):
            if i < sinks_end:
                deviation = group["first_deviation" if i < count else "sink_deviation"][i % count]
                places.append(NOWHERE if number else first_place(deviation, pack.sink_step))
                continue
            finer, louder = tokens[i // count]
            more = louder + 2 * finer
            deviation = group["deviation"][i % count]
            if number:
                places.append(refined_place(number, signs[i] != 0, deviation, step, more))
            else:
                places.append(first_place(deviation, step, more))
        levels = read_levels(pack, places, extents[number])
        for i, (level, (table, low_bits)) in enumerate(zip(levels, places)):
            if table < 0:
                continue
            folded = 2 * level - 1 if level > 0 else -2 * level
            value = float(level) if low_bits else fp32(level + pack.mean[table][min(folded, MEANS - 1)])
            value = fp32(value * (pack.sink_step if i < sinks_end else step_of(tokens[i // count][0], step)))
            values[i] = fp32(values[i] - value if signs[i] < 0 else values[i] + value)
            signs[i] = signs[i] or (level > 0) - (level < 0)
        found.append((levels, list(values)))
    return found


def normalized(x):
    square = 0.0
    for number in x:
        square += number * number
    return [fp32(number * (1 / math.sqrt(square / len(x)))) for number in x] if square else [0.0] * len(x)


def times(matrix, width, x):
    """matrix[outputs][width] times x[width]."""
    return [sum(map(float.__mul__, matrix[at:at + width], x)) for at in range(0, len(matrix), width)]


def decode(pack, cuts, position, embeddings, extents):
    """For each number of cuts: levels by group, and rows [layer][token]. extents: [cut][group]."""
    first = []      # coefficients of each group's first cut that predict others, [token]
    out = [([], {}) for _ in cuts]
    for number, group in enumerate(pack.groups):
        count = len(group["deviation"])
        used = min(count, SOURCE_COEFFICIENTS)
        found = read_group(pack, group, cuts, position, [of_cut[number] for of_cut in extents])
        first.append([found[0][1][t * count:t * count + used] for t in range(TOKENS)])
        for t in range(TOKENS):
            inputs = normalized(embeddings[t])
            for source in group["sources"]:
                inputs += first[source][t]
            if position == 0 and t == 0:
                predicted = group["sink_bias"]
            else:
                predicted = [p + b for p, b in zip(times(group["predictor"], len(inputs), inputs), group["bias"])]
            for (levels, values), (_, rows) in zip(found, out):
                row = [p + s for p, s in zip(predicted, times(group["synthesis"], count, values[t * count:(t + 1) * count]))]
                width = len(row) // len(group["layers"])
                for i, layer in enumerate(group["layers"]):
                    rows.setdefault(layer, []).append(row[i * width:(i + 1) * width])
        for (levels, _), (all_levels, _) in zip(found, out):
            all_levels += levels
    return out


def cells():
    """(first ordinal, low bits) of each cell, were the exponent of s that of 1."""
    out = []
    for octave in range(-9, 4):
        low_bits = 7 - (3 if octave >= -3 else 1 if octave >= -5 else 0)
        out += [((127 + octave << 7) + at, low_bits) for at in range(0, 128, 1 << low_bits)]
    return out


@functools.cache
def half_ordinal(doubled):
    """The number at half of this ordinal, between two where that is none."""
    def value(ordinal):
        return math.ldexp(float(128 + ordinal % 128), (ordinal >> 7) - 127 - 7)
    return (value(doubled >> 1) + value(doubled + 1 >> 1)) / 2


def chance(f, s, low, high):
    """What is between two numbers of Student's t around f."""
    def at(x):
        z = (x - f) / s
        power = 1 + z * z / 13
        for _ in range(3):
            power *= power
        return 1 / power
    step = (high - low) / 16
    total = at(low) + at(high)
    for i in range(1, 16):
        total += at(low + step * i) * (4 if i % 2 else 2)
    return total * step / (3 * 2.372733099721983 * s)


def far_bits(quarters):
    return max(0, 5 - quarters // 4)


@functools.cache
def exact_table(quarters, half):
    """Frequencies where f is so many quarters of octaves above s, and s in this half of its octave."""
    scale = (1.189207115002721, 1.681792830507429)[half]
    middle = (127 + quarters // 4 << 7) + (quarters % 4 << 5) + 16
    chances = []
    if quarters < FAR:
        f = 0.125 if quarters == NEAREST else half_ordinal(2 * middle)
        for first, low_bits in cells():
            low, high = half_ordinal(2 * first - 1), half_ordinal(2 * (first + (1 << low_bits)) - 1)
            chances += [chance(f, scale, low, high), chance(f, scale, -high, -low)]
    else:
        f, bits = half_ordinal(2 * middle), far_bits(quarters)
        span = half_ordinal(2 * middle + 2) - f
        s = math.sqrt(scale * scale + span * span / 12)
        for step in range(2 * MIDDLE + 1):
            first = middle + (step - MIDDLE << bits) - (1 << bits >> 1)
            chances.append(chance(f, s, half_ordinal(2 * first - 1), half_ordinal(2 * (first + (1 << bits)) - 1)))
    counts, left = [0] * (EXACT_ESCAPE + 1), 1 << 24
    for i, x in enumerate(chances):
        count = int(min(x, 1.0) * (1 << 24))
        counts[i] = min(count, left) if count >= 2048 else 0
        left -= counts[i]
    counts[EXACT_ESCAPE] = max(left, 8192)
    return normalised(counts)


def to_bf16(value):
    bits, = struct.unpack("<I", struct.pack("<f", value))
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def read_exact(segments, extent):
    """The numbers of each segment in the order of `raw`. segments: (kind, tokens, heads, head_dim, decoded)."""
    reader = Reader(extent)
    coded = []      # (segment, where in raw, f, scale or None)
    for number, (kind, tokens, heads, head_dim, decoded) in enumerate(segments):
        header, = struct.unpack("<8xH", reader.take(10))
        channels, largest = heads * head_dim, header & 0x7FFF
        if largest > MOST_SCALE:
            raise Malformed("a scale")
        below = [0] * channels
        if header & 0x8000:
            halves = reader.take((channels + 1) // 2)
            below = [halves[c // 2] >> c % 2 * 4 & 15 for c in range(channels)]
        for t in range(tokens):
            for c in range(channels):
                at = c * tokens + t if kind == KEYS else (c // head_dim * tokens + t) * head_dim + c % head_dim
                missing = not (header & 0x8000) or below[c] != NONE_MISSING
                f = to_bf16(decoded[t * channels + c])
                coded.append((number, at, f, max(0, largest - below[c]) if missing else None))
    size, = struct.unpack("<I", reader.take(4))
    stream, low, cell = reader.take(size), LowBits(reader.rest()), cells()
    quarters = [None if scale is None else min((f & 0x7FFF) // 32 - 4 * (scale // 2), FARTHEST) for _, _, f, scale in coded]
    chosen = [2 * (max(q, NEAREST) - NEAREST) + scale % 2 for q, (_, _, _, scale) in zip(quarters, coded) if q is not None]
    used = {table: exact_table(table // 2 + NEAREST, table % 2) for table in chosen}
    tables = [used.get(table, []) for table in range(2 * (FARTHEST + 1 - NEAREST))]
    symbols = iter(decode_rans(tables, chosen, len(chosen), stream))
    out = [[0] * len(decoded) for *_, decoded in segments]
    for q, (number, at, f, scale) in zip(quarters, coded):
        if q is None:
            out[number][at] = f
            continue
        symbol = next(symbols)
        if symbol == EXACT_ESCAPE:
            out[number][at] = low.take(16)
            continue
        if q < FAR:
            first, bits = cell[symbol // 2]
            magnitude = first + low.take(bits) - (127 - scale // 2 << 7)
            ordinal = -1 - magnitude if symbol % 2 else magnitude
            if magnitude < 0:
                raise Malformed("a number")
        else:
            bits = far_bits(q)
            ordinal = (f & 0x7FFF) + (symbol - MIDDLE << bits) + low.take(bits) - (1 << bits >> 1)
        if not -0x8000 <= ordinal < 0x8000:
            raise Malformed("a number")
        negative = (ordinal < 0) != (f >= 0x8000)
        out[number][at] = (-1 - ordinal if ordinal < 0 else ordinal) | (0x8000 if negative else 0)
    low.end()
    return out


def verify_exact(path):
    """An error text, or None."""
    reader = Reader(path.read_bytes())
    if reader.take(8) != b"KVEXA001":
        return "not a golden file"
    good, count = reader.take(2)
    segments = []
    for _ in range(count):
        kind, _, tokens, heads, head_dim = struct.unpack("<2B3H", reader.take(8))
        elements = tokens * heads * head_dim
        segments.append((kind, tokens, heads, head_dim, struct.unpack(f"<{elements}f", reader.take(4 * elements))))
    size, = struct.unpack("<I", reader.take(4))
    try:
        read = read_exact(segments, reader.take(size))
    except Malformed as error:
        return f"refused: {error}" if good else None
    if not good:
        return "decoded, but must be refused"
    for number, found in enumerate(read):
        if struct.pack(f"<{len(found)}H", *found) != reader.take(2 * len(found)):
            return f"segment {number} has other numbers"
    return None if not reader.rest() else "bytes are left over"


def verify(path):
    """An error text, or None."""
    reader = Reader(path.read_bytes())
    if reader.take(8) != b"KVKLT001":
        return "not a golden file"
    good, cut_count, layers, _, width, hidden, position = struct.unpack("<4B2HI", reader.take(12))
    slides, cuts = [bool(s) for s in reader.take(layers)], list(reader.take(cut_count))
    reader.take(4 * TOKENS)
    pack = Pack(path.with_name(path.name.split("-")[0] + ".pack"), slides)
    embeddings = [struct.unpack(f"<{hidden}f", reader.take(4 * hidden)) for _ in range(TOKENS)]
    count = cut_count * len(pack.groups)
    sizes = struct.unpack(f"<{count}I", reader.take(4 * count))
    taken = iter([reader.take(size) for size in sizes])
    extents = [[next(taken) for _ in pack.groups] for _ in cuts]
    try:
        decoded = decode(pack, cuts, position, embeddings, extents)
    except Malformed as error:
        return f"refused: {error}" if good else None
    if not good:
        return "decoded, but must be refused"
    reader.take(4 * layers * TOKENS * width)
    for number, (levels, rows) in enumerate(decoded):
        if hashlib.sha256(struct.pack(f"<{len(levels)}i", *levels)).digest() != reader.take(32):
            return f"cut {number} has other levels"
        expected = struct.unpack(f"<{layers * TOKENS * width}f", reader.take(4 * layers * TOKENS * width))
        found = [value for layer in range(layers) for row in rows[layer] for value in row]
        # The layers of a token share sums, where large numbers may cancel.
        largest = [max(abs(e) for layer in range(layers) for e in expected[(layer * TOKENS + t) * width:][:width])
                   for t in range(TOKENS)]
        if any(abs(e - f) > 2 ** -18 * largest[i // width % TOKENS] for i, (e, f) in enumerate(zip(expected, found))):
            return f"cut {number} decodes to other numbers"
    return None if not reader.rest() else "bytes are left over"


def main():
    files = sorted(path for path in pathlib.Path(sys.argv[1]).iterdir() if path.suffix in (".klt", ".exact"))
    failed = 0 if files else 1
    for path in files:
        error = verify(path) if path.suffix == ".klt" else verify_exact(path)
        if error:
            print(f"{path.name}: {error}")
            failed += 1
    print(f"{len(files)} golden files, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
