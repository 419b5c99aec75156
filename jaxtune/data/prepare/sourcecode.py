"""Source trees: which files are code that people wrote, in which language, under which licence."""

import functools
import re

LANGUAGES = {
    '.py': 'python', '.pyi': 'python', '.ipynb': '', '.c': 'c', '.h': 'c', '.cc': 'c++', '.cpp': 'c++', '.cxx': 'c++',
    '.hpp': 'c++', '.hh': 'c++', '.cs': 'c#', '.java': 'java', '.kt': 'kotlin', '.scala': 'scala', '.go': 'go',
    '.rs': 'rust', '.js': 'javascript', '.jsx': 'javascript', '.mjs': 'javascript', '.ts': 'typescript',
    '.tsx': 'typescript', '.rb': 'ruby', '.php': 'php', '.swift': 'swift', '.m': 'objective-c', '.r': 'r',
    '.jl': 'julia', '.lua': 'lua', '.pl': 'perl', '.pm': 'perl', '.sh': 'shell', '.bash': 'shell',
    '.sql': 'sql', '.hs': 'haskell',
    '.ml': 'ocaml', '.ex': 'elixir', '.erl': 'erlang', '.clj': 'clojure', '.f90': 'fortran', '.cu': 'cuda',
    '.vue': 'vue', '.css': 'css', '.scss': 'css', '.proto': 'protobuf', '.tex': 'latex', '.md': 'markdown',
    '.rst': 'restructuredtext', '.toml': 'toml', '.cmake': 'cmake', '.zig': 'zig', '.dart': 'dart', '.asm': 'assembly',
}  # fmt: skip
_LANGUAGES = {suffix: name for suffix, name in LANGUAGES.items() if name}
_SKIPPED_FOLDERS = {
    'node_modules', 'vendor', 'third_party', 'dist', 'build', 'target', '__pycache__', 'site-packages',
    'bower_components',
}  # fmt: skip
_SKIPPED_FILES = re.compile(
    r'.*(?:\.min\.(?:js|css)|-min\.js|\.bundle\.js|_pb2(?:_grpc)?\.pyi?|\.pb\.go|\.g\.dart)', re.I
)
_LICENCE_FILES = re.compile(r'(?:licen[cs]e|copying|unlicense)(?:[.-][\w.-]+)?', re.I)
# SPDX identifiers by words that only their texts hold; the first that fits counts.
_LICENCES = (
    ('Apache-2.0', 'apache license'),
    ('AGPL-3.0', 'gnu affero general public license'),
    ('LGPL', 'gnu lesser general public license'),
    ('GPL-3.0', 'gnu general public license version 3'),
    ('GPL-2.0', 'gnu general public license'),
    ('MPL-2.0', 'mozilla public license'),
    ('PSF-2.0', 'python software foundation license'),
    ('Unlicense', 'this is free and unencumbered software'),
    ('BSD-3-Clause', 'neither the name of'),
    ('BSD-2-Clause', 'redistributions in binary form must reproduce'),
    ('ISC', 'permission to use, copy, modify, and/or distribute'),
    ('MIT', 'permission is hereby granted, free of charge'),
)


def language(name: str) -> str:
    """The programming language of a file by its name; '' = none of ours."""
    base = name.rsplit('/', 1)[-1].lower()
    if base in ('makefile', 'dockerfile'):
        return base
    return _LANGUAGES.get('.' + base.rsplit('.', 1)[-1], '') if '.' in base else ''


def wanted(path: str) -> bool:
    """Whether a file, by its path below the tree, is code and not a copy, a build's result or a minified file."""
    *folders, base = path.split('/')
    if any(name.startswith('.') or name in _SKIPPED_FOLDERS for name in folders):
        return False
    return not base.startswith('.') and bool(language(base)) and not _SKIPPED_FILES.fullmatch(base)


def is_licence(name: str) -> bool:
    """Whether a file is one that states a tree's licence."""
    return bool(_LICENCE_FILES.fullmatch(name.rsplit('/', 1)[-1]))


@functools.lru_cache(1024)
def licence(text: str) -> str:
    """The SPDX identifier of a licence's text; `other` where it is none of the common ones."""
    plain = ' '.join(text.lower().replace(',', ' ').split())
    for name, words in _LICENCES:
        if ' '.join(words.replace(',', ' ').split()) in plain:
            return name
    return 'other'
