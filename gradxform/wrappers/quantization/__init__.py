"""Optimizer states in one byte per number, or half of one: `quantize_state`, and the codecs it keeps moments with."""

from gradxform.wrappers.quantization.codecs import CODECS, Codec
from gradxform.wrappers.quantization.quantize_state import QuantizedState, quantize_state

__all__ = ["CODECS", "Codec", "QuantizedState", "quantize_state"]
