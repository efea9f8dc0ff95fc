"""Check of the words of documents and code, as far as words can be counted: python -m tests.words.

Documents: the length of the README and of sentences, words that the style rules replace, chains of semicolons.
Code: names of the product, and openings of docstrings.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
README_LINES = 130
SENTENCE = {"README.md": 25}  # words of a sentence, at most
LONGEST = 30  # the same in all other documents

# Each pattern is a word or phrase for which the style rules have a plainer one.
BANNED = {
    r"says?|said|tells?|told": "prints, reports, names, is given",
    r"asked|asks": "requested, needs",
    r"taught": "distilled",
    r"at hand": "available",
    r"what (?:came|comes) out": "the result",
    r"what is left": "the rest, the remainder",
    r"anew": "again",
    r"lest": "so that … not",
    r"thereby|therein|thereof|whereby|wherein|herein": "by this, in it",
    r"simply|obviously|of course": "nothing",
    r"utili[sz]e[sd]?|leverag(?:e|es|ed|ing)": "use",
}
NAMES = {  # that say nothing of what they name
    "of", "told", "made", "asked", "known", "found", "how", "there", "own", "beside", "said", "says", "kept", "taught",
}  # fmt: skip
OPENINGS = re.compile(  # relative clauses, prepositions and pronouns
    r"(?:What|Whether|Which|Where|Who|How|When|While|Until|The same|As|At|Beside|By|For|From|In|Of|To|With|Without"
    r"|It|Its|Their|They|That|These|This|Those)\b(?!-)"
)


def documents() -> list[str]:
    """Return the paths of all documents whose words are checked."""
    paths = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *ROOT.glob("docs/**/*.md")]
    return sorted(str(path if isinstance(path, str) else path.relative_to(ROOT)) for path in paths)


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each paragraph, list item, heading and cell.

    Code becomes the word `code`. Quotes are left out: they are output of programs.
    """
    text = re.sub(r"^```.*?^```", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    begin, parts = 1, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        line = "" if line.startswith(">") else line  # quotes are output of programs
        is_row = line.startswith("|")
        if parts and (is_row or re.match(r"\s*(?:$|[-*#]|\d+\.\s)", line)):
            yield begin, " ".join(parts)
            parts = []
        if is_row:
            yield from ((number, cell) for cell in re.split(r"(?<!\\)\|", plain(line)) if cell.strip(" -:"))
        elif line.strip():
            begin = begin if parts else number
            parts.append(plain(line.strip().lstrip("-*#> ")))


def plain(line: str) -> str:
    """Return a line without links, pictures, emphasis and code."""
    line = re.sub(r"`[^`]*`", "code", line)
    line = re.sub(r"!\[[^]]*\]\([^)]*\)", "", line)
    line = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line)
    return re.sub(r"\*\*|(?<!\w)_|_(?!\w)", "", line)


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph at full stops, question marks and exclamation marks that end a sentence."""
    paragraph = re.sub(r"\b(e\.g|i\.e|et al|eq|arXiv)\. (?=[a-z0-9(])", r"\1 ", paragraph)
    return re.split(r"(?<=[.!?])[\"')]*\s+(?=[A-Z(\"'0-9]|code\b)", paragraph)


def document_faults(name: str) -> Iterator[str]:
    """Yield what is wrong with the words of a document."""
    text = (ROOT / name).read_text()
    if name == "README.md" and (lines := text.count("\n")) > README_LINES:
        yield f"{name}: {lines} lines, more than {README_LINES}"
    longest = SENTENCE.get(name, LONGEST)
    for number, paragraph in paragraphs(text):
        for sentence in sentences(paragraph):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            if len(words) > longest:
                yield f"{name}:{number}: {len(words)} words, more than {longest}: {sentence}"
            if sentence.count(";") > 1:
                yield f"{name}:{number}: a chain of semicolons: {sentence}"
        for pattern, instead in BANNED.items():
            if match := re.search(rf"\b(?:{pattern})\b", paragraph, re.IGNORECASE):
                yield f"{name}:{number}: {match[0]!r} (instead: {instead}): {paragraph[:100]}"


def sources() -> list[Path]:
    """Return the Python files of the product."""
    return sorted([ROOT / "train.py", *ROOT.glob("kd/**/*.py"), *ROOT.glob("sweeps/**/*.py")])


def other_sources() -> list[Path]:
    """Return the Python files of tests, examples and the build."""
    return sorted([ROOT / "setup.py", *ROOT.glob("tests/**/*.py"), *ROOT.glob("examples/**/*.py")])


def name_faults(path: Path) -> Iterator[str]:
    """Yield names that a source file binds, and that nobody but its author understands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg | ast.keyword):
            name = node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        elif isinstance(node, ast.alias):
            name = node.asname or ""
        elif isinstance(node, ast.ExceptHandler):
            name = node.name or ""
        else:
            continue
        if name.strip("_") in NAMES:
            yield f"{path.relative_to(ROOT)}:{node.lineno}: the name {name}"


def docstring_faults(path: Path) -> Iterator[str]:
    """Yield docstrings that begin neither with an imperative nor with a noun phrase."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node) or ""
            if match := OPENINGS.match(docstring):
                line = getattr(node, "lineno", 1)
                yield f"{path.relative_to(ROOT)}:{line}: a docstring that begins with {match[0]!r}"


def check() -> list[str]:
    """Return all faults."""
    faults = [fault for name in documents() for fault in document_faults(name)]
    return faults + [
        fault for path in (*sources(), *other_sources()) for fault in (*name_faults(path), *docstring_faults(path))
    ]


def main() -> int:
    faults = check()
    for fault in faults:
        print(fault)
    count = len(sources()) + len(other_sources())
    print(f"words: {len(faults)} faults in {len(documents())} documents and {count} source files")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
