"""How large everything is, and which rows are measured: one line of a table for each sort of machine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """The sizes and rows of a run."""

    rows: tuple[str, ...]
    """Names in `rows.ROWS`, in the order in which they are measured."""
    leaf: int
    """Elements of the one large leaf."""
    transformer: tuple[int, int, int, int]
    """Layers, width, vocabulary and context of the GPT-2-like tree."""
    thousand: int
    """Rows of one, two or three thousand leaves have so many times one, two or three."""
    matrix: int
    """Rows and columns of the matrix under pairs of wrappers."""
    muon: tuple[tuple[int, int, int], ...]
    """Numbers of matrices, with their rows and columns."""
    muon_forms: tuple[str, ...]
    """Muon beside its default, of `rows.MUON_FORMS`."""
    soap: tuple[int, int, int]
    """Matrices of SOAP: their number, rows and columns."""
    sweep: int
    """Optimizers whose first steps are taken without `jit`, one after the other."""
    rounds: int
    """At most; see `cases.Case` for these four."""
    repeats: int
    sittings: int
    together: int
    loosest: float
    """Goals for times below this many times the base's are goals of another machine, and this one's is this."""
    budget: float | None
    """Seconds for the whole run; None for as long as it takes. What a run then leaves out is in `measure.measure_all`
    and `run.CUT_OFF`."""

    def tiny(self) -> Preset:
        """The same rows at sizes that only show that they run."""
        return dataclasses.replace(
            self,
            leaf=1 << 14,
            transformer=(0, 32, 128, 32),
            thousand=4,
            matrix=64,
            muon=((3, 8, 8), (2, 16, 16), (2, 16, 64))[: len(self.muon)],
            soap=(2, 16, 8),
            sweep=2,
            rounds=2,
            repeats=1,
            together=min(2, self.together),
        )


PRESETS = {
    "cpu": Preset(
        rows=(
            "AdamW",
            "guard",
            "accumulation",
            "low-bit moments",
            "bfloat16 parameters",
            "pairs",
            "un-jitted",
            "sweep",
            "build",
            "norm",
            "dispatch",
            "Muon",
            "optimizers",
            "SOAP",
            "import",
        ),
        leaf=1 << 26,
        transformer=(12, 512, 16384, 1024),
        thousand=1000,
        matrix=1024,
        muon=((100, 64, 64), (48, 512, 512), (12, 512, 2048)),
        muon_forms=("gram",),
        soap=(8, 256, 512),
        sweep=20,
        rounds=21,
        repeats=7,
        sittings=7,
        together=1,
        loosest=0.0,
        budget=None,
    ),
    # what bandwidth and many small kernels decide; the rows whose programs are the dearest to compile come last
    "gpu": Preset(
        rows=(
            "AdamW",
            "guard",
            "accumulation",
            "low-bit moments",
            "bfloat16 parameters",
            "pairs",
            "Muon",
            "optimizers",
            "dispatch",
            "SOAP",
            "sweep",
        ),
        leaf=1 << 28,
        transformer=(12, 1280, 50304, 1024),
        thousand=1000,
        matrix=1024,
        muon=((48, 128, 128), (24, 512, 512), (12, 1024, 4096)),
        muon_forms=("batched", "one by one", "bfloat16", "gram"),
        soap=(12, 1024, 1024),
        sweep=20,
        rounds=9,
        repeats=1,
        sittings=2,
        together=20,
        loosest=1.0,
        budget=320.0,
    ),
}
