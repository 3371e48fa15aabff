"""Which leaves are no hidden matrices, told by their paths and shapes: embeddings, heads, tables of positions.

These stand at the ends of a model, once each, and have names of many forms. Inside a block of the model the same words
mean hidden matrices: ``output/kernel`` is a head, ``layer/0/output/dense/kernel`` is BERT's feed-forward layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

_LAYER = "(_(layer|linear|dense|fc|proj|projection|kernel|weights?))*"

_ANYWHERE = re.compile(
    r".*emb(s|e?d(s|ded|dings?|ders?)?)?"  # emb, posembed, n_embd, embedder, unembedding; no member or ensemble
    r"|vocab.*|codebooks?|wte|wpe"
    r"|.*logits?.*|classif.*"  # logits_dense, logitdense, classifier
)
"""Words that mean an embedding or a head wherever they stand."""
_PART = re.compile(
    r"(.*_)?head|(.*_)?tokens?|tok|pos|(.*_)?positions?|(.*_)?pos(itional|ition)?_(enc|encodings?|tables?)"
)
"""Parts of a path that mean one wherever they stand."""
_OF_ATTENTION = re.compile(r"(.*_)?(multi|att(n|ention)|per)_head")
_END = re.compile(rf"(.*_)?(outputs?|readout|predictions?){_LAYER}|(final|last){_LAYER}")
"""Parts that mean a head outside blocks."""
_OUT = re.compile(rf"out{_LAYER}|(proj|linear|dense|fc)_out")
"""Parts that mean a head outside blocks only if no named part stands before them."""
_BLOCK = re.compile(
    r".*blocks?|.*layers?|.*att(n|ention).*|.*mlp|.*ffn?|feed|.*forward.*|.*moe|experts?|.*cell|lstm|gru|h"
)
"""Words for blocks, of which a model has many, and for what is inside them."""
_INSIDE = re.compile(r".*att(n|ention).*|.*mlp|.*ffn?|feed|.*forward.*|self|cross|intermediate")
"""Words that make a part with ``output`` the end of something inside a block, as in ``attention_output``."""
_QUERY = re.compile(r"(.*_)?(q|query|queries|qkv)(_.*)?")

THIN, LONG = 16, 4096
"""A matrix outside blocks with one axis of at least `LONG`, and that so many times the other, is taken for one over a
vocabulary: those have tens of thousands of rows. Hidden matrices as thin, such as the keys of a single head, routers
and adapters, stand in blocks."""


@functools.lru_cache(maxsize=64)
def names_of_ends(paths: tuple[str, ...]) -> tuple[str | None, ...]:
    """The word or part of each leaf's path that means an embedding or a head; None for a hidden matrix.

    Args:
      paths: The paths of all leaves, such as ``encoder/0/kernel``; what stands beside a query belongs to an attention.
    """
    split = list(map(_parts, paths))
    attentions = {
        tuple(parts[:place])
        for parts in split
        for place, words in enumerate(parts)
        if _QUERY.fullmatch("_".join(words))
    }
    return tuple(_name_of_an_end(parts, attentions) for parts in split)


def _name_of_an_end(parts: Sequence[tuple[str, ...]], attentions: set[tuple[tuple[str, ...], ...]]) -> str | None:
    for place, words in enumerate(parts):
        for before, word in zip(("", *words), words, strict=False):
            if _ANYWHERE.fullmatch(word) and before != "pre" and not word.startswith("pre"):
                return word
        part, around = "_".join(words), parts[:place]
        if _PART.fullmatch(part) and not _OF_ATTENTION.fullmatch(part):
            return words[-1]
        inside = any(map(_INSIDE.fullmatch, words)) or _in_block(around) or tuple(around) in attentions
        if not inside and (_END.fullmatch(part) or (_OUT.fullmatch(part) and not _named(around))):
            return part
    return None


def shape_of_an_end(path: str, sides: tuple[int, int]) -> bool:
    """Whether a matrix has the shape of an embedding or a head, and stands where they do."""
    short, long = sorted(sides)
    return long >= LONG and 0 < THIN * short <= long and not _in_block(_parts(path)[:-1])


def _parts(path: str) -> list[tuple[str, ...]]:
    """The words of each part of a path, an index as its digits: ``h_0/LMHead`` is ``(("h",), ("lm", "head"))``."""
    parts = [part for part in re.split(r"[/.]", path) if part]
    return [(part,) if part.isdigit() else _words(part) for part in parts]


def _words(part: str) -> tuple[str, ...]:
    return tuple(word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part))


def _in_block(parts: Sequence[tuple[str, ...]]) -> bool:
    return any(word.isdigit() or _BLOCK.fullmatch(word) for words in parts for word in words)


def _named(parts: Sequence[tuple[str, ...]]) -> bool:
    """Whether there is a named part besides those that a framework puts around all parameters."""
    return any(words and words not in (("params",), ("model",)) for words in parts)
