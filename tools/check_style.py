"""Check the language and the sizes of the project: `python tools/check_style.py [PATHS]`.

Reports phrases that readers of the field would have to translate, each with a replacement; files over 400 lines;
functions over 60; packages with more than 12 modules. Exit status 1 if there is any. Without paths, every file that
git tracks is checked.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, FOLDER_MODULES = 400, 60, 12

COUNTED = "images|bytes|samples|rows|requests|seconds|batches|files|members|lines|steps|times|processes|shards|objects"
COUNTED += "|annotations|masks|detections|boxes|kernels|channels|threads|connections|MB|GB|MiB|GiB|once|one|row|line"
UNITS = "class|worker|shard|sample|process|second|image|rank|step|epoch|request|mask|table|split|file|object|batch"
UNITS += "|category|row|pixel|GPU|machine|lane|run|minute|channel|loader|section|picture|layer|stage|part|dataset"

# Regular expression -> what to write instead.
PHRASES = {
    r"\b(?:told|tells?|telling)\b(?!\()": "is logged, reports, says, message",
    r"\b(?:can|could|cannot|may|to)(?: not)? be had\b": "unavailable, could not be fetched",
    r"\bgo(?:es)? on\b": "resumes, continues",
    r"\banew\b": "again, from scratch",
    r"\b(?:rated|rates (?:the|a|an|every|each|all|these|this|it))\b": "evaluated, scored",
    rf"\b(?:{COUNTED}) an? (?:{UNITS})\b": "images per class, bytes per worker",
    r"\bso (?:many|much) (?:seconds|bytes|samples|patience)\b": "more than N seconds",
    r"\blies?\b": "is in, is under",
    r"\bbeside\b": "alongside, compared with, next to",
    r"\bway of the data\b": "data flow",
    r"\b[Ii]n real life\b": "usage",
    r"\bwhom\b": "reword",
    r"\bas far as can be told\b": "best effort",
    r"\bPATIENCE\w*": "TIMEOUT",  # `train.patience`, of evaluations, is the usual word
    r"\bspeaks? up\b": "reports",
    r"\bused up\b": "consumed",
    r"\brow of (?:global )?batches\b": "sequence of batches",
    r"\bheld against\b": "compared with",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\b(?:lit|shines?|shining|thinned|homeless)\b": "coverage, extends, downsampled, orphaned",
    r"\b(?:ours|theirs)\b": "this package's, torchvision's",
    r"\bwhat there is\b": "what exists, reword",
}
PATTERNS = {re.compile(phrase): instead for phrase, instead in PHRASES.items()}


def phrases(path: Path) -> Iterator[str]:
    """Odd phrases of a file, with line numbers."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for pattern, instead in PATTERNS.items():
            for found in pattern.finditer(line):
                yield f"{path}:{number}: {found[0]!r}: write {instead}"


def sizes(path: Path) -> Iterator[str]:
    """A Python file that is too long, and its functions that are."""
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > FILE_LINES:
        yield f"{path}: {lines} lines: at most {FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines: at most {FUNCTION_LINES}"


def folders(paths: list[Path]) -> Iterator[str]:
    """Packages with too many modules."""
    for folder in sorted({path.parent for path in paths if path.suffix == ".py" and path.parts[0] != "tests"}):
        modules = [each for each in folder.glob("*.py") if each.name != "__init__.py"]
        if len(modules) > FOLDER_MODULES and (folder / "__init__.py").exists():
            yield f"{folder}: {len(modules)} modules: at most {FOLDER_MODULES}"


def main(arguments: list[str]) -> int:
    """Check the files under the given paths."""
    listed = subprocess.run(["git", "ls-files", "--", *arguments], capture_output=True, text=True, check=True).stdout
    paths = [
        Path(name) for name in listed.splitlines() if Path(name).exists() and Path(name).name != Path(__file__).name
    ]
    texts = [path for path in paths if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".js", ".html", ".svg"}]
    found = [line for path in texts for line in phrases(path)]
    found += [line for path in paths if path.suffix == ".py" for line in sizes(path)]
    found += folders(paths)
    print("\n".join(found) or "style: no faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
