"""The text the default models learn from: Python 3.11's source and documentation, as Debian packages them.

The packages are fetched with apt and unpacked into a cache folder; nothing is installed, so what else stands on the
machine changes nothing. Licence of the text: Python Software Foundation License. Held out by module: a module's source
and its page of documentation are both held out or both seen.
"""

import hashlib
import pathlib
import re
import subprocess

PACKAGES = {
    "libpython3.11-minimal": "3.11.2-6+deb12u9",
    "libpython3.11-stdlib": "3.11.2-6+deb12u9",
    "python3.11-doc": "3.11.2-6+deb12u9",
}
HELD_OUT = ("json", "heapq", "textwrap", "fnmatch", "sched", "colorsys", "bisect", "glob")
# Tables, generated files, and pydoc's copy of the documentation, which would leak held-out pages.
SKIPPED = ("encodings/", "pydoc_data/", "_sysconfigdata", "__phello__", "lib2to3/tests/", "sre_constants")


def unpack(cache: pathlib.Path) -> pathlib.Path:
    """Fetches and unpacks the packages once; returns the root they are unpacked under."""
    root = cache / "packages"
    if (root / "done").exists():
        return root
    root.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        try:
            subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=root, check=True)
        except subprocess.CalledProcessError:
            print(f"{name} {version} is no longer on offer; taking the current version (the corpus digest will differ)")
            subprocess.run(["apt-get", "download", name], cwd=root, check=True)
    for deb in sorted(root.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(deb), str(root)], check=True)
    (root / "done").touch()
    return root


ROLE = re.compile(r":[a-zA-Z:+-]+:`(?:[^`<]*<)?[~!]?([^`>]*)>?`")
LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{0,2}")
OBJECT = re.compile(r"^(\s*)\.\. (?:[a-z]+:)?(?:function|class|method|classmethod|staticmethod|attribute|data|exception|"
                    r"module|decorator|opcode|option|envvar|describe|cfunction|macro|type|member|var|c:\w+):: ")
DROPPED = re.compile(r"^\s*(?:\.\. (?:index|sectionauthor|moduleauthor|highlight|currentmodule|module|testsetup|"
                     r"include|toctree|only|rubric|doctest|_[^:]*:|literalinclude|versionadded:: *$)|"
                     r":(?:synopsis|platform|deprecated|noindex|maxdepth|module|language|file|class|hidden|numbered)\b)")


def plain(rst: str) -> str:
    """reStructuredText without its markup: enough for reading, not a parser."""
    lines = []
    for line in rst.splitlines():
        if DROPPED.match(line) or line.strip() in ("..", "::", "--------------"):
            continue
        line = OBJECT.sub(r"\1", line)
        line = re.sub(r"^(\s*)\.\. versionadded:: *(\S+)", r"\1New in version \2.", line)
        line = re.sub(r"^(\s*)\.\. versionchanged:: *(\S+)", r"\1Changed in version \2:", line)
        line = re.sub(r"^(\s*)\.\. deprecated(?:-removed)?:: *(\S+)", r"\1Deprecated since version \2:", line)
        line = re.sub(r"^(\s*)\.\. (note|warning|seealso|impl-detail|tip|important)::", 
                      lambda m: m[1] + {"seealso": "See also", "impl-detail": "Implementation detail"}.get(
                          m[2], m[2].capitalize()) + ":", line)
        line = re.sub(r"^\s*\.\. [a-z-]+::.*$", "", line)
        line = LINK.sub(r"\1", ROLE.sub(r"\1", line))
        line = line.replace("``", "`").replace("::", ":") if line.endswith("::") else line.replace("``", "`")
        lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def documents(cache: pathlib.Path) -> dict[str, list[tuple[str, str]]]:
    """{'train_doc', 'train_code', 'held_out'} -> [(name, text)], in a fixed order."""
    root = unpack(cache)
    result = {"train_doc": [], "train_code": [], "held_out": []}
    pages = root / "usr/share/doc/python3.11/html/_sources"
    code = root / "usr/lib/python3.11"
    for path in sorted(pages.rglob("*.rst.txt")):
        name = str(path.relative_to(pages))[: -len(".rst.txt")]
        text = plain(path.read_text())
        held = name.startswith("library/") and name[len("library/"):] in HELD_OUT
        if len(text) > 500:
            result["held_out" if held else "train_doc"].append((name, text))
    for path in sorted(code.rglob("*.py")):
        name = str(path.relative_to(code))
        if any(name.startswith(s) for s in SKIPPED) or path.is_symlink():
            continue
        text = path.read_text(errors="ignore")
        held = name.split("/")[0].removesuffix(".py") in HELD_OUT
        if len(text) > 500:
            result["held_out" if held else "train_code"].append((name, text))
    return result


def digest(docs: dict[str, list[tuple[str, str]]]) -> str:
    h = hashlib.sha256()
    for part in sorted(docs):
        for name, text in docs[part]:
            h.update(f"{part}\0{name}\0{text}\0".encode())
    return h.hexdigest()
