"""The textual embeddings that a prompt names: files that an encoded prompt depends on."""

from __future__ import annotations

import re
from typing import Any

NAMED = re.compile(r"embedding:([^\s,:()]+)")


def embeddings_state(*texts: Any) -> list[tuple[str, int, int]]:
    """Stands for the embedding files that some texts name, as they are on the disk now, for `fingerprint_inputs`: the
    host keeps an encoded prompt until its inputs change, and a file is one of them. None, a text that comes by a link,
    may name any."""
    from ..training.embedding_files import all_embeddings, named_embeddings

    if any(not isinstance(text, str) for text in texts):
        paths = all_embeddings()
    else:
        paths = [path for name in set(NAMED.findall(" ".join(texts))) for path in named_embeddings(name)]
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(set(paths)) if path.is_file()]
