"""The part of scripts/bench-peers that computes: prefill and decode steps of one model, by us (`kvant bench node`)
and by llama.cpp (`llama-batched-bench`, its own program), in turns in one run.

Both read the same numbers; Kvant computes with weights of bf16, or those of --weights, whatever a GGUF file has, so
llama.cpp is given files of the same bits too. KV caches are compared by their bits: raw beside f16, tile8 beside q8_0,
tile4 beside q4_0. Of attention by itself neither program has a row: it is the time of a step at 16,384 tokens, less
that at 64, of both alike; and likewise at 2,048.
"""
import json
import pathlib
import subprocess
import tarfile

PEERS = pathlib.Path(__file__).resolve().parent
THREADS = 2
PACKAGE = "llama-cpp-python"
PROGRAM = "llama-batched-bench"
# As its own release builds, but for this CPU: no BLAS, OpenMP as by default.
FLAGS = ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_C_FLAGS_RELEASE=-O3 -DNDEBUG", "-DCMAKE_CXX_FLAGS_RELEASE=-O3 -DNDEBUG",
         "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
         "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_OPENSSL=OFF"]
NEAR, MIDDLE, FAR = 64, 2048, 16384  # contexts whose steps differ by attention alone
PROMPTS = (512, 4096, FAR)
GEMMA = pathlib.Path("~/.cache/kvant/gemma-3-270m/gemma-3-270m-q4_k_m.gguf").expanduser()
GEMMA_PROMPT = 2048
STEPS = 16  # decoded tokens of each sequence
SEQUENCES = (1, 8)
KV = {"raw": "f16", "tile8": "q8_0", "tile4": "q4_0"}
# Weights of ours and of llama.cpp that have the same bits.
WEIGHTS = {"bf16": "bf16", "int8": "q8_0"}


