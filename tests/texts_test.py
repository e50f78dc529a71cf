"""scripts/texts without its downloads: that manual pages lose their markup and nothing else, and that no text is
measured that was calibrated with."""
import importlib.machinery
import importlib.util
import sys

sys.dont_write_bytecode = True
loader = importlib.machinery.SourceFileLoader("texts", sys.argv[1])
texts = importlib.util.module_from_spec(importlib.util.spec_from_loader("texts", loader))
loader.exec_module(texts)

PAGE = r"""'\" t
.\" A comment.
.ds UX \s-1UNIX\s+1
.if !\n(.g \{\
.	if 0 \{\
.		ds UX not this
.	\}
.\}
.de XX
not this either
..
.TH TAR 1 2023
.SH "BEZEICHNUNG"
tar \- ein \fBArchiv\fP f\[u00FC]r
.B \*(UX
gemacht
.RB ( tar\ -x ),
siehe
.UR https://example.org/
die Seite
.UE .
.TP
\fB\-\-help\fP
Zeigt \(aqHilfe\(aq an. \" ein Kommentar
.IP \(bu 2
Punkt\e
.nf
  int  main\&.c;

  zwei
.fi
.TS
tab(|);
l l.
eins	T{
zwei
drei
T}
.TE
"""
PLAIN = """BEZEICHNUNG

tar - ein Archiv f\u00fcr UNIX gemacht (tar -x), siehe <https://example.org/> die Seite

--help
Zeigt 'Hilfe' an.

\u2022 Punkt\\

  int  main.c;

  zwei

eins  zwei drei
"""


def files(part):
    return {(package, path) for sources in texts.SETS[part].values() for package, paths in sources for path in paths}


failures = []
if (text := texts.Roff(PAGE).text()) != PLAIN:
    failures.append(f"the page became\n{text!r}\nnot\n{PLAIN!r}")
measured, learnt = files("held-out"), files("calibration")
if both := measured & learnt:
    failures.append(f"in both sets: {both}")
# A page and its translation say the same.
pages = [{path.split("/")[-1] for _, path in part if "/man/" in path} for part in (measured, learnt)]
if both := pages[0] & pages[1]:
    failures.append(f"manual pages in both sets, in two languages: {both}")
if strangers := {package for package, _ in measured | learnt} ^ set(texts.PACKAGES):
    failures.append(f"packages with no file or no version: {strangers}")
for kind, least in {"documentation": 16, "code": 8, "languages": 8}.items():
    if (count := sum(len(paths) for _, paths in texts.SETS["held-out"][kind])) < least:
        failures.append(f"{count} held-out files of {kind}, not {least}")
shares = {kind: sum(len(paths) for _, paths in sources) for kind, sources in texts.SETS["calibration"].items()}
if len(set(shares.values())) != 1:
    failures.append(f"kinds do not weigh the same in calibration: {shares}")
if (cut := texts.cut("a\nb\u00e9\nc\n", 6)) != "a\nb\u00e9\n":
    failures.append(f"cut to {cut!r}")
print("\n".join(failures) or "passed")
sys.exit(bool(failures))
