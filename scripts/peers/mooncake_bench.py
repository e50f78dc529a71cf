"""Gets and puts of values at Mooncake's store, by its own Python interface: registered buffers, no copy in Python.

    mooncake_bench.py serve MASTER                     # mounts the memory that holds values, until it is ended
    mooncake_bench.py MASTER SIZE OUTSTANDING SECONDS  # one JSON object for get and one for put

For scripts/bench-peers; no part of Kvant.
"""

import ctypes
import json
import sys
import time

from mooncake.store import MooncakeDistributedStore

KEYS = 64


def connect(master, segment_bytes):
    store = MooncakeDistributedStore()
    if store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, 256 << 20, "tcp", "", master) != 0:
        sys.exit("mooncake_bench: the store can't be set up")
    return store


def measure(store, get, size, outstanding, seconds, buffer):
    places = [buffer + i * size for i in range(outstanding)]
    sizes = [size] * outstanding
    latencies, moved, first = [], 0, 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        asked = time.perf_counter()
        if get:
            names = [f"key{size}-{(first + i) % KEYS}" for i in range(outstanding)]
            done = store.batch_get_into(names, places, sizes) if outstanding > 1 else [store.get_into(names[0], places[0], size)]
            if any(count != size for count in done):
                sys.exit(f"mooncake_bench: a get ended with {done}")
        else:
            names = [f"new{begun}-{first + i}" for i in range(outstanding)]
            done = store.batch_put_from(names, places, sizes) if outstanding > 1 else [store.put_from(names[0], places[0], size)]
            if any(status != 0 for status in done):
                sys.exit(f"mooncake_bench: a put ended with {done}")
        latencies.append((time.perf_counter() - asked) * 1e6)
        moved += size * outstanding
        first += outstanding
    took = time.perf_counter() - begun
    # What was put stays until it is removed: room for the next row.
    for number in range(0 if get else first):
        store.remove(f"new{begun}-{number}")
    print(json.dumps({"peer": "mooncake", "op": "get" if get else "put", "size_bytes": size, "outstanding": outstanding,
                      "gb_per_s": moved / took / 1e9, "us_p50": sorted(latencies)[len(latencies) // 2]}), flush=True)


def main():
    if sys.argv[1] == "serve":
        store = connect(sys.argv[2], 2 << 30)
        print("ready", flush=True)
        sys.stdin.read()
        store.close()
        return
    master, size, outstanding, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    store = connect(master, 0)
    memory = ctypes.create_string_buffer(size * outstanding)
    buffer = ctypes.addressof(memory)
    if store.register_buffer(buffer, size * outstanding) != 0:
        sys.exit("mooncake_bench: a buffer can't be registered")
    for key in range(KEYS):
        store.put_from(f"key{size}-{key}", buffer, size)
    for get in (True, False):
        measure(store, get, size, outstanding, seconds, buffer)
    store.close()


main()