def run(command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


def build(out, python):
    """Builds llama.cpp out of its Python package's source; the program, and its version."""
    folder, program = out / "llama.cpp", out / "llama.cpp/build/bin" / PROGRAM
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        run([python, "-m", "pip", "download", "-q", "--no-binary", PACKAGE, "--no-deps", "-d", folder, PACKAGE])
        archive = next(folder.glob("llama_cpp_python-*.tar.gz"))
        with tarfile.open(archive) as packed:
            packed.extractall(folder)
        source = folder / archive.name.removesuffix(".tar.gz") / "vendor/llama.cpp"
        # What it names has no index, so that each build would configure anew.
        (source / ".git").unlink(missing_ok=True)
        run(["cmake", "-G", "Ninja", "-S", source, "-B", folder / "build", *FLAGS])
        run(["cmake", "--build", folder / "build", "--target", PROGRAM])
    archive = next(folder.glob("llama_cpp_python-*.tar.gz")).name.removesuffix(".tar.gz")
    head = folder / archive / ".git/modules/vendor/llama.cpp/HEAD"
    commit = head.read_text()[:9] if head.is_file() else "unknown"
    return program, f"commit {commit} of {archive}; {' '.join(FLAGS)}; {THREADS} threads, ubatch 512"


def gguf(python, path, *arguments):
    """Writes a file that is not there yet."""
    if not path.is_file():
        part = path.with_suffix(".part")
        run([python, PEERS / "gguf_files.py", *arguments, part])
        part.rename(path)
    return path


def row(model, what, tokens, sequences, peer, weights, kv, rate):
    return {"model": model, "what": what, "tokens": tokens, "sequences": sequences, "peer": peer, "weights": weights,
            "kv": kv, "tokens_per_s": rate}


def attention(rows):
    """A step's attention by itself, of the rows of one form: what a step takes longer than at NEAR."""
    steps = [of for of in rows if of["what"] == "decode" and of["sequences"] == 1]
    near = next((of for of in steps if of["tokens"] == NEAR), None)
    return [{**of, "what": "attention", "tokens_per_s": 1 / (1 / of["tokens_per_s"] - 1 / near["tokens_per_s"])}
            for of in steps if near is not None and of is not near]


def kvant(program, out, model, file, weights, codec, prompts, contexts):
    path = out / "node-rows.json"
    run([program, "bench", "node", "--model", file, "--threads", str(THREADS), "--codec", codec, "--seconds", "1",
         *(["--prompt", ",".join(map(str, prompts))] if prompts else []), "--context", ",".join(map(str, contexts)),
         "--sequences", ",".join(map(str, SEQUENCES)), "--weights", weights, "--json", path], timeout=900)
    rows = []
    for of in json.loads(path.read_text()):
        if of["what"] == "prompt":
            rows.append({**row(model, "prefill", of["context"], 1, "kvant", weights, codec, of["tokens_per_s"]),
                         "of_sgemm": of["gflop_per_s"] / of["sgemm_gflop_per_s"]})
        elif of["what"] == "decode":
            rows.append(row(model, "decode", of["context"], of["sequences"], "kvant", weights, codec, of["tokens_per_s"]))
    return rows + attention(rows)


def llama(program, model, file, weights, kv, flash, prompts, contexts):
    """flash: attention on or off. Sequences that decode at once have a stream each (no --kv-unified), and the prompt is
    computed for the first and copied to the others."""
    form = kv if flash == "on" else f"{kv}, no flash attention"
    rows = []
    for sequences in SEQUENCES:
        lengths = sorted({*contexts, *(prompts if sequences == 1 else ())})
        said = run([program, "-m", file, "-t", str(THREADS), "-fa", flash, "-ctk", kv, "-ctv", kv, "-b", "2048", "-ub", "512",
                    "-c", str(sequences * (lengths[-1] + 2 * STEPS)), "-npp", ",".join(map(str, lengths)), "-ntg", str(STEPS),
                    "-npl", str(sequences), "-pps", "--output-format", "jsonl"], timeout=1800)
        for of in map(json.loads, (line for line in said.splitlines() if line.startswith("{"))):
            if of["pp"] in prompts and sequences == 1:
                rows.append(row(model, "prefill", of["pp"], 1, "llama.cpp", weights, form, of["speed_pp"]))
            if of["pp"] in contexts:
                rows.append(row(model, "decode", of["pp"], sequences, "llama.cpp", weights, form, of["speed_tg"]))
    return rows + attention(rows)


def forms(ours, theirs, out, python):
    """{name of a form: function of a round that gives rows}. theirs: llama.cpp's program, or None."""
    files = {kind: gguf(python, out / f"random-{WEIGHTS[kind]}.gguf", "random", WEIGHTS[kind].upper()) for kind in WEIGHTS}
    made = {}

    def add(model, own_file, own, codec, prompts, contexts, peers):
        made[f"kvant, {model}, {own}, {codec}"] = lambda: kvant(ours, out, model, own_file, own, codec, prompts, contexts)
        if theirs is None:
            return
        kv = KV[codec]
        # Over a quantized cache it computes prompts slowly: 16,384 tokens take many minutes.
        near_enough = contexts if kv == "f16" else [context for context in contexts if context < FAR]
        for kind, file in peers.items():
            # What is quantized is attended by flash attention alone.
            for flash in ("on", "off") if kv == "f16" else ("on",):
                made[f"llama.cpp, {model}, {kind}, {kv}, flash attention {flash}"] = (
                    lambda kind=kind, file=file, flash=flash: llama(theirs, model, file, kind, kv, flash, prompts, near_enough))

    for kind in WEIGHTS:
        for codec in KV:
            prompts = PROMPTS if codec == "raw" else ()
            add("random", files["bf16"], kind, codec, prompts, (NEAR, MIDDLE, FAR), {WEIGHTS[kind]: files[kind]})
        if GEMMA.is_file():
            file = gguf(python, out / f"gemma-{WEIGHTS[kind]}.gguf", "retype", WEIGHTS[kind].upper(), GEMMA)
            peers = {WEIGHTS[kind]: file} | ({"q4_k_m": GEMMA} if kind == "bf16" else {})
            add("gemma", GEMMA, kind, "raw", (GEMMA_PROMPT,), (GEMMA_PROMPT,), peers)
    return made
