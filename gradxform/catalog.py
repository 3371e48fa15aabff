"""What each optimizer and transformation is, as data: tests, documentation and examples read it.

Texts are calls in symbols that `evaluate` knows: a learning rate α, the decays β and γ of a first and a second moment,
a weight decay λ, a small number ε beside a divisor, a bound or factor c, a schedule s. `import gradxform` does not
import this module.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import gradxform as gx


def falling(step: Any) -> Any:
    """The schedule s."""
    return 0.5 / (1.0 + step)


# No number is a default, so that two calls are not equal by chance where the first leaves a symbol out.
SYMBOLS: Mapping[str, Any] = {"α": 0.05, "β": 0.8, "γ": 0.95, "λ": 0.01, "ε": 1e-3, "c": 0.5, "s": falling}

Pairs = Mapping[str, str]
"""Calls of ours, and what each is equal to."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """An optimizer, a transformation or a wrapper, as the row of a table."""

    function: Callable[..., Any]
    """What builds it."""
    idea: str
    """What it adds to θ ← θ − α·∇L, or does to an update, in a phrase."""
    examples: tuple[str, ...]
    """Calls that build it, the plainest first; a variant that is another algorithm is an example of its own."""
    sees: Literal["element", "leaf", "matrix", "tree"]
    """What it looks at to change an element: itself alone, all of its leaf, of its matrix, or of the tree."""
    degree: int | None = None
    """k, where c times as large gradients make cᵏ times as large updates, if ε is 0; None where no k is right."""
    composition: Pairs = dataclasses.field(default_factory=dict[str, str])
    """Calls of it, and compositions equal to them; none for what is a rule of its own."""
    optax: Pairs | str
    """Calls of it, and calls of optax that take the same steps; or why there are none."""
    torch: Pairs | str
    """Calls of it, and calls in ``torch.optim`` or ``torch.nn.utils`` that do the same; or why there are none."""
    paper: str
    """Where it is from: authors, year, and an arXiv number if it has one."""

    @property
    def name(self) -> str:
        """The public name."""
        return self.function.__name__

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        """The arguments of the function by name."""
        return inspect.signature(self.function).parameters


def evaluate(text: str, module: types.ModuleType = gx, **names: Any) -> Any:
    """What a text of the catalog is in a module; `names` are symbols of other values, or further ones."""
    return eval(text, {**vars(module), **SYMBOLS, **names})


def alike(*calls: str) -> Pairs:
    """Calls that are written in the same way on both sides."""
    return {call: call for call in calls}


OPTIMIZERS_ONLY = "torch has whole optimizers, no transformations of updates"
NO_WRAPPER = "optax has no such wrapper"

OPTIMIZERS = (
    Entry(
        function=gx.sgd,
        idea="a step per mini-batch",
        examples=("sgd(α)", "sgd(α, momentum=0.9)", "sgd(α, momentum=0.9, nesterov=True)"),
        sees="element",
        degree=1,
        composition={
            "sgd(α)": "scale_by_learning_rate(α)",
            "sgd(α, β)": "chain(scale_by_momentum(β, dampening=0.0), scale_by_learning_rate(α))",
        },
        optax=alike("sgd(α)", "sgd(α, β)", "sgd(α, β, nesterov=True)"),
        torch={
            "sgd(α)": "optim.SGD(lr=α)",
            "sgd(α, β, nesterov=True)": "optim.SGD(lr=α, momentum=β, nesterov=True)",
            "sgd(α, β, dampening=c)": "optim.SGD(lr=α, momentum=β, dampening=c)",
        },
        paper="Robbins & Monro 1951; Polyak 1964 (momentum); Sutskever et al. 2013 (nesterov)",
    ),
    Entry(
        function=gx.momentum,
        idea="a moving average, m ← βm + (1−β)g",
        examples=("momentum(α)",),
        sees="element",
        degree=1,
        composition={"momentum(α, β)": "chain(scale_by_momentum(β), scale_by_learning_rate(α))"},
        optax={"momentum(α, β)": "chain(ema(β, debias=False), scale_by_learning_rate(α))"},
        torch={"momentum(α, β)": "optim.SGD(lr=α * (1 - β), momentum=β)"},  # torch adds up where this averages
        paper="Polyak 1964",
    ),
    Entry(
        function=gx.adagrad,
        idea="divide by all past gradients, v ← v + g²",
        examples=("adagrad(α)",),
        sees="element",
        degree=0,
        composition={"adagrad(α)": "chain(normalize_by_rss(), scale_by_learning_rate(α))"},
        optax={"adagrad(α, 0.1, ε, eps_in_sqrt=True)": "adagrad(α, 0.1, ε)"},
        torch={"adagrad(α, c, ε)": "optim.Adagrad(lr=α, initial_accumulator_value=c, eps=ε)"},
        paper="Duchi, Hazan & Singer 2011, JMLR 12, figure 1",
    ),
    Entry(
        function=gx.rmsprop,
        idea="divide by recent gradients, v ← γv + (1−γ)g²",
        examples=("rmsprop(α)", "rmsprop(α, centered=True, momentum=0.9)"),
        sees="element",
        degree=0,
        composition={
            "rmsprop(α, γ, ε)": "chain(normalize_by_rms(γ, 0.0, eps_root=ε), scale_by_learning_rate(α))",
            "rmsprop(α, γ, ε, momentum=β)": "chain(normalize_by_rms(γ, 0.0, eps_root=ε), sgd(α, β))",
        },
        optax=alike("rmsprop(α, γ, ε)", "rmsprop(α, γ, ε, centered=True, momentum=β)"),
        torch={
            "rmsprop(α, γ, ε, eps_in_sqrt=False)": "optim.RMSprop(lr=α, alpha=γ, eps=ε)",
            "rmsprop(α, γ, ε, eps_in_sqrt=False, centered=True, momentum=β)": (
                "optim.RMSprop(lr=α, alpha=γ, eps=ε, centered=True, momentum=β)"
            ),
        },
        paper="Tieleman & Hinton 2012, lecture 6.5; Graves 2013, arXiv 1308.0850 (centered)",
    ),
    Entry(
        function=gx.adam,
        idea="both, bias-corrected, m̂/(√v̂+ε)",
        examples=("adam(α)", "adam(α, nesterov=True)"),
        sees="element",
        degree=0,
        composition={
            "adam(α, β, γ)": (
                "chain(normalize_by_rms(γ, of=chain(scale_by_momentum(β), bias_correction(β)), debias=True), "
                "scale_by_learning_rate(α))"
            ),
            "adam(α, β, γ, ε, nesterov=True)": (
                "chain(scale_by_adam(β, γ, ε, nesterov=True), scale_by_learning_rate(α))"
            ),
        },
        optax={"adam(α, β, γ, ε)": "adam(α, β, γ, ε)", "adam(α, β, γ, ε, nesterov=True)": "nadam(α, β, γ, ε)"},
        torch={
            "adam(α, β, γ, ε)": "optim.Adam(lr=α, betas=(β, γ), eps=ε)",
            # the end of torch's schedule for β₁, where it is Dozat's constant
            "adam(α, β, γ, ε, nesterov=True)": "optim.NAdam(lr=α, betas=(β, γ), eps=ε, momentum_decay=1e6)",
        },
        paper="Kingma & Ba 2015, arXiv 1412.6980, algorithm 1; Dozat 2016, algorithm 2 (nesterov)",
    ),
    Entry(
        function=gx.adam_l2,
        idea="L2 in the loss: the normalisation divides it too",
        examples=("adam_l2(α)",),
        sees="element",
        composition={"adam_l2(α, weight_decay=λ)": "chain(add_l2_regularization(λ), adam(α))"},
        optax={"adam_l2(α, β, γ, ε, weight_decay=λ)": "chain(add_decayed_weights(λ), adam(α, β, γ, ε))"},
        torch={
            "adam_l2(α, β, γ, ε, weight_decay=λ)": "optim.Adam(lr=α, betas=(β, γ), eps=ε, weight_decay=λ)",
        },
        paper="Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2 (the L2 variant)",
    ),
    Entry(
        function=gx.adamw,
        idea="decay decoupled from the gradient, the same for all parameters",
        examples=("adamw(α)",),
        sees="element",
        degree=0,
        composition={
            "adamw(α, β, γ, weight_decay=λ)": (
                "chain(scale_by_adam(β, γ), add_decoupled_weight_decay(λ), scale_by_learning_rate(α))"
            )
        },
        optax={
            "adamw(α, β, γ, ε, weight_decay=λ)": "adamw(α, β, γ, ε, weight_decay=λ)",
            "adamw(α, β, γ, ε, weight_decay=λ, nesterov=True)": "nadamw(α, β, γ, ε, weight_decay=λ)",
        },
        torch={"adamw(α, β, γ, ε, weight_decay=λ)": "optim.AdamW(lr=α, betas=(β, γ), eps=ε, weight_decay=λ)"},
        paper="Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2",
    ),
    Entry(
        function=gx.muon,
        idea="all singular values alike, U·Vᵀ",
        examples=('muon(α, ".*kernel", adam(α))',),
        sees="matrix",
        composition={
            'muon(α, ".*kernel", beta=β)': (
                'chain(scale_by_momentum(β, nesterov=True), orthogonalize(scale="jordan"), scale_by_learning_rate(α))'
            )
        },
        optax={
            'muon(α, ".*kernel", beta=β, nesterov=False, weight_decay=λ, eps=1e-8)': (
                "contrib.muon(α, beta=β, nesterov=False, weight_decay=λ)"
            )
        },
        torch="torch's Muon rounds each product to bfloat16, and its matrices are (out, in); the steps are the same",
        paper='Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"',
    ),
    Entry(
        function=gx.normuon,
        idea="and all neurons alike",
        examples=('normuon(α, ".*kernel", adam(α))',),
        sees="matrix",
        composition={
            'normuon(α, ".*kernel", beta=β, beta2=γ)': (
                'chain(scale_by_momentum(β, nesterov=True), orthogonalize(scale="jordan"), normalize_by_neuron(γ), '
                "scale_by_learning_rate(α))"
            )
        },
        optax="optax has no NorMuon",
        torch="torch has no NorMuon; that of pytorch_optimizer takes the same steps",
        paper="Li et al. 2025, arXiv 2510.05491, algorithm 1",
    ),
    Entry(
        function=gx.soap,
        idea="Adam in the eigenbasis of each matrix's gradients",
        examples=("soap(α)", 'soap(α, every=1, renewal="eigh")'),
        sees="leaf",
        composition={
            "soap(α, β, γ, weight_decay=λ)": (
                "chain(scale_by_soap(β, γ), add_decoupled_weight_decay(λ), scale_by_learning_rate(α))"
            )
        },
        optax="optax has no SOAP",
        torch="torch has no SOAP; that of pytorch_optimizer takes the same steps",
        paper="Vyas et al. 2024, arXiv 2409.11321, algorithm 3",
    ),
    Entry(
        function=gx.nadam,
        idea="Adam that looks one step ahead",
        examples=("nadam(α)", "nadam(α, momentum_decay=0.004)"),
        sees="element",
        degree=0,
        composition={"nadam(α, β, γ, ε)": "adam(α, β, γ, ε, nesterov=True)"},
        optax=alike("nadam(α, β, γ, ε)"),
        torch={
            "nadam(α, β, γ, ε, momentum_decay=c)": "optim.NAdam(lr=α, betas=(β, γ), eps=ε, momentum_decay=c)",
        },
        paper='Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2',
    ),
    Entry(
        function=gx.lion,
        idea="only the sign of a momentum",
        examples=("lion(α)",),
        sees="element",
        degree=0,
        composition={
            "lion(α, β, γ, weight_decay=λ)": (
                "chain(scale_by_momentum(γ, blend=β), scale_by_sign(), add_decoupled_weight_decay(λ), "
                "scale_by_learning_rate(α))"
            )
        },
        optax=alike("lion(α, β, γ, weight_decay=λ)"),
        torch="torch has no Lion; that of pytorch_optimizer takes the same steps",
        paper="Chen et al. 2023, arXiv 2302.06675, algorithm 2",
    ),
    Entry(
        function=gx.adafactor,
        idea="a second moment of rows and columns alone",
        examples=("adafactor(α, min_dim_size_to_factor=2)", "adafactor(α, momentum=0.9, weight_decay_rate=λ)"),
        sees="leaf",
        degree=0,
        composition={
            "adafactor(α, 3)": (
                "chain(normalize_by_factored_rms(min_dim_size_to_factor=3), clip_by_leaf_rms(1.0), "
                "scale(α), scale_by_param_rms(), scale(-1.0))"
            )
        },
        optax={
            "adafactor(α, 2)": "adafactor(α, 2)",
            "adafactor(α)": "adafactor(α)",
            "adafactor(α, 2, c, momentum=β, weight_decay_rate=λ, clipping_threshold=c)": (
                "adafactor(α, 2, c, momentum=β, weight_decay_rate=λ, clipping_threshold=c)"
            ),
        },
        torch="torch's Adafactor factors the last two axes of any size, and has the rate min(α, 1/√t); see `adafactor`",
        paper="Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5",
    ),
    Entry(
        function=gx.prodigy,
        idea="the learning rate itself is estimated",
        examples=("prodigy(1.0)", "prodigy(1.0, weight_decay=λ, safeguard_warmup=True)"),
        sees="tree",
        optax={
            "prodigy(c, β, γ, eps=ε, d0=α, weight_decay=λ)": (
                "contrib.prodigy(c, (β, γ), eps=ε, estim_lr0=α, weight_decay=λ)"
            ),
            "prodigy(safeguard_warmup=True, d0=c)": "contrib.prodigy(safeguard_warmup=True, estim_lr0=c)",
        },
        torch="torch has no Prodigy; prodigyopt is by its authors",
        paper="Mishchenko & Defazio 2023, arXiv 2306.06101, algorithm 4",
    ),
    Entry(
        function=gx.polyak_sgd,
        idea="a step as long as the loss is high",
        examples=("polyak_sgd(c)", 'polyak_sgd(c, variant="sps+")'),
        sees="tree",
        composition={"polyak_sgd(scaling=α)": "chain(scale_by_polyak(), scale_by_learning_rate(α))"},
        optax=alike("polyak_sgd(c, f_min=ε, eps=λ)"),
        torch="torch has no Polyak steps",
        paper="Loizou et al. 2021, arXiv 2002.10542, equation 3",
    ),
    Entry(
        function=gx.noisy_sgd,
        idea="noise that fades beside the gradient",
        examples=("noisy_sgd(α)",),
        sees="element",
        composition={"noisy_sgd(α, c, β)": "chain(add_noise(c, β), scale_by_learning_rate(α))"},
        optax="optax.noisy_sgd draws other numbers of the same distribution",
        torch="torch has no noise; SGLD is left to its users",
        paper="Neelakantan et al. 2015, arXiv 1511.06807, equation 1",
    ),
    Entry(
        function=gx.lbfgs,
        idea="an inverse Hessian made of the last steps",
        examples=("lbfgs(α, memory_size=3)",),
        sees="tree",
        composition={"lbfgs(α)": "chain(scale_by_lbfgs(), scale_by_learning_rate(α))"},
        optax={"lbfgs(α, 3)": "lbfgs(α, 3, linesearch=None)"},
        torch="torch.optim.LBFGS takes a closure and iterates in one step",
        paper='Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization"',
    ),
    Entry(
        function=gx.schedule_free,
        idea="an average of the parameters in place of a falling rate",
        examples=("schedule_free(sgd(α), α)",),
        sees="element",
        composition={"schedule_free(adam(α), α)": "chain(adam(α), average_schedule_free(α))"},
        optax={"schedule_free(sgd(α), α, β)": "contrib.schedule_free(sgd(α), α, β)"},
        torch="torch has none; schedulefree is by its authors",
        paper="Defazio et al. 2024, arXiv 2405.15682, algorithm 1",
    ),
    Entry(
        function=gx.schedule_free_sgd,
        idea="gradient descent without a schedule",
        examples=("schedule_free_sgd(α)",),
        sees="element",
        composition={
            "schedule_free_sgd(α, weight_decay=λ)": (
                "schedule_free(chain(add_decoupled_weight_decay(λ), scale_by_learning_rate(α)), α)"
            )
        },
        optax={"schedule_free_sgd(α, b1=β, weight_decay=λ)": "contrib.schedule_free_sgd(α, b1=β, weight_decay=λ)"},
        torch="torch has none; schedulefree is by its authors",
        paper="Defazio et al. 2024, arXiv 2405.15682, algorithm 1",
    ),
    Entry(
        function=gx.schedule_free_adamw,
        idea="AdamW without a schedule",
        examples=("schedule_free_adamw(α)",),
        sees="element",
        composition={
            "schedule_free_adamw(α, b2=γ, weight_decay=λ)": (
                "schedule_free(chain(normalize_by_rms(γ, debias=True), add_decoupled_weight_decay(λ), "
                "scale_by_learning_rate(α)), α)"
            )
        },
        optax={
            "schedule_free_adamw(α, None, β, γ, ε, λ)": "contrib.schedule_free_adamw(α, None, β, γ, ε, λ)",
        },
        torch="torch has none; schedulefree is by its authors",
        paper="Defazio et al. 2024, arXiv 2405.15682, algorithm 1",
    ),
)

TRANSFORMATIONS = (
    Entry(
        function=gx.scale,
        idea="multiply by a number",
        examples=("scale(c)",),
        sees="element",
        degree=1,
        optax=alike("scale(c)"),
        torch=OPTIMIZERS_ONLY,
        paper="none: a product",
    ),
    Entry(
        function=gx.scale_by_schedule,
        idea="multiply by a number that depends on the step",
        examples=("scale_by_schedule(s)",),
        sees="element",
        degree=1,
        optax=alike("scale_by_schedule(s)"),
        torch=OPTIMIZERS_ONLY,
        paper="none: a product",
    ),
    Entry(
        function=gx.scale_by_learning_rate,
        idea="go downhill: multiply by −α",
        examples=("scale_by_learning_rate(α)",),
        sees="element",
        degree=1,
        optax=alike("scale_by_learning_rate(α)"),
        torch=OPTIMIZERS_ONLY,
        paper="Robbins & Monro 1951",
    ),
    Entry(
        function=gx.scale_by_momentum,
        idea="a moving average, a sum that decays, or a lookahead of either",
        examples=("scale_by_momentum()", "scale_by_momentum(0.9, dampening=0.0, nesterov=True)"),
        sees="element",
        degree=1,
        optax={
            "scale_by_momentum(β)": "ema(β, debias=False)",
            "scale_by_momentum(β, debias=True)": "ema(β)",
            "scale_by_momentum(β, dampening=0.0)": "trace(β)",
            "scale_by_momentum(β, dampening=0.0, nesterov=True)": "trace(β, nesterov=True)",
        },
        torch=OPTIMIZERS_ONLY,
        paper="Polyak 1964; Nesterov 1983; Sutskever et al. 2013 (nesterov)",
    ),
    Entry(
        function=gx.bias_correction,
        idea="what a moving average that starts at 0 lacks in its first steps",
        examples=("bias_correction()",),
        sees="element",
        degree=1,
        optax={"chain(scale_by_momentum(β), bias_correction(β))": "ema(β)"},
        torch=OPTIMIZERS_ONLY,
        paper="Kingma & Ba 2015, arXiv 1412.6980, section 3",
    ),
    Entry(
        function=gx.scale_by_adam,
        idea="the direction of Adam, m̂/(√v̂+ε)",
        examples=("scale_by_adam()", "scale_by_adam(nesterov=True)"),
        sees="element",
        degree=0,
        composition={
            "scale_by_adam(β, γ, ε)": (
                "normalize_by_rms(γ, ε, of=chain(scale_by_momentum(β), bias_correction(β)), debias=True)"
            )
        },
        optax=alike("scale_by_adam(β, γ, ε)", "scale_by_adam(β, γ, ε, nesterov=True)"),
        torch=OPTIMIZERS_ONLY,
        paper="Kingma & Ba 2015, arXiv 1412.6980, algorithm 1",
    ),
    Entry(
        function=gx.normalize_by_rms,
        idea="divide by the root of a moving average of squares",
        examples=("normalize_by_rms()", "normalize_by_rms(of=scale_by_momentum(β, debias=True), debias=True)"),
        sees="element",
        degree=0,
        optax={"normalize_by_rms(γ, 0.0, eps_root=ε)": "scale_by_rms(γ, ε)"},
        torch=OPTIMIZERS_ONLY,
        paper="Tieleman & Hinton 2012, lecture 6.5",
    ),
    Entry(
        function=gx.normalize_by_rss,
        idea="divide by the root of the sum of all squares",
        examples=("normalize_by_rss()",),
        sees="element",
        degree=0,
        optax={"normalize_by_rss(0.0, eps_root=ε, initial_accumulator_value=c)": "scale_by_rss(c, ε)"},
        torch=OPTIMIZERS_ONLY,
        paper="Duchi, Hazan & Singer 2011, JMLR 12, figure 1",
    ),
    Entry(
        function=gx.normalize_by_factored_rms,
        idea="divide by the root of a moving average of squares, of rows and of columns",
        examples=("normalize_by_factored_rms(min_dim_size_to_factor=2)", "normalize_by_factored_rms(factored=False)"),
        sees="leaf",
        degree=0,
        optax={
            "normalize_by_factored_rms(c, 0, 2)": "scale_by_factored_rms(True, c, 0, 2)",
            "normalize_by_factored_rms(c, factored=False)": "scale_by_factored_rms(False, c)",
        },
        torch=OPTIMIZERS_ONLY,
        paper="Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4",
    ),
    Entry(
        function=gx.scale_by_sign,
        idea="keep nothing but the sign",
        examples=("scale_by_sign()",),
        sees="element",
        degree=0,
        optax=alike("scale_by_sign()"),
        torch=OPTIMIZERS_ONLY,
        paper="Bernstein et al. 2018, arXiv 1802.04434, algorithm 1",
    ),
    Entry(
        function=gx.scale_by_param_rms,
        idea="steps in proportion to the parameters of each leaf",
        examples=("scale_by_param_rms()",),
        sees="leaf",
        degree=1,
        optax={"scale_by_param_rms(c)": "scale_by_param_block_rms(c)"},
        torch=OPTIMIZERS_ONLY,
        paper="Shazeer & Stern 2018, arXiv 1804.04235, section 8",
    ),
    Entry(
        function=gx.scale_by_polyak,
        idea="as long a step as the loss is high",
        examples=("scale_by_polyak()",),
        sees="tree",
        optax=alike("scale_by_polyak(ε, c, λ)"),
        torch=OPTIMIZERS_ONLY,
        paper="Loizou et al. 2021, arXiv 2002.10542, equation 3",
    ),
    Entry(
        function=gx.scale_by_lbfgs,
        idea="multiply by an inverse Hessian made of the last steps",
        examples=("scale_by_lbfgs(3)",),
        sees="tree",
        optax={"scale_by_lbfgs(3)": "scale_by_lbfgs(3)"},
        torch=OPTIMIZERS_ONLY,
        paper='Liu & Nocedal 1989, "On the limited memory BFGS method for large scale optimization"',
    ),
    Entry(
        function=gx.scale_by_soap,
        idea="the direction of Adam in the eigenbasis of each matrix's gradients",
        examples=("scale_by_soap()",),
        sees="leaf",
        optax="optax has no SOAP",
        torch=OPTIMIZERS_ONLY,
        paper="Vyas et al. 2024, arXiv 2409.11321, algorithm 3",
    ),
    Entry(
        function=gx.average_schedule_free,
        idea="train between where updates lead and their average",
        examples=("average_schedule_free(α)",),
        sees="element",
        optax="in optax it is contrib.schedule_free, around a transformation",
        torch=OPTIMIZERS_ONLY,
        paper="Defazio et al. 2024, arXiv 2405.15682, equations 6 to 8",
    ),
    Entry(
        function=gx.add_noise,
        idea="random numbers that fade",
        examples=("add_noise(c, γ)",),
        sees="element",
        optax="optax.add_noise draws other numbers of the same distribution",
        torch=OPTIMIZERS_ONLY,
        paper="Neelakantan et al. 2015, arXiv 1511.06807, equation 1",
    ),
    Entry(
        function=gx.clip_by_value,
        idea="bound each element",
        examples=("clip_by_value(c)",),
        sees="element",
        optax={"clip_by_value(c)": "clip(c)"},
        torch={"clip_by_value(c)": "nn.utils.clip_grad_value_(c)"},
        paper="none: a bound",
    ),
    Entry(
        function=gx.clip_by_leaf_norm,
        idea="bound the norm of each leaf, and keep its direction",
        examples=("clip_by_leaf_norm(c)",),
        sees="leaf",
        optax="optax has clip_by_block_rms, here clip_by_leaf_rms, which bounds the norm over √n",
        torch=OPTIMIZERS_ONLY,
        paper="Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1",
    ),
    Entry(
        function=gx.clip_by_leaf_rms,
        idea="bound the root of the mean square of each leaf",
        examples=("clip_by_leaf_rms(c)",),
        sees="leaf",
        optax={"clip_by_leaf_rms(c)": "clip_by_block_rms(c)"},
        torch=OPTIMIZERS_ONLY,
        paper="Shazeer & Stern 2018, arXiv 1804.04235, section 6",
    ),
    Entry(
        function=gx.clip_by_global_norm,
        idea="bound the norm of all leaves together, and keep its direction",
        examples=("clip_by_global_norm(c)",),
        sees="tree",
        optax=alike("clip_by_global_norm(c)"),
        torch={"clip_by_global_norm(c)": "nn.utils.clip_grad_norm_(c)"},
        paper="Pascanu, Mikolov & Bengio 2013, arXiv 1211.5063, algorithm 1",
    ),
    Entry(
        function=gx.clip_by_param_norm,
        idea="bound the norm of what goes into a neuron by that of its weights (AGC)",
        examples=("clip_by_param_norm()",),
        sees="leaf",
        optax={"clip_by_param_norm(c, ε)": "adaptive_grad_clip(c, ε)"},
        torch=OPTIMIZERS_ONLY,
        paper="Brock et al. 2021, arXiv 2102.06171, section 4",
    ),
    Entry(
        function=gx.clip_by_average_norm,
        idea="bound the norm of each leaf by a moving average of it (AdaGC)",
        examples=("clip_by_average_norm(warmup=2)",),
        sees="tree",
        optax="optax has no AdaGC",
        torch="torch has no AdaGC; that of pytorch_optimizer clips alike",
        paper="Wang et al. 2025, arXiv 2502.11034",
    ),
    Entry(
        function=gx.clip_by_zscore,
        idea="bound the norm of all leaves by the mean and the deviation of past ones (ZClip)",
        examples=("clip_by_zscore(warmup=2)",),
        sees="tree",
        optax="optax has no ZClip",
        torch="torch has no ZClip; the package zclip clips alike",
        paper="Kumar et al. 2025, arXiv 2504.02507",
    ),
    Entry(
        function=gx.orthogonalize,
        idea="make all singular values of a matrix equal, U·Vᵀ",
        examples=("orthogonalize()",),
        sees="matrix",
        degree=0,
        optax={
            'chain(scale_by_momentum(β, debias=True), orthogonalize(scale="jordan", eps=1e-8))': (
                'contrib.scale_by_muon(beta=β, nesterov=False, weight_dimension_numbers={"kernel": '
                "contrib.MuonDimensionNumbers()})"
            )
        },
        torch=OPTIMIZERS_ONLY,
        paper="Jordan et al. 2024; Amsel et al. 2025, arXiv 2505.16932 (polar_express)",
    ),
    Entry(
        function=gx.normalize_by_neuron,
        idea="divide the weights of each neuron by the root of a moving average of their mean square",
        examples=("normalize_by_neuron()",),
        sees="matrix",
        degree=1,
        optax="optax has no NorMuon",
        torch=OPTIMIZERS_ONLY,
        paper="Li et al. 2025, arXiv 2510.05491, algorithm 1",
    ),
    Entry(
        function=gx.add_decoupled_weight_decay,
        idea="shrink all weights at one rate: add λθ after the normalisation",
        examples=("add_decoupled_weight_decay()",),
        sees="element",
        optax={"add_decoupled_weight_decay(λ)": "add_decayed_weights(λ)"},
        torch=OPTIMIZERS_ONLY,
        paper="Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2, line 12",
    ),
    Entry(
        function=gx.add_l2_regularization,
        idea="the gradient of (λ/2)·‖θ‖²: add λθ before the normalisation",
        examples=("add_l2_regularization()",),
        sees="element",
        optax={"add_l2_regularization(λ)": "add_decayed_weights(λ)"},
        torch=OPTIMIZERS_ONLY,
        paper="Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2, line 6",
    ),
)

WRAPPERS = (
    Entry(
        function=gx.accumulate,
        idea="a step on the mean gradient of k mini-batches",
        examples=("accumulate(adam(α), every=2)",),
        sees="tree",
        optax={"accumulate(adam(α), every=2)": "MultiSteps(adam(α), 2).gradient_transformation()"},
        torch="torch adds up gradients in .grad, and has no wrapper",
        paper="none: a mean",
    ),
    Entry(
        function=gx.skip_nonfinite,
        idea="a step with NaN or infinity changes nothing",
        examples=("skip_nonfinite(adam(α))",),
        sees="tree",
        optax={"skip_nonfinite(adam(α))": "apply_if_finite(adam(α), 10)"},
        torch="torch's GradScaler skips such steps while it scales a loss in float16, and is no wrapper",
        paper="Micikevicius et al. 2018, arXiv 1710.03740, section 3.2",
    ),
    Entry(
        function=gx.skip_spikes,
        idea="a step far above the last ones changes nothing",
        examples=("skip_spikes(adam(α), window=4)",),
        sees="tree",
        optax=NO_WRAPPER,
        torch="torch has no such wrapper; OLMo-core's SkipStepOptimizer skips alike",
        paper="Groeneveld et al. 2024, arXiv 2402.00838",
    ),
    Entry(
        function=gx.observe,
        idea="norms, ratios and counts of a step, kept in its state",
        examples=("observe(adam(α))", 'observe(adam(α), by="leaf")'),
        sees="tree",
        optax="optax.monitor keeps what a function that you write makes of the updates; it has no metrics itself",
        torch="torch leaves metrics to its users",
        paper="none: measurements",
    ),
    Entry(
        function=gx.stochastic_rounding,
        idea="low-precision parameters rounded at random, right in the mean",
        examples=("stochastic_rounding(adam(α), 0)",),
        sees="element",
        optax=NO_WRAPPER,
        torch="torch has no such wrapper; torchao's optimizers round alike",
        paper="Gupta et al. 2015, arXiv 1502.02551; Zamirai et al. 2020, arXiv 2010.06192",
    ),
    Entry(
        function=gx.compensated,
        idea="what low-precision parameters lose in rounding, kept beside them",
        examples=("compensated(adam(α))", 'compensated(adam(α), "int8")'),
        sees="element",
        optax=NO_WRAPPER,
        torch="torch has no such wrapper",
        paper="Kahan 1965; Zamirai et al. 2020, arXiv 2010.06192",
    ),
    Entry(
        function=gx.master_weights,
        idea="a float32 copy is trained beside low-precision parameters",
        examples=("master_weights(adam(α))",),
        sees="element",
        optax=NO_WRAPPER,
        torch="torch has no such wrapper; mixed precision keeps the parameters themselves in float32",
        paper="Micikevicius et al. 2018, arXiv 1710.03740, section 3.1",
    ),
    Entry(
        function=gx.quantize_state,
        idea="the state kept in 8 or 4 bits",
        examples=("quantize_state(adam(α), min_size=4)", 'quantize_state(adam(α), "bfloat16", min_size=4)'),
        sees="leaf",
        optax=NO_WRAPPER,
        torch="torch has no such wrapper; bitsandbytes and torchao have optimizers of their own",
        paper="Dettmers et al. 2022, arXiv 2110.02861",
    ),
)

COMPOSITION = (
    Entry(
        function=gx.identity,
        idea="leave updates as they are",
        examples=("identity()",),
        sees="element",
        degree=1,
        optax=alike("identity()"),
        torch=OPTIMIZERS_ONLY,
        paper="none: the unit of `chain`",
    ),
    Entry(
        function=gx.chain,
        idea="transformations after each other, in a single pass",
        examples=("chain(clip_by_global_norm(c), adamw(α))",),
        sees="tree",
        optax=alike("chain(clip_by_global_norm(c), adamw(α))"),
        torch=OPTIMIZERS_ONLY,
        paper="none: composition",
    ),
    Entry(
        function=gx.by_path,
        idea="other optimizers or hyperparameters for the leaves that a path pattern matches",
        examples=('by_path({"bias": sgd(α)}, default=adam(α))',),
        sees="element",
        optax={
            'by_path({"bias": sgd(α)}, default=adam(α))': (
                'partition({"bias": sgd(α), "kernel": adam(α)}, {"bias": "bias", "kernel": "kernel"})'
            )
        },
        torch="torch has groups of parameters in the argument of an optimizer",
        paper="none: a choice",
    ),
    Entry(
        function=gx.freeze,
        idea="leaves that do not move, hold no state and stay out of norms",
        examples=("freeze()",),
        sees="element",
        optax={"freeze()": "set_to_zero()"},
        torch="torch has requires_grad=False",
        paper="none: a choice",
    ),
)

CATALOG: Mapping[str, Entry] = {entry.name: entry for entry in (*OPTIMIZERS, *TRANSFORMATIONS, *WRAPPERS, *COMPOSITION)}
