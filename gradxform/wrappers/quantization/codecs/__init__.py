"""Codes of half a byte to two bytes for the numbers of an optimizer state: mathematics on one array.

A codec gives a float32 array codes in its shape (`Dynamic4` two to a byte) and a scale for each of its blocks. Each
codec has a form for signed numbers and one for numbers that are never negative, such as second moments: there a
positive number never becomes 0, which would make m/(√v + ε) huge, but the smallest positive number of its block's code.

With every codec, a block of zeros stays one; no finite number overflows; a NaN or an infinity makes its whole block
NaN, and so does a negative number where there must be none. (`Bfloat16` has no blocks: there only the number itself
becomes NaN; infinity stays.) Decoded numbers get the same codes again, except with signed maps, which end before −1.
"""

from gradxform.wrappers.quantization.codecs.bfloat16 import Bfloat16
from gradxform.wrappers.quantization.codecs.codec import Codec
from gradxform.wrappers.quantization.codecs.companded import Companded8
from gradxform.wrappers.quantization.codecs.maps import Dynamic4, Dynamic8
from gradxform.wrappers.quantization.codecs.roots import Root8

__all__ = ["CODECS", "Bfloat16", "Codec", "Companded8", "Dynamic4", "Dynamic8", "Root8"]

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Root8, Companded8, Dynamic8, Dynamic4, Bfloat16)}
"""The codecs by name."""
